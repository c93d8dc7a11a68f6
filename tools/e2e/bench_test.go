package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// BenchmarkStack measures one stack from nothing and prints Markdown tables, as
// they stand in BENCHMARKS.md. Nothing is asserted: times depend on the machine.
func BenchmarkStack(b *testing.B) {
	s := stack.New(b, nil)
	first := s.Up().Took
	firstInit := inContainer(s, "provisioner-init")
	migrate := inContainer(s, "db-migrate")
	again := s.Up().Took
	secondInit := inContainer(s, "provisioner-init")
	s.Compose("stop", "--timeout", "10").OK(b)
	restart := s.Up().Took
	b.ReportMetric(first.Seconds(), "s/first-up")
	b.ReportMetric(again.Seconds(), "s/second-up")
	b.ReportMetric(0, "ns/op") // there is one round

	var out strings.Builder
	fmt.Fprintf(&out, "\n%s\n", machine(b))
	table := func(head ...string) {
		fmt.Fprintf(&out, "\n| %s |\n|%s\n", strings.Join(head, " | "), strings.Repeat("---|", len(head)))
	}
	table("time", "seconds")
	for _, row := range []struct {
		what string
		took time.Duration
	}{
		{"`docker compose up -d --wait` from nothing to healthy", first},
		{"the same on a running stack", again},
		{"the same after `docker compose stop`", restart},
		{"`db-migrate`, first run, in its container", migrate},
		{"`provisioner-init`, first run, in its container", firstInit},
		{"`provisioner-init`, second run, in its container", secondInit},
	} {
		fmt.Fprintf(&out, "| %s | %.2f |\n", row.what, row.took.Seconds())
	}

	table("container", "memory", "processes")
	for _, name := range staying {
		line := stack.Docker(b, "stats", "--no-stream", "--format", "{{.MemUsage}}|{{.PIDs}}", s.Containers()[name].ID).OK(b).Stdout
		usage, pids, _ := strings.Cut(strings.TrimSpace(line), "|")
		memory, _, _ := strings.Cut(usage, " / ")
		fmt.Fprintf(&out, "| %s | %s | %s |\n", name, memory, pids)
	}

	table("image", "MB")
	for _, image := range strings.Fields(s.Compose("config", "--images").OK(b).Stdout) {
		if row := imageRow(b, image); !strings.Contains(out.String(), row) {
			out.WriteString(row)
		}
	}
	fmt.Println(out.String())
}

func imageRow(b *testing.B, image string) string {
	b.Helper()
	size, err := strconv.ParseFloat(strings.TrimSpace(stack.Docker(b, "image", "inspect", "--format", "{{.Size}}", image).OK(b).Stdout), 64)
	require.NoError(b, err)
	note := ""
	if builtHere(b, image) {
		note = " (built by tools/airgap)"
	}
	return fmt.Sprintf("| %s%s | %.0f |\n", image, note, size/1e6)
}

// builtHere tells whether an image, or that of a container, is a look-alike.
func builtHere(tb testing.TB, object string) bool {
	tb.Helper()
	return stack.Docker(tb, "inspect", "--format", `{{index .Config.Labels "infra-pki.look-alike"}}`, object).OK(tb).Stdout == "true\n"
}

// inContainer is how long the last run of a one-shot has taken: from the start of
// its process to the end of its container.
func inContainer(s *stack.Stack, service string) time.Duration {
	state := s.Containers()[service].State
	return state.FinishedAt.Sub(state.StartedAt)
}

func machine(b *testing.B) string {
	b.Helper()
	field := func(file, name string) string {
		data, err := os.ReadFile(file)
		require.NoError(b, err)
		for line := range strings.Lines(string(data)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
				return strings.TrimSpace(value)
			}
		}
		return "unknown"
	}
	kernel, err := exec.CommandContext(b.Context(), "uname", "-sr").Output()
	require.NoError(b, err)
	memory, err := strconv.Atoi(strings.Fields(field("/proc/meminfo", "MemTotal"))[0])
	require.NoError(b, err)
	engine := stack.Docker(b, "info", "--format", "{{.ServerVersion}}, {{.Driver}}").OK(b).Stdout
	compose := stack.Docker(b, "compose", "version", "--short").OK(b).Stdout
	return fmt.Sprintf("%s: %s, %d cores, %.0f GB, %s, Docker Engine %s, Compose %s", time.Now().Format(time.DateOnly),
		field("/proc/cpuinfo", "model name"), runtime.NumCPU(), float64(memory)/1e6, strings.TrimSpace(string(kernel)),
		strings.TrimSpace(engine), strings.TrimSpace(compose))
}
