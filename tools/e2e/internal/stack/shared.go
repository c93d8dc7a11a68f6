package stack

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

var shared struct {
	once  sync.Once
	s     *Stack
	err   error
	ready bool
}

// Shared is a healthy stack that several tests use, one after the other. Each must
// leave it as it was. Main removes it.
func Shared(tb testing.TB) *Stack {
	tb.Helper()
	Need(tb)
	shared.once.Do(func() {
		if shared.s, shared.err = prepare(nil); shared.err == nil {
			shared.s.use(tb)
			r := shared.s.Up()
			tb.Logf("docker compose up -d --wait: %.1f s", r.Took.Seconds())
			shared.ready = true
		}
	})
	require.NoError(tb, shared.err)
	require.True(tb, shared.ready, "the shared stack did not come up, see the first test")
	shared.s.use(tb)
	return shared.s
}
