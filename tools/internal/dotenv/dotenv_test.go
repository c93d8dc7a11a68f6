package dotenv

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
)

func TestValuesAreComposes(t *testing.T) {
	t.Setenv("OUTSIDE", "from the environment")
	tests := map[string]struct {
		file string
		want map[string]string
	}{
		"an empty file":                               {"", map[string]string{}},
		"comments and blank lines":                    {"\n# A=1\n  # B=2\n\n", map[string]string{}},
		"plain values":                                {"A=1\nB = two words \nC:yaml\nexport D=4", map[string]string{"A": "1", "B": "two words", "C": "yaml", "D": "4"}},
		"an empty value is set":                       {"A=\nB=''\n", map[string]string{"A": "", "B": ""}},
		"the later of two wins":                       {"A=1\nA=2\n", map[string]string{"A": "2"}},
		"single quotes keep everything":               {`A='a $b # "c" \n $$ \' d'`, map[string]string{"A": `a $b # "c" \n $$ ' d`}},
		"double quotes have escapes":                  {`A="a\tb\"c"`, map[string]string{"A": "a\tb\"c"}},
		"a # after a space cuts":                      {"A=x#y #z\n", map[string]string{"A": "x#y"}},
		"a comment after a quoted value":              {"A='x' # y\nB=1", map[string]string{"A": "x", "B": "1"}},
		"two variables on a line":                     {"A='x' B='y'\n", map[string]string{"A": "x", "B": "y"}},
		"a value of several lines":                    {"A='one\nB=two\n# three\n'\nC=3\n", map[string]string{"A": "one\nB=two\n# three\n", "C": "3"}},
		"a double quoted value of several lines":      {"A=\"one\n'B=2\"\nC=3", map[string]string{"A": "one\n'B=2", "C": "3"}},
		"a quote within an unquoted value":            {"A=it's\nB=1\n", map[string]string{"A": "it's", "B": "1"}},
		"a reference to an earlier variable":          {"A=1\nB=${A}2$A\n", map[string]string{"A": "1", "B": "121"}},
		"a reference to the environment":              {"A=$OUTSIDE\n", map[string]string{"A": "from the environment"}},
		"references with defaults":                    {"A=${NONE:-x}${NONE-y}${NONE:+z}\n", map[string]string{"A": "xy"}},
		"two dollars are one":                         {"A=a$$b\n", map[string]string{"A": "a$b"}},
		"a lone dollar":                               {"A='$' \nB=\"5\\$\"\n", map[string]string{"A": "$", "B": "5$"}},
		"a name alone is taken from the environment":  {"OUTSIDE\nNONE\nA=1\n", map[string]string{"OUTSIDE": "from the environment", "A": "1"}},
		"lines that end as on Windows":                {"A=1\r\nB='2'\r\n\r\n# c\r\nC=3\r\n", map[string]string{"A": "1", "B": "2", "C": "3"}},
		"a byte order mark":                           {bom + "A=1\n", map[string]string{"A": "1"}},
		"quoted values with line ends in the Windows": {"A='1\r\n2'\r\nB=3\r\n", map[string]string{"A": "1\r\n2", "B": "3"}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := Values([]byte(tc.file))
			require.NoError(t, err)
			require.Equal(t, tc.want, got)

			whole, err := dotenv.GetEnvFromFile(map[string]string{"OUTSIDE": os.Getenv("OUTSIDE")}, []string{write(t, tc.file)})
			require.NoError(t, err)
			require.Equal(t, whole, got, "Compose reads the file as a whole")
		})
	}
}

func TestErrorsNeverTellAValue(t *testing.T) {
	var warnings bytes.Buffer
	logrus.SetOutput(&warnings) // the parser warns there, with a part of the value
	t.Cleanup(func() { logrus.SetOutput(os.Stderr) })
	tests := map[string]struct{ file, want string }{
		"a quote that is never closed":          {"A=1\nB='hunter2\nC=3\n", "line 2: a quote is not closed"},
		"a line without a name":                 {"A=1\n\nhunter2!\n", "line 3: it is not of the form NAME=value"},
		"a name with a space":                   {"MY hunter2=1\n", "line 1: it is not of the form NAME=value"},
		"a name behind a value":                 {"A='1'hunter2\n", "line 1: it is not of the form NAME=value"},
		"a reference to nothing":                {"A=p$hunter2\n", `line 1: it has a "$" that refers to nothing; in single quotes a "$" is only a "$"`},
		"a reference to nothing in braces":      {"A=\"p${hunter2}\"\n", `line 1: it has a "$" that refers to nothing; in single quotes a "$" is only a "$"`},
		"a reference to a later variable":       {"A=$hunter2\nhunter2=1\n", `line 1: it has a "$" that refers to nothing; in single quotes a "$" is only a "$"`},
		"a reference that is broken":            {"A=${hunter2\n", `line 1: it has a "$" that refers to nothing; in single quotes a "$" is only a "$"`},
		"a required reference":                  {"A=${NONE:?hunter2}\n", `line 1: it has a "$" that refers to nothing; in single quotes a "$" is only a "$"`},
		"the line counts those of quoted texts": {"A='1\n2\n3'\nB=\"hunter2", "line 4: a quote is not closed"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			path := write(t, tc.file)
			_, err := Read(path)
			require.EqualError(t, err, `reading "`+path+`": `+tc.want)
			require.Empty(t, warnings.String())
		})
	}
}

func TestReadIsBounded(t *testing.T) {
	path := write(t, strings.Repeat("#", MaxSize+1))
	_, err := Read(path)
	require.EqualError(t, err, `reading "`+path+`": it is larger than 65536 bytes`)
	_, err = Read(path + "x")
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestStatements(t *testing.T) {
	file := "# head\n\n# about A and B\n# more\nA=1\nB='2\n2'\n# about C\nC=3"
	got, err := Parse([]byte(file))
	require.NoError(t, err)
	require.Len(t, got, 3)
	require.Equal(t, Statement{Line: 5, Start: 31, End: 35, Comment: "# about A and B\n# more\n", Values: map[string]string{"A": "1"}}, got[0])
	require.Equal(t, "B='2\n2'\n", file[got[1].Start:got[1].End])
	require.Equal(t, "# about A and B\n# more\n", got[1].Comment)
	require.Equal(t, 6, got[1].Line)
	require.Equal(t, "C=3", file[got[2].Start:got[2].End])
	require.Equal(t, "# about C\n", got[2].Comment)
	require.Equal(t, 9, got[2].Line)
}

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), ".env")
	require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// Statement by statement or as a whole, it is the same file.
func FuzzValues(f *testing.F) {
	for _, seed := range []string{"A=1\nB='x\n' C=\"$A\"\n", "export A: b # c\r\nD\n", "A='\\''\n#'\nB=${A:-'}", "A=\nA='1'A"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, file string) {
		got, err := Values([]byte(file))
		if err != nil {
			return // stricter on purpose
		}
		if !strings.HasSuffix(file, "\n") {
			file += "\n"
		}
		want, err := dotenv.UnmarshalWithLookup(strings.TrimPrefix(file, bom), os.LookupEnv)
		require.NoError(t, err)
		require.Equal(t, want, got)
	})
}
