package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/infra-pki/infra-pki/tools/internal/dotenv"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

var env = command{
	summary: "make .env, or add the variables that it lacks",
	usage: `usage: pkictl env [--example FILE] [--dry-run] FILE

Makes FILE from the example, or adds the variables that the example has and FILE
lacks. A value in the example with "change_me" in it stands for a secret: one is
generated. Lines that FILE already has stay as they are, to the byte. FILE may be
read by its owner alone. No value is ever printed.

  --example FILE   default: .env.example beside FILE
  --dry-run        say which variables would be added

Examples:
  pkictl env .env
  pkictl env --example /usr/share/infra-pki/env /etc/infra-pki/.env
`,
	operands: []string{"FILE"},
	setup: func(fs *flag.FlagSet) work {
		example := fs.String("example", "", "")
		dryRun := fs.Bool("dry-run", false, "")
		return func(ctx context.Context, log *slog.Logger) error {
			path := fs.Arg(0)
			if *example == "" {
				*example = filepath.Join(filepath.Dir(path), ".env.example")
			}
			return writeEnv(ctx, *example, path, *dryRun, log)
		}
	},
}

const (
	placeholder = "change_me"
	secretBytes = 24
	envMode     = 0o600
)

// setting is one variable of the example.
type setting struct {
	name    string
	secret  bool
	text    string // its line or lines
	comment string // what stands above it
	before  string // everything between the previous setting and this one
}

func writeEnv(ctx context.Context, example, path string, dryRun bool, log *slog.Logger) error {
	settings, tail, err := readExample(example)
	if err != nil {
		return oneshot.WithExitCode(err, oneshot.ExitMisconfigured)
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return createEnv(ctx, settings, tail, path, dryRun, log)
	case err != nil:
		return fmt.Errorf("reading settings: %w", err)
	case !info.Mode().IsRegular():
		return oneshot.WithExitCode(fmt.Errorf("reading settings: %q is not a regular file", path), oneshot.ExitMisconfigured)
	}
	return completeEnv(ctx, settings, path, info, dryRun, log)
}

// readExample returns the settings of an example and what follows the last one.
func readExample(path string) ([]setting, string, error) {
	data, err := dotenv.ReadFile(path)
	if err != nil {
		return nil, "", err
	}
	statements, err := dotenv.Parse(data)
	if err != nil {
		return nil, "", fmt.Errorf("reading %q: %w", path, err)
	}
	var (
		settings []setting
		seen     = map[string]bool{}
		end      int
	)
	for _, s := range statements {
		names := slices.Collect(maps.Keys(s.Values))
		if len(names) != 1 || seen[names[0]] {
			return nil, "", fmt.Errorf("reading %q: line %d: it must set one variable, which no other line sets", path, s.Line)
		}
		seen[names[0]] = true
		settings = append(settings, setting{
			name:    names[0],
			secret:  isPlaceholder(s.Values[names[0]]),
			text:    strings.TrimSuffix(string(data[s.Start:s.End]), "\n") + "\n",
			comment: s.Comment,
			before:  string(data[end:s.Start]),
		})
		end = s.End
	}
	return settings, string(data[end:]), nil
}

func isPlaceholder(value string) bool { return strings.Contains(strings.ToLower(value), placeholder) }

// line is what FILE gets for the setting. Single quotes keep a value exact.
func (s setting) line() string {
	if !s.secret {
		return s.text
	}
	secret := make([]byte, secretBytes)
	_, _ = rand.Read(secret) // never fails: it ends the program instead (Go 1.24)
	return s.name + "='" + base64.RawURLEncoding.EncodeToString(secret) + "'\n"
}

func createEnv(ctx context.Context, settings []setting, tail, path string, dryRun bool, log *slog.Logger) error {
	var content strings.Builder
	for _, s := range settings {
		content.WriteString(s.before)
		content.WriteString(s.line())
	}
	content.WriteString(tail)
	if err := check([]byte(content.String()), nil, settings); err != nil {
		return fmt.Errorf("making %q: %w", path, err)
	}
	if dryRun {
		log.LogAttrs(ctx, slog.LevelInfo, "would be created", slog.String("file", path))
		report(ctx, settings, "would be added", log)
		return nil
	}
	// Two at once must not make two sets of secrets.
	if err := durable.CreateExclusive(path, []byte(content.String()), envMode); err != nil {
		return err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "created", slog.String("file", path))
	report(ctx, settings, "added", log)
	return nil
}

