package anchor

import (
	"bytes"
	"crypto/x509"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/truststore"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// machine is a distribution in a directory: what truststore takes for the place of
// roots, and a command that makes the bundle of them. The real ones are tested in
// tools/e2e.
type machine struct {
	dir string
	log bytes.Buffer
}

func newMachine(t *testing.T, update string) *machine {
	t.Helper()
	m := &machine{dir: t.TempDir()}
	bin, anchors := filepath.Join(m.dir, "bin"), filepath.Join(m.dir, "anchors")
	for _, d := range []string{bin, anchors, filepath.Join(m.dir, "certs")} {
		require.NoError(t, os.Mkdir(d, 0o700))
	}
	// Without sudo, which would ask for a password or find another PATH.
	for _, tool := range []string{"sh", "cat", "tee", "rm", "openssl"} {
		path, err := exec.LookPath(tool)
		require.NoError(t, err)
		require.NoError(t, os.Symlink(path, filepath.Join(bin, tool)))
	}
	if update != "" {
		script := "#!" + filepath.Join(bin, "sh") + "\ncd " + m.dir + "\necho ran >> runs\n" + update + "\n"
		require.NoError(t, os.WriteFile(filepath.Join(bin, "update"), []byte(script), 0o700)) //nolint:gosec // G306: it is a program
	}
	t.Setenv("PATH", bin)
	filename, command, bundle := truststore.SystemTrustFilename, truststore.SystemTrustCommand, bundles[anchors]
	t.Cleanup(func() {
		truststore.SystemTrustFilename, truststore.SystemTrustCommand, bundles[anchors] = filename, command, bundle
	})
	truststore.SystemTrustFilename = filepath.Join(anchors, "%s.crt")
	truststore.SystemTrustCommand = []string{"update"}
	bundles[anchors] = filepath.Join(m.dir, "certs", "bundle.crt")
	return m
}

const good = `echo "# a bundle" > certs/bundle.crt; cat anchors/*.crt >> certs/bundle.crt; true`

func (m *machine) runs(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(m.dir, "runs"))
	if err != nil {
		return 0
	}
	return strings.Count(string(data), "ran")
}

func (m *machine) install(t *testing.T, root *x509.Certificate) error {
	t.Helper()
	return Install(t.Context(), root, slog.New(slog.NewTextHandler(&m.log, nil)), System)
}

func (m *machine) uninstall(t *testing.T, root *x509.Certificate) error {
	t.Helper()
	return Uninstall(t.Context(), x509util.Fingerprint(root), slog.New(slog.NewTextHandler(&m.log, nil)), System)
}

func state(t *testing.T, root *x509.Certificate) Verdict {
	t.Helper()
	states := Status(t.Context(), x509util.Fingerprint(root), System)
	require.Len(t, states, 1)
	return states[0].State
}

func TestSystemStore(t *testing.T) {
	m := newMachine(t, good)
	root, other := newRoot(t, "A root / with a slash", nil), newRoot(t, "Other", nil)
	file := filepath.Join(m.dir, "anchors", "infra-pki-"+root.SerialNumber.String()+".crt")
	require.Equal(t, NotTrusted, state(t, root))

	require.NoError(t, m.install(t, root))
	require.Equal(t, Trusted, state(t, root))
	require.FileExists(t, file)
	require.Equal(t, 1, m.runs(t))

	require.NoError(t, m.install(t, root))
	require.Equal(t, 1, m.runs(t), "the second time no command runs")
	require.Contains(t, m.log.String(), "msg=unchanged")

	require.NoError(t, m.install(t, other))
	require.NoError(t, m.uninstall(t, root))
	require.NoFileExists(t, file)
	require.Equal(t, NotTrusted, state(t, root))
	require.Equal(t, Trusted, state(t, other))

	require.NoError(t, m.uninstall(t, root))
	require.Equal(t, 3, m.runs(t))
}

func TestSystemStoreIsReadableWhateverTheUmask(t *testing.T) {
	m := newMachine(t, "umask > umask")
	require.Error(t, m.install(t, newRoot(t, "Root", nil)))
	data, err := os.ReadFile(filepath.Join(m.dir, "umask"))
	require.NoError(t, err)
	require.Equal(t, "0022\n", string(data))
}

func TestSystemStoreLosesARootThatHasExpired(t *testing.T) {
	m := newMachine(t, good)
	root := newRoot(t, "Root", func(c *x509.Certificate) { c.NotAfter = time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC) })
	require.NoError(t, m.install(t, root), "Fetch refuses it; here it once was valid")
	require.NoError(t, m.uninstall(t, root))
	require.Equal(t, NotTrusted, state(t, root))
}

