// Package schedule makes a host run "pkictl renew" every quarter of an hour: as a
// systemd timer, or through cron where no systemd runs.
package schedule

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/host"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// Kind is what runs "pkictl renew".
type Kind string

// Kinds.
const (
	Systemd Kind = "systemd" // a service and a timer
	Cron    Kind = "cron"    // a line in /etc/cron.d, or a script in /etc/periodic (Alpine)
)

const (
	timer   = "infra-pki-renew.timer"
	service = "infra-pki-renew.service"
	failed  = "infra-pki-renew-failed.service"

	units    = "/etc/systemd/system"
	stamp    = "/var/lib/systemd/timers/stamp-" + timer // of Persistent=
	cronLine = "/etc/cron.d/infra-pki-renew"
	periodic = "/etc/periodic/15min/infra-pki-renew"
)

var (
	//go:embed infra-pki-renew.timer
	timerText string
	//go:embed infra-pki-renew.service
	serviceText string
	//go:embed infra-pki-renew-failed.service
	failedText string
)

// Schedule is how often and with what.
type Schedule struct {
	Binary string // pkictl, an absolute path
	Dir    string // of the host's record; host.Dir if empty
	Root   string // of the file system; "" for the machine's own
	DryRun bool   // say what would be done
}

// State is what a host has.
type State struct {
	Kind     Kind     `json:"kind"` // empty if there is none
	Active   bool     `json:"active"`
	Problems []string `json:"problems,omitempty"`
}

// file is one that Install writes.
type file struct {
	path, content string
	mode          fs.FileMode
}

// Install writes the units and starts the timer, or writes the line for cron. A
// second run changes nothing. It returns what runs renew from now on.
func (s Schedule) Install(ctx context.Context, log *slog.Logger) (Kind, error) {
	if err := s.check(); err != nil {
		return "", err
	}
	kind, files := s.plan()
	if kind == "" {
		return "", oneshot.WithHint(errors.New("scheduling renewal: no systemd runs here, and there is neither /etc/cron.d nor /etc/periodic/15min"),
			`install cron, or have %q run every 15 minutes in another way`, s.command("renew"))
	}
	changed := false
	for _, f := range files {
		outcome, err := s.write(f)
		if err != nil {
			return "", fmt.Errorf("scheduling renewal: %w", err)
		}
		changed = changed || outcome != durable.Unchanged
		s.say(ctx, log, outcome, f.path)
	}
	if kind == Cron {
		return kind, nil // cron looks at its directories every minute
	}
	if changed && !s.DryRun {
		if err := systemctl(ctx, "daemon-reload"); err != nil {
			return "", fmt.Errorf("scheduling renewal: %w", err)
		}
	}
	outcome := durable.Unchanged
	if len(timerProblems(ctx)) > 0 {
		outcome = durable.Created
		if !s.DryRun {
			if err := systemctl(ctx, "enable", "--now", timer); err != nil {
				return "", fmt.Errorf("scheduling renewal: %w", err)
			}
		}
	}
	s.say(ctx, log, outcome, timer)
	return kind, nil
}

// Remove takes away what Install made, of either kind.
func (s Schedule) Remove(ctx context.Context, log *slog.Logger) error {
	hadUnits := s.exists(filepath.Join(units, timer))
	if hadUnits && s.booted() && !s.DryRun {
		if err := systemctl(ctx, "disable", "--now", timer); err != nil {
			return fmt.Errorf("ending the schedule of renewal: %w", err)
		}
	}
	for _, path := range []string{
		filepath.Join(units, timer), filepath.Join(units, service), filepath.Join(units, failed),
		filepath.Join(units, "timers.target.wants", timer), stamp, cronLine, periodic,
	} {
		if !s.exists(path) {
			continue
		}
		if !s.DryRun {
			if err := errors.Join(durable.Sweep(s.Root+path), os.Remove(s.Root+path)); err != nil {
				return fmt.Errorf("ending the schedule of renewal: %w", err)
			}
		}
		s.say(ctx, log, durable.Removed, path)
	}
	if hadUnits && s.booted() && !s.DryRun {
		if err := systemctl(ctx, "daemon-reload"); err != nil {
			return fmt.Errorf("ending the schedule of renewal: %w", err)
		}
		_ = systemctl(ctx, "reset-failed", service, failed) // an error if none of them had failed
	}
	return nil
}

