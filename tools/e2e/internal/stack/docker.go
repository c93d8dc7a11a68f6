package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const (
	// Of every project and network namespace of these tests; the id of the process
	// that made it comes next.
	prefix = "infra-pki-e2e-"
	// On containers that are not Compose's.
	label        = "infra-pki.e2e"
	projectLabel = "com.docker.compose.project"

	clientImage  = "infra-pki/e2e-client:local"
	machineImage = "infra-pki/e2e-host:local"
	desktopImage = "infra-pki/e2e-desktop:local"
	toolsImage   = "infra-pki/tools:local"

	// Longer than any single command takes, the build of an image with a browser included.
	patience = 10 * time.Minute
)

// Result is what a command did.
type Result struct {
	Stdout, Stderr string
	Code           int
	Took           time.Duration

	args   []string
	redact func(string) string
}

// Output is both streams.
func (r Result) Output() string { return r.Stdout + r.Stderr }

func (r Result) String() string {
	text := fmt.Sprintf("%s: exit code %d\n%s", strings.Join(r.args, " "), r.Code, r.Output())
	if r.redact != nil {
		text = r.redact(text)
	}
	return text
}

// OK demands exit code 0.
func (r Result) OK(tb testing.TB) Result {
	tb.Helper()
	return r.Exits(tb, 0)
}

// Exits demands an exit code.
func (r Result) Exits(tb testing.TB, code int) Result {
	tb.Helper()
	if r.Code != code {
		require.Failf(tb, "wrong exit code", "want %d: %s", code, r)
	}
	return r
}

type command struct {
	args  []string
	env   []string // nil: this process's
	stdin io.Reader
}

// run runs a command to its end, whatever exit code that has.
func run(ctx context.Context, c command) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.args[0], c.args[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Env, cmd.Stdin = c.env, c.stdin
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	begin := time.Now()
	err := cmd.Run()
	r := Result{Stdout: stdout.String(), Stderr: stderr.String(), Took: time.Since(begin), args: c.args}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && ctx.Err() == nil {
		r.Code = exit.ExitCode()
		return r, nil
	}
	if err != nil {
		err = fmt.Errorf("running %q: %w; it said: %s", strings.Join(c.args, " "), err, r.Output())
	}
	return r, err
}

// Docker runs "docker …".
func Docker(tb testing.TB, args ...string) Result {
	tb.Helper()
	r, err := run(working, command{args: append([]string{"docker"}, args...)})
	require.NoError(tb, err)
	return r
}

func docker(args ...string) (string, error) {
	r, err := run(context.Background(), command{args: append([]string{"docker"}, args...)})
	if err == nil && r.Code != 0 {
		err = errors.New(r.String())
	}
	return strings.TrimSpace(r.Stdout), err
}

// missing skips a test that cannot run here; in CI that is a failure.
func missing(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv("CI") != "" {
		tb.Fatalf(format, args...)
	}
	tb.Skipf(format, args...)
}

var need = sync.OnceValue(func() error {
	if _, err := docker("compose", "version"); err != nil {
		return fmt.Errorf("Docker with Compose v2 is needed: %w", err)
	}
	if _, err := docker("image", "inspect", toolsImage, "infra-pki/caddy:local"); err != nil {
		return errors.New("the images are missing: make images")
	}
	used.Store(true)
	sweep()
	return nil
})

// used says that there may be something to remove.
var used atomic.Bool

// Need skips the test where there is no Docker or no image.
func Need(tb testing.TB) {
	tb.Helper()
	if err := need(); err != nil {
		missing(tb, "%v", err)
	}
}

// NeedRoot skips the test of an ordinary user.
func NeedRoot(tb testing.TB, why string) {
	tb.Helper()
	if os.Geteuid() != 0 {
		missing(tb, "root is needed, %s: sudo make e2e", why)
	}
}

// working ends when the tests are interrupted, and with it the commands that they run.
var working, interrupt = context.WithCancel(context.Background())

