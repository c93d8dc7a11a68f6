package pki

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/minica"
	"go.step.sm/crypto/pemutil"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

var (
	now       = time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	passwords = Passwords{Root: "secret of the röot", CA: "secret \"of` the$ CA", Provisioner: "secret of the admin", SSHHost: "secret of the hosts"}
	names     = Names{PKI: "Test", RootLifetime: 1000 * time.Hour, IntermediateLifetime: 100 * time.Hour, Now: now}
)

func newStore(t *testing.T) Store {
	t.Helper()
	dir := t.TempDir()
	s := Store{Root: filepath.Join(dir, "root-ca"), Certs: filepath.Join(dir, "certs"), Secrets: filepath.Join(dir, "secrets")}
	for _, d := range []string{s.Root, s.Certs, s.Secrets} {
		require.NoError(t, os.Mkdir(d, 0o700))
	}
	return s
}

func open(t *testing.T, s Store) *Contents {
	t.Helper()
	c, err := s.Open(passwords, names, now)
	require.NoError(t, err)
	return c
}

// fixture is one complete store; opening and sealing its keys takes a second.
var fixture = sync.OnceValues(func() (map[string][]byte, error) {
	s := Store{Root: "root-ca", Certs: "certs", Secrets: "secrets"}
	c := &Contents{slots: s.slots(passwords, names), missing: map[string]bool{}}
	files := map[string][]byte{}
	for _, sl := range c.slots {
		data, err := sl.write(&c.Authority)
		if err != nil {
			return nil, err
		}
		files[sl.item] = data
	}
	return files, nil
})

// create leaves what a run leaves that is killed after so many files.
func create(t *testing.T, s Store, files int) {
	t.Helper()
	contents, err := fixture()
	require.NoError(t, err)
	for _, sl := range s.slots(passwords, names)[:files] {
		require.NoError(t, os.WriteFile(sl.path, contents[sl.item], sl.mode))
	}
}

const all = 10

func TestCreate(t *testing.T) {
	s := newStore(t)
	c := open(t, s)
	require.True(t, c.Empty())
	require.Len(t, c.Missing(), all)
	for _, f := range c.Missing() {
		require.NoError(t, f.Create())
	}
	require.Empty(t, c.Missing())

	again := open(t, s)
	require.Empty(t, again.Missing())
	require.True(t, c.Root.Equal(again.Root))

	root, inter := again.Root, again.Intermediate
	require.Equal(t, "Test Root CA", root.Subject.CommonName)
	require.Equal(t, "Test Intermediate CA", inter.Subject.CommonName)
	require.Equal(t, now.Add(1000*time.Hour), root.NotAfter)
	require.Equal(t, now.Add(100*time.Hour), inter.NotAfter)
	require.Equal(t, 1, root.MaxPathLen)
	require.True(t, inter.MaxPathLenZero)
	require.Equal(t, x509.KeyUsageCertSign|x509.KeyUsageCRLSign, inter.KeyUsage)
	require.NotEqual(t, root.SubjectKeyId, inter.SubjectKeyId)

	for _, path := range []string{s.RootKeyPath(), s.IntermediateKeyPath(), s.SSHHostKeyPath(), s.SSHUserKeyPath()} {
		data, err := os.ReadFile(path)
		require.NoError(t, err)
		block, rest := pem.Decode(data)
		require.Empty(t, rest)
		require.Equal(t, "ENCRYPTED PRIVATE KEY", block.Type, "%s is PKCS#8", path)
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, fs.FileMode(0o400), info.Mode())
	}
}

func TestTheIntermediateEndsBeforeTheRoot(t *testing.T) {
	s := newStore(t)
	n := names
	n.IntermediateLifetime = n.RootLifetime
	c, err := s.Open(passwords, n, now)
	require.NoError(t, err)
	for _, f := range c.Missing() {
		require.NoError(t, f.Create())
	}
	require.Equal(t, c.Root.NotAfter.Add(-time.Hour), c.Intermediate.NotAfter)
}

