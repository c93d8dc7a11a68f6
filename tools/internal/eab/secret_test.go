package eab

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// One in 64 would.
func TestSecretIsNoFlag(t *testing.T) {
	seen := map[string]bool{}
	for range 2000 {
		secret := newSecret()
		require.Len(t, secret, 32)
		require.NotEqual(t, byte('-'), Encode(secret)[0])
		seen[string(secret)] = true
	}
	require.Len(t, seen, 2000)
}
