package stack

import (
	"testing"

	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/stretchr/testify/require"
)

func TestComposeReadsWhatIsWritten(t *testing.T) {
	for _, value := range []string{
		"", `'`, `\`, `\\`, `\'`, `'\`, `a\\'b`, `a\\\'b$x`, `"$HOME ${HOME} $$`, "10.0.0.0/8\nroute {\n\techo\n}", " # ", `\n\t`,
	} {
		got, err := dotenv.UnmarshalWithLookup("A="+quote(value)+"\nB='next'\n", func(string) (string, bool) { return "wrong", true })
		require.NoError(t, err, value)
		require.Equal(t, map[string]string{"A": value, "B": "next"}, got)
	}
	for name, value := range passwords() {
		got, err := dotenv.UnmarshalBytesWithLookup([]byte(name+"="+quote(value)), nil)
		require.NoError(t, err)
		require.Equal(t, value, got[name])
	}
}
