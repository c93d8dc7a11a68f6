package e2e_test

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// promtool of the image that the stack runs, in the directory that it gets mounted.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	image := compose(t).Services["prometheus"].Image
	out, err := exec.CommandContext(t.Context(), "docker", append([]string{
		"run", "--rm", "--network", "none", "--entrypoint", "promtool", "--workdir", "/etc/prometheus",
		"--volume", filepath.Join(stack.Repository(), "tools", "prometheus") + ":/etc/prometheus:ro", image,
	}, args...)...).CombinedOutput()
	require.NoError(t, err, string(out))
}

func TestPrometheusTakesItsConfiguration(t *testing.T) {
	t.Parallel()
	promtool(t, "check", "config", "prometheus.yml")
}

// In stories: tools/prometheus/alerts_test.yml.
func TestAlerts(t *testing.T) {
	t.Parallel()
	promtool(t, "test", "rules", "alerts_test.yml")
}

// An alert that does not say what to do is noise, and one without a story was never seen to fire.
func TestAlertsSayWhatToDo(t *testing.T) {
	stories := checkedIn(t, "tools", "prometheus", "alerts_test.yml")
	_, rules, _ := strings.Cut(checkedIn(t, "tools", "prometheus", "alerts.yml"), "rules:")
	alerts := strings.Split(rules, "- alert: ")[1:]
	require.NotEmpty(t, alerts)
	for _, text := range alerts {
		name, _, _ := strings.Cut(text, "\n")
		t.Run(name, func(t *testing.T) {
			for _, part := range []string{`labels: \{severity: (critical|warning)\}`, `summary: \S`, `description: \S`, `action: \S`} {
				require.Regexp(t, part, text)
			}
			require.Contains(t, stories, `alertname="`+name+`"`, "no story in which it fires")
		})
	}
}
