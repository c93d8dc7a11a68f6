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
	"env":   env,
	"probe": probe,
}

func main() { oneshot.Main("pkictl", run) }

func run(ctx context.Context, args []string, log *slog.Logger) error {
	if len(args) == 0 {
		return oneshot.Usage(errors.New("missing subcommand"))
	}
	name, rest := args[0], args[1:]
	switch name {
	case "help", "-h", "-help", "--help":
		fmt.Print(help())
		return nil
	}
	cmd, ok := commands[name]
	if !ok {
		return oneshot.Usage(fmt.Errorf("unknown subcommand %q", name))
	}
	fs := flag.NewFlagSet("pkictl "+name, flag.ContinueOnError)
	do := cmd.setup(fs)
	if err := oneshot.Parse(fs, rest, cmd.usage, cmd.operands...); err != nil {
		return err
	}
	return do(ctx, log)
}

func help() string {
	var b strings.Builder
	b.WriteString("usage: pkictl SUBCOMMAND [flags] [arguments]\n\n")
	for _, name := range slices.Sorted(maps.Keys(commands)) {
		fmt.Fprintf(&b, "  %-8s %s\n", name, commands[name].summary)
	}
	b.WriteString("\n\"pkictl SUBCOMMAND --help\" shows flags and examples.\n")
	return b.String()
}
