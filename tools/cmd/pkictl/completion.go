package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

var completion = command{
	summary: "print a script that completes subcommands and flags",
	usage: `usage: pkictl completion bash|zsh|fish

Prints a script for one of the shells, which completes subcommands, flags and file names.

Examples:
  pkictl completion bash > /etc/bash_completion.d/pkictl
  pkictl completion zsh > /usr/local/share/zsh/site-functions/_pkictl
  pkictl completion fish > ~/.config/fish/completions/pkictl.fish
`,
	operands: []string{"SHELL"},
	setup: func(fs *flag.FlagSet) work {
		return func(context.Context, *slog.Logger) error {
			script, ok := map[string]func() string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}[fs.Arg(0)]
			if !ok {
				return oneshot.Usage(fmt.Errorf("there is no completion for %q; it may be bash, zsh or fish", fs.Arg(0)))
			}
			if _, err := fmt.Print(script()); err != nil {
				return errors.New("printing the script: " + err.Error())
			}
			return nil
		}
	},
}

// It is not in the literal: it reads the map.
func init() { commands["completion"] = completion }

// next is what may follow the beginning of a subcommand, by that beginning.
func next() map[string][]string {
	words := map[string][]string{}
	for name := range commands {
		before := ""
		for word := range strings.SplitSeq(name, " ") {
			if !slices.Contains(words[before], word) {
				words[before] = append(words[before], word)
			}
			before = strings.TrimSpace(before + " " + word)
		}
	}
	words["completion"] = []string{"bash", "fish", "zsh"}
	return words
}

// flagsOf are those of a subcommand; value says which of them take one.
func flagsOf(name string) (names []string, value map[string]bool) {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	commands[name].setup(fs)
	value = map[string]bool{}
	fs.VisitAll(func(f *flag.Flag) {
		b, ok := f.Value.(interface{ IsBoolFlag() bool })
		names, value[f.Name] = append(names, f.Name), !ok || !b.IsBoolFlag()
	})
	return append(names, "help"), value
}

// cases are the branches of a case statement, in the words that bash and zsh share:
// what has been typed decides what may come next. File names come from the shell.
func cases() string {
	var b strings.Builder
	for name, words := range sorted(next()) {
		fmt.Fprintf(&b, "\t%q) next=%q ;;\n", strings.TrimLeft(name+" ", " "), strings.Join(slices.Sorted(slices.Values(words)), " "))
	}
	for name := range sorted(commands) {
		names, _ := flagsOf(name)
		fmt.Fprintf(&b, "\t%q*) [[ $word == -* ]] && next=%q ;;\n", name+" ", "--"+strings.Join(names, " --"))
	}
	return b.String()
}

func sorted[V any](m map[string]V) func(func(string, V) bool) {
	return func(yield func(string, V) bool) {
		for _, key := range slices.Sorted(maps.Keys(m)) {
			if !yield(key, m[key]) {
				return
			}
		}
	}
}

func bashCompletion() string {
	return `_pkictl() {
	local said="${COMP_WORDS[*]:1:COMP_CWORD-1} " word=${COMP_WORDS[COMP_CWORD]} next=
	case "${said# }" in
` + cases() + `	esac
	mapfile -t COMPREPLY < <(compgen -W "$next" -- "$word")
}
complete -o default -F _pkictl pkictl
`
}

func zshCompletion() string {
	return `#compdef pkictl
_pkictl() {
	local said="${words[2,CURRENT-1]} " word=${words[CURRENT]} next=
	case "${said# }" in
` + cases() + `	esac
	if [[ -n $next ]]; then compadd -- ${=next}; else _files; fi
}
compdef _pkictl pkictl
`
}

func fishCompletion() string {
	var b strings.Builder
	b.WriteString(`function __pkictl_said
	set -l words (commandline -opc)
	string join ' ' -- $words[2..]
end
`)
	for name, words := range sorted(next()) {
		fmt.Fprintf(&b, "complete -c pkictl -f -n 'test \"$(__pkictl_said)\" = \"%s\"' -a '%s'\n", name, strings.Join(slices.Sorted(slices.Values(words)), " "))
	}
	for name := range sorted(commands) {
		names, value := flagsOf(name)
		for _, f := range names {
			required := ""
			if value[f] {
				required = " -r"
			}
			fmt.Fprintf(&b, "complete -c pkictl -n 'string match -q -- \"%s *\" \"$(__pkictl_said) \"' -l %s%s\n", name, f, required)
		}
	}
	return b.String()
}
