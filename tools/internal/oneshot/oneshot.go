// Package oneshot is the shape that every program here shares: it runs once, says
// what it did on standard error, and ends with an exit code that means something.
package oneshot

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Exit codes of every program.
const (
	ExitDone          = 0
	ExitFailed        = 1
	ExitMisconfigured = 2
	ExitDrift         = 3
)

// Run is the work of a program. It logs to log, reads args, and must not exit by itself.
type Run func(ctx context.Context, args []string, log *slog.Logger) error

// Main runs a program under its name and exits. SIGINT and SIGTERM cancel the
// context. A failure ends with the lines "NAME: error: …" and, where there is a
// way out, "NAME: hint: …"; joined errors get a line each.
func Main(name string, run Run) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := execute(ctx, name, run, os.Args[1:], os.Stderr, os.Getenv("LOG_FORMAT"))
	stop()
	os.Exit(code)
}

func execute(ctx context.Context, name string, run Run, args []string, stderr io.Writer, format string) int {
	err := run(ctx, args, newLogger(name, stderr, format))
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return ExitDone
	}
	var last strings.Builder
	for _, e := range flatten(err) {
		last.WriteString(name + ": error: " + e.Error() + "\n")
	}
	for _, h := range Hints(err) {
		last.WriteString(name + ": hint: " + h + "\n")
	}
	_, _ = io.WriteString(stderr, last.String()) // the exit code still tells
	var coded *exitError                         // not that of a command that was run: exec.ExitError has a code as well
	if errors.As(err, &coded) {
		return coded.code
	}
	return ExitFailed
}

// Parse reads flags and then exactly the operands that are named, which fs.Arg
// returns. usage is the whole help text; it is printed for -h and --help.
func Parse(fs *flag.FlagSet, args []string, usage string, operands ...string) error {
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Print(usage)
			return err
		}
		return Usage(err)
	}
	switch n := fs.NArg(); {
	case n > len(operands):
		return Usage(fmt.Errorf("unexpected argument %q", fs.Arg(len(operands))))
	case n < len(operands):
		return Usage(fmt.Errorf("missing argument %s", operands[n]))
	}
	return nil
}

// Usage marks err as a wrong call, exit code 2.
func Usage(err error) error {
	return WithHint(WithExitCode(err, ExitMisconfigured), "--help shows the flags and examples")
}

// WithHint adds the way out to err.
func WithHint(err error, format string, args ...any) error {
	return &hinted{err: err, hint: fmt.Sprintf(format, args...)}
}

// WithExitCode makes the program end with code if it ends with err.
func WithExitCode(err error, code int) error { return &exitError{err: err, code: code} }

type hinted struct {
	err  error
	hint string
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }

type exitError struct {
	err  error
	code int
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }
func (e *exitError) ExitCode() int { return e.code }

// flatten opens joined errors, so that each problem gets its own line. An error
// that wraps a join with a text of its own stays whole.
func flatten(err error) []error {
	switch e := err.(type) { //nolint:errorlint // each layer is opened on purpose, errors.As would skip one
	case *hinted:
		return flatten(e.err)
	case *exitError:
		return flatten(e.err)
	case interface{ Unwrap() []error }:
		inner := e.Unwrap()
		if errors.Join(inner...).Error() != err.Error() {
			return []error{err}
		}
		var all []error
		for _, one := range inner {
			all = append(all, flatten(one)...)
		}
		return all
	}
	return []error{err}
}

// Hints collects the hints of err and of everything that it wraps, each once.
func Hints(err error) []string {
	var found []string
	seen := map[string]bool{}
	var walk func(error)
	walk = func(err error) {
		if h, ok := err.(*hinted); ok && !seen[h.hint] { //nolint:errorlint // walks the layers itself
			seen[h.hint] = true
			found = append(found, h.hint)
		}
		switch e := err.(type) { //nolint:errorlint // walks the layers itself
		case interface{ Unwrap() error }:
			if inner := e.Unwrap(); inner != nil {
				walk(inner)
			}
		case interface{ Unwrap() []error }:
			for _, inner := range e.Unwrap() {
				walk(inner)
			}
		}
	}
	walk(err)
	return found
}

func newLogger(name string, w io.Writer, format string) *slog.Logger {
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, nil)).With(slog.String("program", name))
	}
	// Docker stamps each line with the time; a second stamp only hides the words.
	drop := func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	return slog.New(slog.NewTextHandler(&prefixer{w: w, prefix: name + ": "}, &slog.HandlerOptions{ReplaceAttr: drop}))
}

// prefixer writes prefix before each record; slog hands over one record a call.
type prefixer struct {
	w      io.Writer
	prefix string
}

func (p *prefixer) Write(line []byte) (int, error) {
	// One write a record, so that lines of two goroutines never mix.
	if _, err := p.w.Write(append([]byte(p.prefix), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}
