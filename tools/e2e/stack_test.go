package e2e_test

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

var (
	staying  = []string{"postgres", "pgbouncer", "step-ca", "step-ca/2", "caddy"}
	oneShots = []string{"config-check", "db-migrate", "db-wait", "provisioner-init", "trust-export"}
)

// requireHealthy demands that everything is as "up --wait" promises.
func requireHealthy(t *testing.T, s *stack.Stack) {
	t.Helper()
	containers := s.Containers()
	require.ElementsMatch(t, slices.Concat(staying, oneShots), slices.Collect(maps.Keys(containers)))
	for _, name := range staying {
		c := containers[name]
		require.Equal(t, "running", c.State.Status, name)
		require.NotNil(t, c.State.Health, name)
		require.Equal(t, "healthy", c.State.Health.Status, name)
		require.Zero(t, c.RestartCount, name)
	}
	for _, name := range oneShots {
		require.Equal(t, "exited", containers[name].State.Status, name)
		require.Zero(t, containers[name].State.ExitCode, name)
	}
}

// requireSameProcesses demands that the services that stay are the same processes as before.
func requireSameProcesses(t *testing.T, before, after map[string]stack.Container) {
	t.Helper()
	for _, name := range staying {
		require.Equal(t, before[name].ID, after[name].ID, "%s was made anew", name)
		require.Equal(t, before[name].State.StartedAt, after[name].State.StartedAt, "%s was restarted", name)
	}
}

func TestUpMakesAHealthyStackAndAgainChangesNothing(t *testing.T) {
	s := stack.Shared(t)
	requireHealthy(t, s)
	containers, files := s.Containers(), s.Snapshot(stack.Rendered...)

	again := s.Up()
	t.Logf("docker compose up -d --wait, again: %.1f s", again.Took.Seconds())
	requireHealthy(t, s)
	after := s.Containers()
	requireSameProcesses(t, containers, after)
	for _, name := range oneShots {
		require.Equal(t, containers[name].ID, after[name].ID, "%s was made anew", name)
		require.True(t, after[name].State.StartedAt.After(containers[name].State.StartedAt), "%s did not run again", name)
	}
	require.Equal(t, files, s.Snapshot(stack.Rendered...), "files changed")

	s.Compose("run", "--rm", "--no-deps", "-T", "provisioner-init", "--check").OK(t)
	require.Equal(t, files, s.Snapshot(stack.Rendered...), "--check wrote")
}

func TestMakeUpProvesTheStackAndSaysWhatComesNext(t *testing.T) {
	s := stack.Shared(t)
	s.Compose("run", "--rm", "-T", "probe", "--ca-url", "https://"+s.Address()).OK(t)

	fingerprint := strings.TrimSpace(contentOf(t, s.Trust(), "fingerprint"))
	summary := s.Make("summary").OK(t).Stdout
	require.Contains(t, summary, s.URL()+"/acme/acme/directory")
	require.Contains(t, summary, "step ca bootstrap --ca-url "+s.URL()+" --fingerprint "+fingerprint)
	status := s.Make("status").OK(t).Stdout
	for _, name := range staying {
		service, _, _ := strings.Cut(name, "/")
		require.Regexp(t, `(?m)^`+service+`\s+Up .*\(healthy\)`, status)
	}
}

func TestAChangedLifetimeIsTakenWithoutARestart(t *testing.T) {
	s := stack.Shared(t)
	containers := s.Containers()
	lifetime := func() time.Duration {
		leaf := newCA(t, s).issue(t, "lifetime.e2e.test")
		return leaf.NotAfter.Sub(leaf.NotBefore).Round(time.Hour)
	}
	require.Equal(t, 24*time.Hour, lifetime())
	t.Cleanup(func() { s.Make("init").OK(t) }) // after the old setting is back
	s.Change(t, stack.Settings{"TLS_DEFAULT_LIFETIME": "2h"})

	s.Compose("run", "--rm", "--no-deps", "-T", "provisioner-init", "--check").Exits(t, 3)
	require.Equal(t, 24*time.Hour, lifetime(), "--check applied something")

	first := s.Make("init").OK(t)
	require.Regexp(t, `updated item="CA configuration"|updated.*ca\.json`, first.Output())
	require.Contains(t, first.Output(), "step-ca: reloaded")
	require.Equal(t, 2*time.Hour, lifetime())

	files := s.Snapshot(stack.Rendered...)
	second := s.Make("init").OK(t)
	require.Contains(t, second.Output(), "step-ca: unchanged")
	require.NotContains(t, second.Output(), "updated")
	require.Equal(t, files, s.Snapshot(stack.Rendered...))
	requireSameProcesses(t, containers, s.Containers())
}
