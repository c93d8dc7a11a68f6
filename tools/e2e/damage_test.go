package e2e_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// rootOf is the fingerprint of the root in the CA's own volume.
func rootOf(t *testing.T, s *stack.Stack) string {
	t.Helper()
	text := s.InVolumes("step certificate fingerprint step-ca-certs/root_ca.crt", "step-ca-certs")
	require.Len(t, strings.TrimSpace(text), 64)
	return strings.TrimSpace(text)
}

// One stack through what an operator's bad day can bring, in the order in which
// each part leaves it.
func TestABadDay(t *testing.T) {
	s := stack.New(t, nil)
	s.Up()
	root := rootOf(t, s)
	containers, files := s.Containers(), s.Snapshot(stack.Rendered...)
	untouched := func(t *testing.T) {
		t.Helper()
		requireSameProcesses(t, containers, s.Containers())
		require.Equal(t, files, s.Snapshot(stack.Rendered...), "files changed")
		requireServed(t, s, locally(s.Address()))
	}

	t.Run("mistakes in .env leave the running services alone", func(t *testing.T) {
		s.Change(t, mistaken)
		require.NotZero(t, s.Compose("up", "-d", "--wait").Code)
		said := s.Logs("config-check")
		for _, complaint := range complaints {
			require.Contains(t, said, complaint)
		}
		untouched(t)
	})

	for name, service := range map[string]string{
		"CA_PASSWORD": "provisioner-init", "ROOT_CA_PASSWORD": "provisioner-init",
		"PROVISIONER_PASSWORD": "provisioner-init", "POSTGRES_PASSWORD": "db-migrate",
	} {
		t.Run("another "+name+" is refused by name", func(t *testing.T) {
			s.Change(t, stack.Settings{name: "quite another password"})
			require.NotZero(t, s.Compose("up", "-d", "--wait").Code)
			said := s.Logs(service)
			require.NotEmpty(t, errorLines(said))
			require.Regexp(t, service+`: hint: .*\b`+name+`\b`, said)
			untouched(t)
		})
	}

	t.Run("a new password of step-ca's role is set, and taken by step-ca", func(t *testing.T) {
		s.Set(stack.Settings{"STEP_CA_DB_PASSWORD": `a new one: "$'\` + "`" + ` \:/`})
		s.Up()
		s.Make("apply").OK(t) // as "make up" does
		newCA(t, s).issue(t, "rotated.e2e.test")
	})

	t.Run("all this told no secret", func(t *testing.T) { requireUntold(t, s) })

	t.Run("without its database the CA starts again with its old root", func(t *testing.T) {
		s.Down()
		s.DropVolumes("postgres-data")
		s.Up()
		require.Equal(t, root, rootOf(t, s))
		newCA(t, s).issue(t, "again.e2e.test")
	})

	t.Run("without its keys the CA is refused, and none is made", func(t *testing.T) {
		s.Down()
		keys := []string{"root-ca", "step-ca-certs", "step-ca-secrets", "step-ca-config", "trust"}
		s.DropVolumes(keys...)
		require.NotZero(t, s.Compose("up", "-d", "--wait").Code)
		said := s.Logs("provisioner-init")
		require.Contains(t, strings.Join(errorLines(said), "\n"), root)
		require.Regexp(t, `provisioner-init: hint: restore the volumes root-ca, step-ca-certs and step-ca-secrets`, said)
		for _, v := range keys {
			require.Empty(t, s.Files(v), v)
		}
		for _, name := range []string{"step-ca", "trust-export", "caddy"} {
			require.False(t, s.Containers()[name].Ran(), name)
		}
	})
}