// A run that is killed leaves any beginning of the list; the next run keeps what
// is there and makes the rest.
func TestAKilledRunIsCompleted(t *testing.T) {
	for n := range all {
		t.Run(strconv.Itoa(n)+" files were made", func(t *testing.T) {
			t.Parallel()
			s := newStore(t)
			create(t, s, n)
			before := snapshot(t, s)
			half := open(t, s)
			require.NoError(t, half.Broken())
			require.Len(t, half.Missing(), all-n)
			for _, f := range half.Missing() {
				require.NoError(t, f.Create())
			}
			require.Empty(t, open(t, s).Missing())
			after := snapshot(t, s)
			for path, data := range before {
				require.Equal(t, data, after[path], "%s was replaced", path)
			}
		})
	}
}

func TestLossIsNotAKilledRun(t *testing.T) {
	tests := map[string]struct {
		remove func(s Store) string
		want   string
	}{
		"the root certificate":    {Store.RootPath, "the root certificate \"ROOT\" is missing while the intermediate key is there"},
		"the intermediate key":    {Store.IntermediateKeyPath, "the intermediate key \"ROOT\" is missing while the intermediate certificate is there"},
		"the intermediate":        {Store.IntermediatePath, "the intermediate certificate \"ROOT\" is missing while the SSH host CA key is there"},
		"the SSH host CA key":     {Store.SSHHostKeyPath, "the SSH host CA key \"ROOT\" is missing while the SSH host CA public key is there"},
		"a root key kept offline": {Store.RootKeyPath, ""},
		"nothing, for comparison": {func(Store) string { return "" }, ""},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			create(t, s, all)
			path := tc.remove(s)
			if path != "" {
				require.NoError(t, os.Remove(path))
			}
			c := open(t, s)
			if tc.want == "" {
				require.Empty(t, c.Missing())
				require.NoError(t, c.Broken())
				return
			}
			require.EqualError(t, c.Broken(), strings.ReplaceAll(tc.want, "ROOT", path))
		})
	}
}

// harm is what a test may spoil.
type harm struct {
	t  *testing.T
	s  Store
	p  *Passwords
	at *time.Time
}

func TestOpenChecks(t *testing.T) {
	other := newStore(t)
	for _, f := range open(t, other).Missing()[:4] {
		require.NoError(t, f.Create())
	}
	tests := map[string]struct {
		harm func(to harm)
		want string
	}{
		"another password for the root key": {
			func(to harm) { to.p.Root = "not the one" },
			`root key "ROOTKEY": ROOT_CA_PASSWORD does not open it`,
		},
		"another password for the online keys": {
			func(to harm) { to.p.CA = "not the one" },
			"intermediate key \"INTERKEY\": CA_PASSWORD does not open it\nSSH host CA key \"HOSTKEY\": CA_PASSWORD does not open it\nSSH user CA key \"USERKEY\": CA_PASSWORD does not open it",
		},
		"another password for the admin key": {
			func(to harm) { to.p.Provisioner = "not the one" },
			`admin provisioner key "ADMIN": PROVISIONER_PASSWORD does not open it`,
		},
		"a key that is cut short": {
			func(to harm) { truncate(to.t, to.s.IntermediateKeyPath()) },
			`intermediate key "INTERKEY": is not PEM, or is cut short`,
		},
		"an empty certificate": {
			func(to harm) { write(to.t, to.s.RootPath(), nil) },
			`root certificate "ROOT": is not PEM, or is cut short`,
		},
		"an admin key that is cut short": {
			func(to harm) {
				truncate(to.t, filepath.Join(to.s.Secrets, "admin_jwk.json"))
			},
			`admin provisioner key "ADMIN": is not a JWK, or is cut short`,
		},
		"a private key in place of the root certificate": {
			func(to harm) { copyFile(to.t, to.s.RootKeyPath(), to.s.RootPath()) },
			`root certificate "ROOT": is a ENCRYPTED PRIVATE KEY and not a certificate`,
		},
		"another CA's intermediate": {
			func(to harm) {
				copyFile(to.t, other.IntermediatePath(), to.s.IntermediatePath())
			},
			"the intermediate key does not belong to the intermediate certificate\nthe intermediate certificate is not signed by the root: x509: ECDSA verification failure",
		},
		"an SSH public key that is not the key's": {
			func(to harm) {
				copyFile(to.t, filepath.Join(to.s.Certs, "ssh_user_ca_key.pub"), filepath.Join(to.s.Certs, "ssh_host_ca_key.pub"))
			},
			`SSH host CA public key "HOSTPUB": is not the public half of its key`,
		},
		"an intermediate that has ended": {
			func(to harm) { *to.at = now.Add(101 * time.Hour) },
			"the intermediate certificate ended on 2026-05-08",
		},
		"a clock that is behind": {
			func(to harm) { *to.at = now.Add(-24 * time.Hour) },
			"the root certificate begins on 2026-05-04 only; this machine's clock says 2026-05-03\nthe intermediate certificate begins on 2026-05-04 only; this machine's clock says 2026-05-03",
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t)
			create(t, s, all)
			p, at := passwords, now
			tc.harm(harm{t, s, &p, &at})
			before := snapshot(t, s)
			_, err := s.Open(p, names, at)
			want := strings.NewReplacer("ROOTKEY", s.RootKeyPath(), "INTERKEY", s.IntermediateKeyPath(), "HOSTKEY", s.SSHHostKeyPath(),
				"USERKEY", s.SSHUserKeyPath(), "ROOT\"", s.RootPath()+"\"", "ADMIN", filepath.Join(s.Secrets, "admin_jwk.json"),
				"HOSTPUB", filepath.Join(s.Certs, "ssh_host_ca_key.pub"), "_CA_PASSWORD", "_CA_PASSWORD").Replace(tc.want)
			require.EqualError(t, err, want)
			require.Equal(t, before, snapshot(t, s))
		})
	}
}

