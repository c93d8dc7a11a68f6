package krl

import (
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"
)

// What a list means is for OpenSSH to say: all keys, certificates and answers here
// are ssh-keygen's.
func TestOpenSSHReadsTheList(t *testing.T) {
	dir := t.TempDir()
	host, user, other := newKey(t, dir, "host", "ecdsa"), newKey(t, dir, "user", "ed25519"), newKey(t, dir, "other", "rsa")
	newKey(t, dir, "subject", "ed25519")
	cas := []ssh.PublicKey{host, user}

	tests := map[string]struct {
		cas     []ssh.PublicKey
		serials []uint64
		ca      string
		serial  uint64
		revoked bool
	}{
		"a serial on the list, under the host CA":      {cas, []uint64{7, 9}, "host", 9, true},
		"a serial on the list, under the user CA":      {cas, []uint64{7, 9}, "user", 7, true},
		"a serial on the list, under a CA that is not": {cas, []uint64{7, 9}, "other", 7, false},
		"a serial between two that are on the list":    {cas, []uint64{7, 9}, "user", 8, false},
		"the largest serial there is":                  {cas, []uint64{math.MaxUint64}, "user", math.MaxUint64, true},
		"serials in any order, some of them twice":     {cas, []uint64{math.MaxUint64, 9, 7, 9}, "user", 9, true},
		"an empty list":                                  {cas, nil, "user", 7, false},
		"a list without CAs":                             {nil, []uint64{7}, "user", 7, false},
		"serial 0, which OpenSSH cannot revoke":          {cas, []uint64{0}, "user", 7, false},
		"serial 0 does not keep others from the list":    {cas, []uint64{0, 7}, "user", 7, true},
		"an RSA CA":                                      {[]ssh.PublicKey{other}, []uint64{7}, "other", 7, true},
		"the last of a hundred thousand on a list":       {cas, many(100_000), "host", 3 * 100_000, true},
		"a neighbour of the last of a hundred thousand":  {cas, many(100_000), "host", 3*100_000 - 1, false},
		"a certificate without a serial is never on it":  {cas, []uint64{0, 7}, "user", 0, false},
		"the same CA for hosts and users is no mistake":  {[]ssh.PublicKey{user, user}, []uint64{7}, "user", 7, true},
		"a serial that as a signed number were negative": {cas, []uint64{1<<63 + 1}, "user", 1<<63 + 1, true},
	}
	i := 0
	for name, tc := range tests {
		i++
		list := filepath.Join(dir, fmt.Sprintf("%d.krl", i))
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(list, List{CAs: tc.cas, Serials: tc.serials}.Marshal(), 0o600))
			cert := newCert(t, dir, tc.ca, tc.serial)
			out, err := exec.CommandContext(t.Context(), "ssh-keygen", "-Q", "-f", list, cert).CombinedOutput()
			if tc.revoked {
				require.Error(t, err)
				require.Contains(t, string(out), ": REVOKED")
				return
			}
			require.NoError(t, err, string(out))
			require.Regexp(t, `: ok\n$`, string(out))
		})
	}
}

func TestOpenSSHShowsTheList(t *testing.T) {
	dir := t.TempDir()
	ca := newKey(t, dir, "ca", "ed25519")
	revoked := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	list := filepath.Join(dir, "list.krl")
	require.NoError(t, os.WriteFile(list, List{Version: 3, Generated: revoked, CAs: []ssh.PublicKey{ca}, Serials: []uint64{9, 300, 7}}.Marshal(), 0o600))

	cmd := exec.CommandContext(t.Context(), "ssh-keygen", "-Q", "-l", "-f", list)
	cmd.Env = append(os.Environ(), "TZ=UTC")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Equal(t, `# KRL version 3
# Generated at 20260304T050607


# CA key ssh-ed25519 `+ssh.FingerprintSHA256(ca)+`
serial: 7
serial: 9
serial: 300
`, string(out))
}

func TestTheSameListIsTheSameBytes(t *testing.T) {
	ca := newKey(t, t.TempDir(), "ca", "ed25519")
	at := time.Unix(1_700_000_000, 0)
	one := List{Version: 2, Generated: at, CAs: []ssh.PublicKey{ca}, Serials: []uint64{1, 2}}
	other := List{Version: 2, Generated: at, CAs: []ssh.PublicKey{ca}, Serials: []uint64{2, 1}}
	require.Equal(t, one.Marshal(), other.Marshal())
	require.Equal(t, []uint64{2, 1}, other.Serials, "the caller's own list stays as it is")
}

func many(n uint64) (serials []uint64) {
	for i := range n {
		serials = append(serials, 3*(i+1))
	}
	return serials
}

func newKey(t *testing.T, dir, name, kind string) ssh.PublicKey {
	t.Helper()
	keygen(t, "-q", "-t", kind, "-N", "", "-C", "", "-f", filepath.Join(dir, name))
	data, err := os.ReadFile(filepath.Join(dir, name+".pub"))
	require.NoError(t, err)
	key, _, _, _, err := ssh.ParseAuthorizedKey(data)
	require.NoError(t, err)
	return key
}

// newCert makes a certificate for "subject" and returns its path.
func newCert(t *testing.T, dir, ca string, serial uint64) string {
	t.Helper()
	keygen(t, "-q", "-s", filepath.Join(dir, ca), "-I", "id", "-n", "root", "-z", strconv.FormatUint(serial, 10), filepath.Join(dir, "subject.pub"))
	return filepath.Join(dir, "subject-cert.pub")
}

func keygen(t *testing.T, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "ssh-keygen", args...).CombinedOutput()
	require.NoError(t, err, string(out))
}
