// Command pkictl is the operator's program: one subcommand for each thing that an
// operator does and that is not the work of a service.
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

// command is a subcommand.
type command struct {
	summary  string   // one line for the list
	usage    string   // the whole help text: synopsis, flags, examples
	operands []string // what must follow the flags
	// setup declares the flags and returns the work, which runs when they are read.
	setup func(fs *flag.FlagSet) work
}

type work func(ctx context.Context, log *slog.Logger) error

var commands = map[string]command{
	"acme eab add":    eabAdd,
	"acme eab list":   eabList,
	"acme eab revoke": eabRevoke,
	"backup create":   backupCreate,
	"backup files":    backupFiles,
	"backup journal":  backupJournal,
	"backup keygen":   backupKeygen,
	"backup record":   backupRecord,
	"backup store":    backupStore,
	"backup verify":   backupVerify,
	"ca status":       caStatus,
	"env":             env,
	"join":            join,
	"leave":           leave,
	"probe":           probe,
	"provisioners":    provisioners,
	"renew":           renew,
	"restore":         restore,
	"revoke":          revoke,
	"status":          status,
	"token":           token,
	"trust install":   trustInstall,
	"trust status":    trustStatus,
	"trust uninstall": trustUninstall,
}

func main() { oneshot.Main("pkictl", run) }

func run(ctx context.Context, args []string, log *slog.Logger) error {
	if len(args) == 0 {
		return oneshot.Usage(errors.New("missing subcommand"))
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		fmt.Print(help())
		return nil
	}
	name, rest, err := find(args)
	if err != nil {
		return oneshot.Usage(err)
	}
	cmd := commands[name]
	fs := flag.NewFlagSet("pkictl "+name, flag.ContinueOnError)
	do := cmd.setup(fs)
	if err := oneshot.Parse(fs, rest, cmd.usage, cmd.operands...); err != nil {
		return err
	}
	return do(ctx, log)
}

// find splits args after the name of a subcommand, which may be of several words.
func find(args []string) (name string, rest []string, err error) {
	var words []string
	for _, word := range args {
		if strings.HasPrefix(word, "-") {
			break
		}
		words = append(words, word)
		name = strings.Join(words, " ")
		if _, ok := commands[name]; ok {
			return name, args[len(words):], nil
		}
		if !slices.ContainsFunc(slices.Collect(maps.Keys(commands)), func(known string) bool { return strings.HasPrefix(known, name+" ") }) {
			return "", nil, fmt.Errorf("unknown subcommand %q", name)
		}
	}
	return "", nil, fmt.Errorf("%q is the beginning of a subcommand", name)
}

func help() string {
	width := 0
	for name := range commands {
		width = max(width, len(name))
	}
	var b strings.Builder
	b.WriteString("usage: pkictl SUBCOMMAND [flags] [arguments]\n\n")
	for _, name := range slices.Sorted(maps.Keys(commands)) {
		fmt.Fprintf(&b, "  %-*s  %s\n", width, name, commands[name].summary)
	}
	b.WriteString("\n\"pkictl SUBCOMMAND --help\" shows flags and examples.\n")
	return b.String()
}