func TestImport(t *testing.T) {
	ca, err := minica.New(minica.WithName("Old"))
	require.NoError(t, err)
	stranger, err := minica.New(minica.WithName("Stranger"))
	require.NoError(t, err)
	tests := map[string]struct {
		files map[string][]byte
		want  string
	}{
		"nothing": {nil, ""},
		"a root kept offline, an intermediate and its key": {map[string][]byte{
			"certs/root_ca.crt": certPEM(ca.Root), "certs/intermediate_ca.crt": certPEM(ca.Intermediate),
			"secrets/intermediate_ca_key": keyPEM(t, ca.Signer, passwords.CA),
		}, ""},
		"a root and its key": {map[string][]byte{
			"certs/root_ca.crt": certPEM(ca.Root), "secrets/root_ca_key": keyPEM(t, ca.RootSigner, passwords.Root),
		}, ""},
		"everything as step ca init leaves it, keys in its old format": {map[string][]byte{
			"certs/root_ca.crt": certPEM(ca.Root), "certs/intermediate_ca.crt": certPEM(ca.Intermediate),
			"secrets/root_ca_key": oldKeyPEM(t, ca.RootSigner, passwords.Root), "secrets/intermediate_ca_key": oldKeyPEM(t, ca.Signer, passwords.CA),
		}, ""},
		"an intermediate of another root": {map[string][]byte{
			"certs/root_ca.crt": certPEM(stranger.Root), "certs/intermediate_ca.crt": certPEM(ca.Intermediate),
			"secrets/intermediate_ca_key": keyPEM(t, ca.Signer, passwords.CA),
		}, "the intermediate certificate is not signed by the root: x509: ECDSA verification failure"},
		"a key that is not the intermediate's": {map[string][]byte{
			"certs/root_ca.crt": certPEM(ca.Root), "certs/intermediate_ca.crt": certPEM(ca.Intermediate),
			"secrets/intermediate_ca_key": keyPEM(t, stranger.Signer, passwords.CA),
		}, "the intermediate key does not belong to the intermediate certificate"},
		"an intermediate without its key": {map[string][]byte{
			"certs/root_ca.crt": certPEM(ca.Root), "certs/intermediate_ca.crt": certPEM(ca.Intermediate),
		}, "there is neither a root key nor an intermediate with its key, so nothing could sign\nsecrets/intermediate_ca_key is missing"},
		"a key without certificates": {map[string][]byte{
			"secrets/root_ca_key": keyPEM(t, ca.RootSigner, passwords.Root),
		}, "certs/root_ca.crt is missing"},
		"an intermediate where the root should be": {map[string][]byte{
			"certs/root_ca.crt": certPEM(ca.Intermediate), "certs/intermediate_ca.crt": certPEM(ca.Intermediate),
			"secrets/intermediate_ca_key": keyPEM(t, ca.Signer, passwords.CA),
		}, "the root certificate is not self-signed: x509: ECDSA verification failure"},
		"a key under another password": {map[string][]byte{
			"certs/root_ca.crt": certPEM(ca.Root), "certs/intermediate_ca.crt": certPEM(ca.Intermediate),
			"secrets/intermediate_ca_key": keyPEM(t, ca.Signer, "another"),
		}, `intermediate key "DIR/secrets/intermediate_ca_key": CA_PASSWORD does not open it`},
		"two certificates in one file": {map[string][]byte{
			"certs/root_ca.crt": append(certPEM(ca.Root), certPEM(stranger.Root)...),
		}, `root certificate "DIR/certs/root_ca.crt": has more in it than one certificate`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			at := time.Now()
			dir := t.TempDir()
			for path, data := range tc.files {
				require.NoError(t, os.MkdirAll(filepath.Join(dir, filepath.Dir(path)), 0o700))
				write(t, filepath.Join(dir, path), data)
			}
			imported, err := Import(dir, passwords, at)
			if tc.want != "" {
				var want []string
				for line := range strings.SplitSeq(tc.want, "\n") {
					want = append(want, "importing from \""+dir+"\": "+strings.ReplaceAll(line, "DIR", dir))
				}
				require.ErrorContains(t, err, strings.Join(want, "\n"))
				return
			}
			require.NoError(t, err)
			if tc.files == nil {
				require.Nil(t, imported)
				return
			}
			s := newStore(t)
			n := Names{PKI: "New", RootLifetime: time.Hour, IntermediateLifetime: 100 * time.Hour, Now: at}
			c, err := s.Open(passwords, n, at)
			require.NoError(t, err)
			require.NoError(t, c.Adopt(imported))
			for _, f := range c.Missing() {
				require.NoError(t, f.Create())
			}
			got, err := s.Open(passwords, n, at)
			require.NoError(t, err)
			require.Empty(t, got.Missing())
			require.True(t, got.Root.Equal(ca.Root))
			_, hasInter := tc.files["certs/intermediate_ca.crt"]
			require.Equal(t, hasInter, got.Intermediate.Equal(ca.Intermediate))
			_, hasRootKey := tc.files["secrets/root_ca_key"]
			require.Equal(t, hasRootKey, got.RootKey != nil)
		})
	}
}