func completeEnv(ctx context.Context, settings []setting, path string, info fs.FileInfo, dryRun bool, log *slog.Logger) error {
	old, err := dotenv.ReadFile(path)
	if err != nil {
		return err
	}
	have, err := dotenv.Values(old)
	if err != nil {
		return oneshot.WithHint(oneshot.WithExitCode(fmt.Errorf("reading %q: %w", path, err), oneshot.ExitMisconfigured),
			"correct that line; nothing was changed")
	}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if isPlaceholder(have[name]) {
			log.LogAttrs(ctx, slog.LevelWarn, "placeholder left in", slog.String("file", path), slog.String("name", name))
		}
	}
	lacking := slices.DeleteFunc(slices.Clone(settings), func(s setting) bool {
		_, ok := have[s.name]
		return ok
	})
	if len(lacking) == 0 {
		return keepEnv(ctx, path, info, dryRun, log)
	}
	content := appendSettings(old, lacking)
	if err := check(content, have, lacking); err != nil {
		return fmt.Errorf("adding to %q: %w", path, err)
	}
	if dryRun {
		log.LogAttrs(ctx, slog.LevelInfo, "would be updated", slog.String("file", path))
		report(ctx, lacking, "would be added", log)
		return nil
	}
	outcome, err := durable.WriteIfChanged(path, content, envMode)
	if err != nil {
		return err
	}
	if err := keepOwner(path, info); err != nil {
		return err
	}
	log.LogAttrs(ctx, slog.LevelInfo, string(outcome), slog.String("file", path))
	report(ctx, lacking, "added", log)
	return nil
}

// keepEnv leaves a complete file alone, except that it takes the permission to read
// it from others.
func keepEnv(ctx context.Context, path string, info fs.FileInfo, dryRun bool, log *slog.Logger) error {
	if info.Mode().Perm()&^envMode != 0 && dryRun {
		log.LogAttrs(ctx, slog.LevelInfo, "would be closed to others", slog.String("file", path))
	} else if info.Mode().Perm()&^envMode != 0 {
		if err := os.Chmod(path, envMode); err != nil {
			return fmt.Errorf("closing %q to others: %w", path, err)
		}
		log.LogAttrs(ctx, slog.LevelInfo, "closed to others", slog.String("file", path))
	}
	log.LogAttrs(ctx, slog.LevelInfo, string(durable.Unchanged), slog.String("file", path))
	return nil
}

// appendSettings adds settings to the end of a file, a blank line before each
// paragraph. A comment is written once for neighbours that share it.
func appendSettings(old []byte, settings []setting) []byte {
	content := slices.Clone(old)
	if len(content) > 0 && !bytes.HasSuffix(content, []byte("\n")) {
		content = append(content, '\n')
	}
	for i, s := range settings {
		if i == 0 || s.comment != settings[i-1].comment {
			if len(content) > 0 {
				content = append(content, '\n')
			}
			content = append(content, s.comment...)
		}
		content = append(content, s.line()...)
	}
	return content
}

// check reads the new content back: each old value is as before, each new one there.
func check(content []byte, before map[string]string, added []setting) error {
	after, err := dotenv.Values(content)
	if err != nil {
		return err
	}
	for name, value := range before {
		if after[name] != value {
			return fmt.Errorf("the value of %s would change", name)
		}
	}
	for _, s := range added {
		if value, ok := after[s.name]; !ok || isPlaceholder(value) {
			return fmt.Errorf("%s would not be set", s.name)
		}
	}
	return nil
}

func report(ctx context.Context, settings []setting, outcome string, log *slog.Logger) {
	for _, s := range settings {
		value := "as in the example"
		if s.secret {
			value = "generated"
		}
		log.LogAttrs(ctx, slog.LevelInfo, outcome, slog.String("name", s.name), slog.String("value", value))
	}
}
