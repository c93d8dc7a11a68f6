package e2e_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// requireUntold demands that no secret stands where somebody may read it.
func requireUntold(t *testing.T, s *stack.Stack) {
	t.Helper()
	places := map[string]string{
		"docker inspect":      s.Inspect(),
		"docker compose logs": s.Logs(),
		"docker compose ps":   s.Compose("ps", "--all", "--format", "json").OK(t).Stdout,
	}
	for _, v := range append([]string{"postgres-data"}, stack.Rendered...) {
		// The one file in which a secret may stand: step-ca reads its password from it.
		places["volume "+v] = s.InVolumes("find . -type f ! -path ./step-ca-secrets/pgpass -exec cat {} +", v)
	}
	for place, text := range places {
		require.NotEmpty(t, text, place)
		require.Empty(t, s.Find(text), "secrets in %s", place)
	}
}

func TestNoSecretIsToldAnywhere(t *testing.T) {
	s := stack.Shared(t)
	requireUntold(t, s)

	// The search would find one.
	require.NotEmpty(t, s.Find(s.InVolumes("cat step-ca-secrets/pgpass", "step-ca-secrets")))
	require.NotEmpty(t, s.Find(s.Compose("exec", "-T", "step-ca", "cat", "/run/secrets/ca_password").OK(t).Stdout))
}

func TestNoSecretIsInAProcess(t *testing.T) {
	s := stack.Shared(t)
	stack.NeedRoot(t, "to read the environment of other users' processes")
	for _, name := range staying {
		list := stack.Docker(t, "top", s.Containers()[name].ID, "-eo", "pid").OK(t).Stdout
		pids := strings.Fields(list)[1:]
		require.NotEmpty(t, pids)
		for _, pid := range pids {
			for _, file := range []string{"environ", "cmdline"} {
				data, err := os.ReadFile(fmt.Sprintf("/proc/%s/%s", pid, file))
				if os.IsNotExist(err) {
					continue // a health check that has ended
				}
				require.NoError(t, err)
				found := s.Find(string(data))
				if name == "postgres" && file == "environ" && !builtHere(t, s.Containers()[name].ID) {
					// The stock entrypoint leaves it there, for root and the server itself to
					// read, who can read /run/secrets too (docker-library/postgres, file_env).
					found = slices.DeleteFunc(found, func(f string) bool { return strings.HasPrefix(f, "POSTGRES_PASSWORD ") })
				}
				require.Empty(t, found, "secrets in %s of process %s of %s", file, pid, name)
			}
		}
	}
}

func TestEachServiceHasOnlyItsOwnSecrets(t *testing.T) {
	s := stack.Shared(t)
	for _, name := range []string{"postgres", "step-ca"} { // caddy has no shell and gets none
		out := s.Compose("exec", "-T", name, "sh", "-c", "ls /run/secrets").OK(t)
		got := strings.Fields(out.Stdout)
		slices.Sort(got)
		require.Equal(t, leastSecrets[name], got, name)
	}
}
