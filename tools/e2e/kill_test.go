package e2e_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// Invariant 2, on the parts that write: killed again and again during their first
// run, each continues what the one before has left.
func TestOneShotsThatAreKilledInTheirFirstRunAreRunAgain(t *testing.T) {
	s := stack.New(t, nil)
	s.Compose("up", "-d", "--wait", "postgres").OK(t)
	killed := func(service string, delays ...time.Duration) (roots []string) {
		hits := 0
		for _, delay := range delays {
			if s.Kill(service, delay) {
				hits++
			}
			if service == "provisioner-init" {
				root := s.InVolumes("cat step-ca-certs/root_ca.crt 2>/dev/null || true", "step-ca-certs")
				if root != "" && (len(roots) == 0 || roots[len(roots)-1] != root) {
					roots = append(roots, root)
				}
			}
		}
		t.Logf("%s: %d of %d runs were killed before their end", service, hits, len(delays))
		require.Positive(t, hits, "no run was slow enough to be killed")
		return roots
	}
	ms := time.Millisecond
	killed("db-migrate", 0, 50*ms, 100*ms, 200*ms)
	s.Compose("run", "--rm", "--no-deps", "-T", "db-migrate").OK(t)
	roots := killed("provisioner-init", 0, 50*ms, 100*ms, 200*ms, 300*ms, 450*ms)
	require.LessOrEqual(t, len(roots), 1, "a second root was made")

	s.Up()
	requireHealthy(t, s)
	if len(roots) == 1 {
		require.Equal(t, roots[0], s.InVolumes("cat step-ca-certs/root_ca.crt", "step-ca-certs"))
	}
	newCA(t, s).issue(t, "survivor.e2e.test")
	s.Compose("run", "--rm", "--no-deps", "-T", "provisioner-init", "--check").OK(t)
}