// State says what is installed and whether it works.
func (s Schedule) State(ctx context.Context) State {
	var st State
	switch {
	case s.exists(filepath.Join(units, timer)) && s.booted():
		st.Kind = Systemd
		st.Problems = timerProblems(ctx)
	case s.exists(cronLine), s.exists(periodic):
		st.Kind = Cron
		if !runs("cron", "crond") {
			st.Problems = []string{"no cron daemon runs"}
		}
	default:
		st.Problems = []string{"nothing runs renew"}
	}
	st.Active = len(st.Problems) == 0
	return st
}

// booted tells whether systemd is the init system, as sd_booted(3) does.
func (s Schedule) booted() bool { return s.exists("/run/systemd/system") }

func (s Schedule) exists(path string) bool {
	_, err := os.Lstat(s.Root + path)
	return err == nil
}

// plain has no character that systemd or cron gives a meaning, "%" first of all.
var plain = regexp.MustCompile(`^/[A-Za-z0-9._/+@-]+$`)

func (s Schedule) check() error {
	var problems []error
	for _, path := range []string{s.Binary, s.Dir} {
		if path != "" && !plain.MatchString(path) {
			problems = append(problems, fmt.Errorf("scheduling renewal: %q is not an absolute path of letters, digits and ._/+@-; a good one: /usr/local/bin/pkictl", path))
		}
	}
	return errors.Join(problems...)
}

func (s Schedule) command(words ...string) string {
	if s.Dir != "" && s.Dir != host.Dir {
		words = append(words, "--dir", s.Dir)
	}
	return strings.Join(append([]string{s.Binary}, words...), " ")
}

// plan is what this host can run it with, and the files of that.
func (s Schedule) plan() (Kind, []file) {
	// Cron mails what a job says, and there is nothing to say most of the time.
	quietly := s.command("renew", "--quiet", "--jitter", "10m")
	switch {
	case s.booted():
		fill := strings.NewReplacer("@RENEW@", s.command("renew"), "@STATUS@", s.command("status"))
		return Systemd, []file{
			{filepath.Join(units, failed), fill.Replace(failedText), 0o644},
			{filepath.Join(units, service), fill.Replace(serviceText), 0o644},
			{filepath.Join(units, timer), fill.Replace(timerText), 0o644},
		}
	case s.exists(filepath.Dir(cronLine)):
		return Cron, []file{{cronLine, "# Written by pkictl: renews the certificates that are past two thirds of their life.\n" +
			"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n" +
			"*/15 * * * * root " + quietly + "\n", 0o644}}
	case s.exists(filepath.Dir(periodic)):
		// In the background: the other scripts of the directory wait for this one.
		return Cron, []file{{periodic, "#!/bin/sh\n# Written by pkictl: renews the certificates that are past two thirds of their life.\n" +
			quietly + " &\n", 0o755}}
	}
	return "", nil
}

func (s Schedule) write(f file) (durable.Outcome, error) {
	if s.DryRun {
		return durable.Compare(s.Root+f.path, []byte(f.content), f.mode)
	}
	return durable.WriteIfChanged(s.Root+f.path, []byte(f.content), f.mode)
}

func (s Schedule) say(ctx context.Context, log *slog.Logger, outcome durable.Outcome, name string) {
	message := string(outcome)
	if s.DryRun && outcome != durable.Unchanged {
		message = "would be " + message
	}
	log.LogAttrs(ctx, slog.LevelInfo, message, slog.String("schedule", name))
}

func timerProblems(ctx context.Context) []string {
	var problems []string
	if err := systemctl(ctx, "is-enabled", "--quiet", timer); err != nil {
		problems = append(problems, timer+" is not enabled")
	}
	if err := systemctl(ctx, "is-active", "--quiet", timer); err != nil {
		problems = append(problems, timer+" is not active")
	}
	return problems
}

func systemctl(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	said, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("running systemctl %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(said))
	}
	return nil
}

// runs tells whether a process of one of these names runs.
func runs(names ...string) bool {
	found, _ := filepath.Glob("/proc/[0-9]*/comm") // the pattern is good
	return slices.ContainsFunc(found, func(path string) bool {
		name, err := os.ReadFile(path)
		return err == nil && slices.Contains(names, strings.TrimSpace(string(name))) // it may have ended
	})
}