// Killed between the two commands, or the second one failed.
func TestSystemStoreConverges(t *testing.T) {
	root := newRoot(t, "Root", nil)
	m := newMachine(t, `test -e repaired || { echo "no space left"; exit 3; }; `+good)
	err := m.install(t, root)
	require.EqualError(t, err, `system store "`+bundles[filepath.Join(m.dir, "anchors")]+`": running "update": exit status 3: no space left`)
	require.NotEqual(t, Trusted, state(t, root))
	require.NoError(t, os.WriteFile(filepath.Join(m.dir, "repaired"), nil, 0o600))

	t.Run("installing again finishes it", func(t *testing.T) {
		require.NoError(t, m.install(t, root))
		require.Equal(t, Trusted, state(t, root))
	})
	t.Run("a root whose file is gone and which is in the bundle is uninstalled", func(t *testing.T) {
		require.NoError(t, os.Remove(filepath.Join(m.dir, "anchors", nickname(root)+".crt")))
		require.NoError(t, m.uninstall(t, root))
		require.Equal(t, NotTrusted, state(t, root))
	})
	t.Run("a root which is in no bundle and whose file is there is uninstalled", func(t *testing.T) {
		require.NoError(t, m.install(t, root))
		require.NoError(t, os.WriteFile(filepath.Join(m.dir, "certs", "bundle.crt"), nil, 0o600))
		require.NoError(t, m.uninstall(t, root))
		require.NoFileExists(t, filepath.Join(m.dir, "anchors", nickname(root)+".crt"))
	})
}

func TestSystemStoreRefuses(t *testing.T) {
	serial := func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1) }
	root, same := newRoot(t, "Root", serial), newRoot(t, "Of another CA", serial)
	tests := map[string]struct {
		update string
		before func(t *testing.T, m *machine)
		err    string // without what comes before
		hint   string
	}{
		"to write over another root with the same serial number": {
			good, func(t *testing.T, m *machine) { t.Helper(); require.NoError(t, m.install(t, same)) },
			`/anchors/infra-pki-1.crt" holds another root with the same serial number`, "",
		},
		"to call it done if the bundle does not have it": {
			"echo done", nil, "reading it back: every step went well, and the store does not trust the root", "",
		},
		"to leave the system out without a word": {
			"", nil, "system store: update is missing", "install the package ca-certificates",
		},
		"a distribution that it does not know": {
			good, func(*testing.T, *machine) { truststore.SystemTrustFilename = "/etc/ssl/certs/%s.crt" },
			"system store: this machine has no directory for roots of its own", "install the package ca-certificates",
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, tc.update)
			if tc.before != nil {
				tc.before(t, m)
			}
			err := m.install(t, root)
			require.ErrorContains(t, err, tc.err)
			require.Equal(t, tc.hint, strings.Join(oneshot.Hints(err), "; "))
		})
	}
}

// Debian's tool leaves the links of a root whose file is gone, and hashes of roots
// that stay must stay: those of one subject are told apart by a number at the end.
func TestSystemStoreTakesAwayItsLinks(t *testing.T) {
	m := newMachine(t, good)
	root, next := newRoot(t, "Same name", nil), newRoot(t, "Same name", nil)
	certs := filepath.Join(m.dir, "certs")
	require.NoError(t, m.install(t, newRoot(t, "Other", nil))) // a bundle of one would be hashed, too
	for _, r := range []*x509.Certificate{root, next} {
		require.NoError(t, m.install(t, r))
		require.NoError(t, os.Symlink(filepath.Join(m.dir, "anchors", nickname(r)+".crt"), filepath.Join(certs, nickname(r)+".pem")))
		m.rehash(t)
	}
	require.Len(t, links(t, certs), 4)
	require.NoError(t, m.uninstall(t, root))
	left := links(t, certs)
	require.Len(t, left, 2)
	for _, link := range left {
		_, err := os.Stat(link)
		require.NoError(t, err)
		require.NotContains(t, link, ".1", "a hash that does not begin with .0 is never looked at")
	}
}

func (m *machine) rehash(t *testing.T) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "openssl", "rehash", filepath.Join(m.dir, "certs")).CombinedOutput()
	require.NoError(t, err, string(out))
}

func links(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	var found []string
	for _, e := range entries {
		if e.Type()&os.ModeSymlink != 0 {
			found = append(found, filepath.Join(dir, e.Name()))
		}
	}
	return found
}