func TestAnotherRootIsNotImportedOverTheCA(t *testing.T) {
	s := newStore(t)
	create(t, s, all)
	c := open(t, s)
	ca, err := minica.New()
	require.NoError(t, err)
	require.EqualError(t, c.Adopt(&Authority{Root: ca.Root}),
		"the root to import ("+x509util.Fingerprint(ca.Root)+") is not the root of this CA ("+x509util.Fingerprint(c.Root)+")")
	require.NoError(t, c.Adopt(&Authority{Root: c.Root}))
}

func snapshot(t *testing.T, s Store) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, dir := range []string{s.Root, s.Certs, s.Secrets} {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			data, err := os.ReadFile(path)
			require.NoError(t, err)
			info, err := e.Info()
			require.NoError(t, err)
			files[path] = info.ModTime().String() + string(data)
		}
	}
	return files
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	require.NoError(t, os.RemoveAll(path))
	require.NoError(t, os.WriteFile(path, data, 0o600))
}

func truncate(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	write(t, path, data[:len(data)/2])
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	require.NoError(t, err)
	write(t, to, data)
}

func certPEM(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func keyPEM(t *testing.T, key any, password config.Secret) []byte {
	t.Helper()
	block, err := pemutil.Serialize(key, pemutil.WithPassword([]byte(password.Reveal())), pemutil.WithPKCS8(true))
	require.NoError(t, err)
	return pem.EncodeToMemory(block)
}

// oldKeyPEM is what "step ca init" writes: RFC 1421 encryption.
func oldKeyPEM(t *testing.T, key any, password config.Secret) []byte {
	t.Helper()
	block, err := pemutil.Serialize(key, pemutil.WithPassword([]byte(password.Reveal())))
	require.NoError(t, err)
	data := pem.EncodeToMemory(block)
	require.True(t, bytes.Contains(data, []byte("DEK-Info")))
	return data
}
