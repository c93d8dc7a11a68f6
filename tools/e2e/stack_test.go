package e2e_test

import (
	"encoding/json"
	"maps"
	"regexp"
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
}

func TestMakeStatusSaysWhatIsWrongAndWhatToDo(t *testing.T) {
	s := stack.Shared(t)
	begin := time.Now()
	shown := s.Make("status").Exits(t, 2) // make's code for a recipe that failed
	t.Logf("make status: %.1f s", time.Since(begin).Seconds())
	for _, name := range staying {
		service, _, _ := strings.Cut(name, "/")
		require.Regexp(t, `(?m)^`+service+`\s+Up .*\(healthy\)`, shown.Stdout)
	}
	require.Regexp(t, `(?m)^arrival\s+arrives from `+regexp.QuoteMeta(s.Gateway.String())+`\s+127\.0\.0\.1$`, shown.Stdout)
	require.Contains(t, shown.Stdout, "wrong: there is no backup")
	require.NotContains(t, shown.Stdout, "\x1b", "colour where there is no terminal")

	type state struct {
		Well                       bool
		Services                   []struct{ Service, Health string }
		Replicas                   []struct{ State string }
		Arrivals                   []string
		Certificates, Provisioners []struct {
			Name, Declared string
			Left           int64 `json:"seconds_left"`
		}
		Drift *struct {
			ExitCode int `json:"exit_code"`
		}
		Problems []struct{ What, Do string }
	}
	read := func() (st state) {
		require.NoError(t, json.Unmarshal([]byte(s.Make("status", "JSON=1").Exits(t, 2).Stdout), &st))
		return st
	}
	st := read()
	require.False(t, st.Well)
	require.Len(t, st.Problems, 1, "%v", st.Problems)
	require.Len(t, st.Replicas, 2)
	require.Equal(t, "ready", st.Replicas[0].State)
	require.Len(t, st.Certificates, 2)
	require.NotEmpty(t, st.Provisioners)
	require.Zero(t, st.Drift.ExitCode)

	s.Change(t, stack.Settings{"TLS_DEFAULT_LIFETIME": "3h"})
	st = read()
	require.Equal(t, 3, st.Drift.ExitCode)
	require.Len(t, st.Problems, 2, "%v", st.Problems)
	require.Contains(t, st.Problems[0].What, "what is rendered is not what .env declares: provisioner-init: ")
	require.Equal(t, `"make init" applies it`, st.Problems[0].Do)
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
