// Package dotenv reads .env files as Compose does, with Compose's own parser.
//
// It is stricter in one point. In a value without single quotes a $ begins a
// reference, and one to a variable that is not set vanishes: a password such as
// pa$$word or pa$word would silently become another one. Such a file is refused.
// Errors name lines and variables and never a value; the parser's own errors and
// warnings do, so they are not passed on.
package dotenv

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/dotenv"
)

// MaxSize bounds a file. One with every setting and its comments has some 8 KiB.
const MaxSize = 64 << 10

// Read returns the variables of the file at path.
func Read(path string) (map[string]string, error) {
	data, err := ReadFile(path)
	if err != nil {
		return nil, err
	}
	values, err := Values(data)
	if err != nil {
		return nil, fmt.Errorf("reading %q: %w", path, err)
	}
	return values, nil
}

// ReadFile returns the exact content of the file at path.
func ReadFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading settings: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("reading settings: %w", err)
	}
	if len(data) > MaxSize {
		return nil, fmt.Errorf("reading %q: it is larger than %d bytes", path, MaxSize)
	}
	return data, nil
}

// Values returns the variables that data sets.
func Values(data []byte) (map[string]string, error) {
	statements, err := Parse(data)
	if err != nil {
		return nil, err
	}
	values := map[string]string{}
	for _, s := range statements {
		maps.Copy(values, s.Values)
	}
	return values, nil
}

// Statement is a piece of a file that sets variables: a line, or several if a
// quoted value has line ends in it.
type Statement struct {
	Line       int    // of its beginning, from 1
	Start, End int    // its bytes in the file, with the line end if there is one
	Comment    string // the comment lines that stand above it in the same paragraph
	// Values are the variables that it sets: one as a rule, none for a name without
	// a value that the environment does not have, several if they share a line.
	Values map[string]string
}

const bom = "\ufeff"

// Parse divides data into statements.
func Parse(data []byte) ([]Statement, error) {
	var (
		statements []Statement
		known      = map[string]string{}
		comment    string
		fresh      = true // no statement yet below the comment
		number     = 1
	)
	start := len(data) - len(strings.TrimPrefix(string(data), bom))
	for start < len(data) {
		end := lineEnd(data, start)
		line := strings.TrimSpace(string(data[start:end]))
		switch {
		case line == "":
			comment, fresh = "", true
		case line[0] == '#':
			if !fresh {
				comment, fresh = "", true
			}
			comment += string(data[start:end])
		default:
			values, err := parse(string(data[start:end]), known)
			for errors.Is(err, errOpenQuote) && end < len(data) {
				end = lineEnd(data, end)
				values, err = parse(string(data[start:end]), known)
			}
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", number, err)
			}
			statements = append(statements, Statement{Line: number, Start: start, End: end, Comment: comment, Values: values})
			maps.Copy(known, values)
			fresh = false
		}
		number += strings.Count(string(data[start:end]), "\n")
		start = end
	}
	return statements, nil
}

func lineEnd(data []byte, from int) int {
	if i := slices.Index(data[from:], '\n'); i >= 0 {
		return from + i + 1
	}
	return len(data)
}

var (
	errOpenQuote = errors.New("a quote is not closed")
	errSyntax    = errors.New("it is not of the form NAME=value")
	errReference = errors.New(`it has a "$" that refers to nothing; in single quotes a "$" is only a "$"`)
)

// parse reads one statement, to which the variables of known precede.
func parse(text string, known map[string]string) (map[string]string, error) {
	if !strings.HasSuffix(text, "\n") {
		text += "\n" // a name at the very end is otherwise taken for a value
	}
	// The first pass finds the references that would vanish, without a default like
	// the one in ${NAME:-x}. The second pass cannot warn about them any more.
	asked := map[string]bool{} // and whether there is such a variable
	_, err := dotenv.UnmarshalWithLookup(text, func(name string) (string, bool) {
		value, ok := lookup(name, known)
		asked[name] = ok
		return value, true
	})
	if err == nil {
		for name, found := range asked {
			quoted := regexp.QuoteMeta(name)
			mentioned := func(as string) bool { return regexp.MustCompile(as).MatchString(text) }
			switch { // a name alone on its line may be anything
			case !found && mentioned(`\$(`+quoted+`\b|\{`+quoted+`\})`):
				return nil, errReference
			case strings.ContainsAny(text, `'"`) && !mentioned(`\$\{?`+quoted):
				return nil, errSyntax // a name alone behind a value: A='1'B
			}
		}
		var values map[string]string
		values, err = dotenv.UnmarshalWithLookup(text, func(name string) (string, bool) { return lookup(name, known) })
		if err == nil {
			return values, nil
		}
	}
	// The parser has no error values for these.
	switch s := err.Error(); {
	case strings.Contains(s, "unterminated quoted value"):
		return nil, errOpenQuote
	case strings.Contains(s, "Invalid template"), strings.Contains(s, "required variable"):
		return nil, errReference
	}
	return nil, errSyntax
}

// lookup prefers the environment to the file, as Compose does.
func lookup(name string, known map[string]string) (string, bool) {
	if value, ok := os.LookupEnv(name); ok {
		return value, true
	}
	value, ok := known[name]
	return value, ok
}
