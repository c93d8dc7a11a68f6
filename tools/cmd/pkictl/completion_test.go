package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The shells themselves run the scripts. zsh offers what compadd is given, and that can
// be seen only on a terminal: here it is printed.
func TestCompletion(t *testing.T) {
	shells := map[string]struct {
		script func() string
		ask    string // with the words typed as $1 and the number of the last one as $2
	}{
		"bash": {bashCompletion, `source ./script
			complete -p pkictl | grep -qx -- 'complete -o default -F _pkictl pkictl'
			IFS=' ' read -ra COMP_WORDS <<<"$1"; COMP_CWORD=$2
			_pkictl; printf '%s\n' "${COMPREPLY[@]}"`},
		"zsh": {zshCompletion, `compdef() { [[ "$*" == "_pkictl pkictl" ]] }
			compadd() { shift; for w; do [[ $w == ${words[CURRENT]}* ]] && print -r -- $w; done; true }
			_files() { true }
			source ./script
			words=("${(@s: :)1}"); CURRENT=$(( $2 + 1 ))
			_pkictl`},
		"fish": {fishCompletion, `source ./script; complete -C $argv[1]`},
	}
	tests := map[string]struct {
		typed string
		want  []string
	}{
		"the beginning of a subcommand":          {"pkictl rev", []string{"revoke"}},
		"a subcommand of several words":          {"pkictl acme eab ", []string{"add", "list", "revoke"}},
		"flags":                                  {"pkictl status --", []string{"--dir", "--help", "--json", "--state"}},
		"flags after others":                     {"pkictl renew --force --d", []string{"--dir", "--dry-run"}},
		"flags of a subcommand of several words": {"pkictl acme eab add --r", []string{"--reference"}},
		"shells":                                 {"pkictl completion f", []string{"fish"}},
		"nothing after an unknown subcommand":    {"pkictl nothing --", nil},
	}
	for shell, tc := range shells {
		t.Run(shell, func(t *testing.T) {
			if _, err := exec.LookPath(shell); err != nil {
				advice := shell + " is missing: apt-get install " + shell
				if os.Getenv("CI") != "" {
					t.Fatal(advice)
				}
				t.Skip(advice)
			}
			dir := t.TempDir()
			require.NoError(t, os.WriteFile(filepath.Join(dir, "script"), []byte(tc.script()), 0o600))
			ask := filepath.Join(dir, "ask")
			require.NoError(t, os.WriteFile(ask, []byte(tc.ask), 0o600))
			for name, typed := range tests {
				t.Run(name, func(t *testing.T) {
					cmd := exec.CommandContext(t.Context(), shell, ask, typed.typed, string(rune('0'+strings.Count(typed.typed, " ")))) //nolint:gosec // G204: the shells above
					cmd.Dir = dir
					cmd.Env = append(os.Environ(), "HOME="+dir)
					out, err := cmd.CombinedOutput()
					require.NoError(t, err, string(out))
					var got []string
					for line := range strings.Lines(string(out)) {
						if word, _, _ := strings.Cut(strings.TrimSpace(line), "\t"); word != "" {
							got = append(got, word)
						}
					}
					require.ElementsMatch(t, typed.want, got)
				})
			}
		})
	}
}
