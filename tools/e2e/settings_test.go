package e2e_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// Several mistakes at once, one of each kind.
var mistaken = stack.Settings{
	"DOMAIN_CA":            stack.Unset,
	"POSTGRES_USER":        "",
	"CA_PASSWORD":          "",
	"PROVISIONER_PASSWORD": "change_me_provisioner_password",
	"STEP_CA_DB_PASSWORD":  "beyond ASCII: pässword",
	"TLS_DEFAULT_LIFETIME": "a while",
	"ALLOWED_IPS":          "192.0.2.1 10.0.0.0/33 ca.example\n10.0.0.0/8\nroute {\n\techo\n}",
}

// What the message has to say about them.
var complaints = []string{
	"DOMAIN_CA is missing",
	"POSTGRES_USER is missing",
	"CA_PASSWORD is missing",
	"PROVISIONER_PASSWORD is still the placeholder",
	"STEP_CA_DB_PASSWORD has a character beyond printable ASCII",
	`TLS_DEFAULT_LIFETIME is not a length of time: "a while"`,
	`"10.0.0.0/33"`, `"ca.example"`, `"route"`, `"echo"`,
}

func errorLines(text string) []string {
	var lines []string
	for line := range strings.Lines(text) {
		if _, what, ok := strings.Cut(line, ": error: "); ok {
			lines = append(lines, strings.TrimSpace(what))
		}
	}
	slices.Sort(lines)
	return lines
}

// configCheck is what "make check" runs.
func configCheck(t *testing.T, s *stack.Stack) stack.Result {
	t.Helper()
	return stack.Docker(t, "run", "--rm", "--network", "none", "--user", "0:0", "--volume", s.EnvFile()+":/.env:ro",
		"infra-pki/tools:local", "config-check", "--env-file", "/.env")
}

func TestMistakesInDotEnvStartNothing(t *testing.T) {
	s := stack.New(t, mistaken)
	up := s.Compose("up", "-d", "--wait")
	require.NotZero(t, up.Code)
	require.Contains(t, up.Output(), "config-check")
	said := s.Logs("config-check")
	for _, complaint := range complaints {
		require.Contains(t, said, complaint)
	}
	require.Contains(t, said, "config-check: hint: ")

	for name, c := range s.Containers() {
		require.Equal(t, name == "config-check", c.Ran(), name)
	}
	for _, v := range append([]string{"postgres-data"}, stack.Rendered...) {
		require.Empty(t, s.Files(v), v)
	}

	check := configCheck(t, s).Exits(t, 2)
	require.Equal(t, errorLines(said), errorLines(check.Output()), "make check says the same")
	require.Empty(t, s.Find(said+check.Output()+up.Output()))
}

func TestASecretWithoutALineInDotEnvIsRefusedByName(t *testing.T) {
	s := stack.New(t, stack.Settings{"ROOT_CA_PASSWORD": stack.Unset})
	up := s.Compose("up", "-d", "--wait")
	require.NotZero(t, up.Code)
	require.Contains(t, up.Output()+s.Logs(), "ROOT_CA_PASSWORD")
	for name, c := range s.Containers() {
		require.True(t, name == "config-check" || !c.Ran(), name)
	}
	check := configCheck(t, s).Exits(t, 2)
	require.Contains(t, check.Output(), "ROOT_CA_PASSWORD is missing")
}

func TestWhatIsAllowedAndProbablyNotMeantIsWarnedAbout(t *testing.T) {
	s := stack.New(t, nil)
	tests := map[string]struct {
		settings stack.Settings
		warning  string
	}{
		"the whole of IPv4 may connect": {stack.Settings{"ALLOWED_IPS": "0.0.0.0/0"}, "ALLOWED_IPS has 0.0.0.0/0"},
		"the gateway stands for all IPv6 clients": {
			stack.Settings{"ALLOWED_IPS": s.Gateway.String(), "EDGE_SUBNET6": "fd1c:9000::/64"}, "the gateway of the edge network",
		},
		"private ranges hold the gateway": {
			stack.Settings{"ALLOWED_IPS": "private_ranges", "EDGE_SUBNET6": "fd1c:9000::/64"}, "the gateway of the edge network",
		},
		"a short password": {stack.Settings{"CA_PASSWORD": "short"}, "CA_PASSWORD is shorter than"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			s.Change(t, tc.settings)
			require.Contains(t, configCheck(t, s).OK(t).Output(), tc.warning)
		})
	}
}
