package oneshot

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestExecute(t *testing.T) {
	boom := errors.New("opening key: permission denied")
	tests := map[string]struct {
		err  error
		code int
		out  string
	}{
		"success says nothing and exits 0":               {nil, 0, ""},
		"help is success":                                {flag.ErrHelp, 0, ""},
		"a failure exits 1 and is named":                 {boom, 1, "p: error: opening key: permission denied\n"},
		"a hint follows the error":                       {WithHint(boom, "run as uid %d", 1000), 1, "p: error: opening key: permission denied\np: hint: run as uid 1000\n"},
		"an exit code is carried through wrapping":       {fmt.Errorf("checking: %w", WithExitCode(boom, ExitDrift)), 3, "p: error: checking: opening key: permission denied\n"},
		"the code of a command that was run is not ours": {fmt.Errorf("running it: %w", foreign{}), 1, "p: error: running it: exit status 7\n"},
		"joined problems get a line each":                {WithExitCode(errors.Join(boom, errors.New("two")), 2), 2, "p: error: opening key: permission denied\np: error: two\n"},
		"a text around joined problems is not lost":      {fmt.Errorf("first: %w", errors.Join(boom, errors.New("two"))), 1, "p: error: first: opening key: permission denied\ntwo\n"},
		"the same hint is given once":                    {errors.Join(WithHint(boom, "h"), WithHint(errors.New("two"), "h")), 1, "p: error: opening key: permission denied\np: error: two\np: hint: h\n"},
		"a wrong call exits 2 and points at the help":    {Usage(errors.New("unexpected argument \"x\"")), 2, "p: error: unexpected argument \"x\"\np: hint: --help shows the flags and examples\n"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			code := execute(t.Context(), "p", func(context.Context, []string, *slog.Logger) error { return tc.err }, nil, &out, "")
			require.Equal(t, tc.code, code)
			require.Equal(t, tc.out, out.String())
		})
	}
}

// foreign is like exec.ExitError.
type foreign struct{}

func (foreign) Error() string { return "exit status 7" }
func (foreign) ExitCode() int { return 7 }

func TestLogLines(t *testing.T) {
	tests := map[string]struct{ format, want string }{
		"text carries the program's name and no time": {"", "p: level=INFO msg=created file=ca.json\n"},
		"json is one object a line":                   {"json", `"msg":"created","program":"p","file":"ca.json"}`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			newLogger("p", &out, tc.format).LogAttrs(t.Context(), slog.LevelInfo, "created", slog.String("file", "ca.json"))
			require.Contains(t, out.String(), tc.want)
		})
	}
}