// Main runs the tests and leaves nothing behind, whether they end, panic in a test
// or are interrupted. What a killed run left is removed by the next one.
func Main(m *testing.M) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		interrupt()
		time.Sleep(time.Second) // for Compose, to stop what it does
		_ = leave()             // there is nobody left to tell
		os.Exit(130)
	}()
	code := m.Run()
	if err := leave(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// leave removes everything that this process made.
func leave() error {
	if !used.Load() {
		return nil
	}
	return removeWhere(func(pid int) bool { return pid == os.Getpid() })
}

// sweep removes what processes that no longer live have left.
func sweep() {
	_ = removeWhere(func(pid int) bool { // another sweep may be at it
		return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
	})
}

var projectName = regexp.MustCompile(prefix + `(\d+)-\w+`)

// removeWhere removes the projects and namespaces whose maker is chosen.
func removeWhere(chosen func(pid int) bool) error {
	var names strings.Builder
	for _, list := range [][]string{
		{"ps", "-a", "--format", `{{.Label "` + projectLabel + `"}} {{.Label "` + label + `"}}`},
		{"network", "ls", "--format", "{{.Name}}"},
		{"volume", "ls", "--format", "{{.Name}}"},
	} {
		out, err := docker(list...)
		if err != nil {
			return nil //nolint:nilerr // without Docker there is nothing to remove
		}
		names.WriteString(out + "\n")
	}
	directories, err := filepath.Glob(directory(prefix + "*"))
	if err != nil {
		return err
	}
	names.WriteString(strings.Join(directories, "\n"))
	var problems []error
	done := map[string]bool{}
	for _, match := range projectName.FindAllStringSubmatch(names.String(), -1) {
		pid, _ := strconv.Atoi(match[1])
		project := strings.SplitN(match[0], "_", 2)[0]
		if !done[project] && chosen(pid) {
			done[project] = true
			problems = append(problems, removeProject(project))
		}
	}
	problems = append(problems, removeHosts(chosen))
	return errors.Join(problems...)
}

// removeProject does what "docker compose down -v --remove-orphans" does, also where
// there is no valid .env.
func removeProject(project string) error {
	for _, l := range []string{label, projectLabel} {
		if err := removeAll([]string{"ps", "-aq", "--filter", "label=" + l + "=" + project}, "rm", "-f", "-v"); err != nil {
			return err
		}
	}
	filter := "label=" + projectLabel + "=" + project
	return errors.Join(
		removeAll([]string{"network", "ls", "-q", "--filter", filter}, "network", "rm"),
		removeAll([]string{"volume", "ls", "-q", "--filter", filter}, "volume", "rm", "-f"),
		os.RemoveAll(directory(project)),
	)
}

func removeAll(list []string, remove ...string) error {
	out, err := docker(list...)
	if err != nil || out == "" {
		return err
	}
	_, err = docker(append(remove, strings.Fields(out)...)...)
	return err
}

// Container is one of a project, as Docker knows it.
type Container struct {
	ID      string `json:"Id"`
	Name    string
	Created string
	State   struct {
		Status     string
		Pid        int
		ExitCode   int
		StartedAt  time.Time
		FinishedAt time.Time
		Health     *struct{ Status string }
	}
	RestartCount int
	Config       struct{ Labels map[string]string }
	HostConfig   struct{ NetworkMode string }
}

// Service is the name in the compose file, with the number of the replica behind it
// from the second on: "step-ca", "step-ca/2".
func (c Container) Service() string {
	name := c.Config.Labels["com.docker.compose.service"]
	if number := c.Config.Labels["com.docker.compose.container-number"]; number != "1" {
		name += "/" + number
	}
	return name
}

// Ran tells whether the container was ever started.
func (c Container) Ran() bool { return c.State.StartedAt.Year() > 1 }

// Containers of the stack by service, also those that have ended.
func (s *Stack) Containers() map[string]Container {
	s.t.Helper()
	found := map[string]Container{}
	if raw := s.Inspect(); raw != "" {
		var list []Container
		require.NoError(s.t, json.Unmarshal([]byte(raw), &list))
		for _, c := range list {
			found[c.Service()] = c
		}
	}
	return found
}

// Inspect is what "docker inspect" says about all containers of the stack, "" if
// there is none.
func (s *Stack) Inspect() string {
	s.t.Helper()
	ids := strings.Fields(Docker(s.t, "ps", "-aq", "--no-trunc", "--filter", "label="+projectLabel+"="+s.Project).OK(s.t).Stdout)
	if len(ids) == 0 {
		return ""
	}
	return Docker(s.t, append([]string{"inspect"}, ids...)...).OK(s.t).Stdout
}
