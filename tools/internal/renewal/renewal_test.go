package renewal

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/ca"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/enrol"
	"github.com/infra-pki/infra-pki/tools/internal/host"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // step-ca's own words
	os.Exit(m.Run())
}

// machine is a host with a TLS and an SSH certificate of a real CA, each good for a day
// or more, and a clock of its own.
type machine struct {
	*Renewal
	t        *testing.T
	tls, ssh Pair
	sshd     int // how often it was told
	said     bytes.Buffer
}

var authority struct {
	*stepcatest.CA
	client *enrol.Client
	tokens *ca.Provisioner
}

// startCA starts one CA for all tests of this package.
func startCA(t *testing.T) {
	t.Helper()
	a, err := stepcatest.New(t.TempDir(), stepcatest.Options{SSH: true, Provisioners: provisioner.List{stepcatest.SSHPOP()}})
	require.NoError(t, err)
	require.NoError(t, a.Start())
	t.Cleanup(func() { require.NoError(t, a.Stop()) })
	authority.CA = a
	authority.client, err = enrol.New(a.URL, a.Root)
	require.NoError(t, err)
	authority.tokens, err = ca.NewProvisioner(stepcatest.Provisioner, "", a.URL, []byte(stepcatest.Password),
		ca.WithRootFile(filepath.Join(a.Certs, "root_ca.crt")))
	require.NoError(t, err)
}

// newMachine enrols with an ECDSA key for TLS and with key for SSH.
func newMachine(t *testing.T, key crypto.Signer) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{
		t:   t,
		tls: Pair{Kind: TLS, Cert: filepath.Join(dir, "web.crt"), Key: filepath.Join(dir, "web.key"), Reload: "echo told >>" + filepath.Join(dir, "told")},
		ssh: Pair{Kind: SSH, Cert: filepath.Join(dir, "ssh_host_key-cert.pub"), Key: filepath.Join(dir, "ssh_host_key")},
	}
	names := []string{"web.internal", "10.0.0.5"}
	own, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	require.NoError(t, err)
	token, err := authority.tokens.Token(names[0], names...)
	require.NoError(t, err)
	chain, err := authority.client.TLSSign(t.Context(), token, own, names)
	require.NoError(t, err)
	c, err := tlsContent(chain, own)
	require.NoError(t, err)
	m.write(m.tls, c)

	public, err := ssh.NewPublicKey(key.Public())
	require.NoError(t, err)
	token, err = authority.tokens.SSHToken("host", names[0], names)
	require.NoError(t, err)
	cert, err := authority.client.SSHSign(t.Context(), token, public, names)
	require.NoError(t, err)
	c, err = sshContent(cert, key)
	require.NoError(t, err)
	m.write(m.ssh, c)

	m.Renewal = &Renewal{
		Pairs: []Pair{m.ssh, m.tls}, Scheduled: true, Dir: filepath.Join(dir, "state"), Now: time.Now,
		CA:   func() (*enrol.Client, error) { return authority.client, nil },
		SSHD: func(context.Context, []*ssh.Certificate) error { m.sshd++; return nil },
		Log:  slog.New(slog.NewTextHandler(&m.said, nil)),
	}
	return m
}

func (m *machine) write(p Pair, c content) {
	m.t.Helper()
	require.NoError(m.t, os.WriteFile(p.Key, c.key, 0o640))   //nolint:gosec // G306: renewing must keep it
	require.NoError(m.t, os.WriteFile(p.Cert, c.cert, 0o604)) //nolint:gosec // G306: as above
}

// at moves the clock to a point in the life of the TLS certificate: 0 is its beginning,
// 1 its end.
func (m *machine) at(part float64) {
	m.t.Helper()
	c := m.read(m.tls)
	now := c.From.Add(time.Duration(float64(c.Until.Sub(c.From)) * part))
	m.Now = func() time.Time { return now }
}

func (m *machine) read(p Pair) *Certificate {
	m.t.Helper()
	c, err := p.Read()
	require.NoError(m.t, err)
	return c
}

// told is how often the reload command ran.
func (m *machine) told() int {
	text, err := os.ReadFile(filepath.Join(filepath.Dir(m.tls.Cert), "told"))
	if err != nil {
		return 0
	}
	return strings.Count(string(text), "told\n")
}

func (m *machine) results() Results {
	m.t.Helper()
	r, err := Load(m.Dir)
	require.NoError(m.t, err)
	return r
}

func newKeys(t *testing.T) map[string]crypto.Signer {
	t.Helper()
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	ec, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	require.NoError(t, err)
	rs, err := rsa.GenerateKey(rand.Reader, 3072)
	require.NoError(t, err)
	return map[string]crypto.Signer{"ed25519": ed, "ECDSA": ec, "RSA": rs}
}

func TestRenewal(t *testing.T) {
	startCA(t)
	keys := newKeys(t)
	ed := keys["ed25519"]

	t.Run("before two thirds of its life a certificate stays", func(t *testing.T) {
		m := newMachine(t, ed)
		m.at(0.66)
		before := snapshot(t, m)
		require.NoError(t, m.Run(t.Context()))
		require.Equal(t, before, snapshot(t, m))
		require.Zero(t, m.told()+m.sshd)
		require.Contains(t, m.said.String(), "msg=unchanged certificate="+m.tls.Cert)
		require.Equal(t, Results{LastRun: m.Now().UTC(), LastSuccess: m.Now().UTC(), Certificates: map[string]Result{m.tls.Cert: {}, m.ssh.Cert: {}}}, utc(m.results()))
	})

	t.Run("past two thirds it is renewed, each on its own, and who uses it is told once", func(t *testing.T) {
		m := newMachine(t, ed)
		m.at(0.67)
		tls, ssh, before := m.read(m.tls), m.read(m.ssh), snapshot(t, m)
		require.NoError(t, m.Run(t.Context()))
		after := snapshot(t, m)
		require.Equal(t, before[m.tls.Key], after[m.tls.Key])
		require.Equal(t, before[m.ssh.Cert], after[m.ssh.Cert]) // good for 30 days
		require.NotEqual(t, before[m.tls.Cert], after[m.tls.Cert])
		require.NotEqual(t, tls.Serial, m.read(m.tls).Serial)
		require.Equal(t, tls.Names, m.read(m.tls).Names)
		require.Equal(t, ssh.Serial, m.read(m.ssh).Serial)
		require.Equal(t, 1, m.told())
		require.Zero(t, m.sshd)
		require.True(t, m.results().Certificates[m.tls.Cert].Renewed.Equal(m.Now()))

		m.at(0)
		require.NoError(t, m.Run(t.Context()))
		require.Equal(t, after, snapshot(t, m))
		require.Equal(t, 1, m.told())
	})

	for name, key := range keys {
		t.Run("by force, also with a new key, which is like the old: SSH with "+name, func(t *testing.T) {
			m := newMachine(t, key)
			m.Force = true
			tls, ssh := m.read(m.tls), m.read(m.ssh)
			require.NoError(t, m.Run(t.Context()))
			require.NotEqual(t, ssh.Serial, m.read(m.ssh).Serial)
			require.Equal(t, ssh.key.Public(), m.read(m.ssh).key.Public())
			require.Equal(t, 1, m.sshd)

			m.Rekey = true
			require.NoError(t, m.Run(t.Context()))
			for _, p := range []Pair{m.tls, m.ssh} {
				old := map[Kind]*Certificate{TLS: tls, SSH: ssh}[p.Kind]
				now := m.read(p)
				require.IsType(t, old.key, now.key)
				require.NotEqual(t, old.key.Public(), now.key.Public())
				require.Equal(t, old.Names, now.Names)
				for path, mode := range map[string]os.FileMode{p.Key: 0o640, p.Cert: 0o604} {
					info, err := os.Stat(path)
					require.NoError(t, err)
					require.Equal(t, mode, info.Mode(), path)
				}
			}
			public, err := os.ReadFile(m.ssh.Key + ".pub")
			require.NoError(t, err)
			require.Equal(t, ssh.ssh.Type(), m.read(m.ssh).ssh.Type())
			require.True(t, bytes.HasPrefix(public, []byte(m.read(m.ssh).ssh.Key.Type()+" ")))
			require.Equal(t, 2, m.told())
			require.Equal(t, 2, m.sshd)
			require.NoFileExists(t, staged(m.ssh.Key))
		})
	}

	t.Run("a dry run says what would be done", func(t *testing.T) {
		m := newMachine(t, ed)
		m.at(0.9)
		m.DryRun = true
		before := snapshot(t, m)
		require.NoError(t, m.Run(t.Context()))
		require.Equal(t, before, snapshot(t, m))
		require.Contains(t, m.said.String(), `msg="would be renewed" certificate=`+m.tls.Cert)
		require.NoDirExists(t, m.Dir)
	})

	t.Run("one that has expired is an error, and the others are looked after", func(t *testing.T) {
		m := newMachine(t, ed)
		m.at(1)
		m.Pairs = []Pair{m.tls, m.ssh}
		err := m.Run(t.Context())
		require.ErrorIs(t, err, ErrExpired)
		require.ErrorContains(t, err, `renewing "`+m.tls.Cert+`": it expired on `)
		require.Contains(t, m.said.String(), "msg=unchanged certificate="+m.ssh.Cert)
		r := m.results()
		require.Equal(t, []string{err.Error()}, r.Errors)
		require.True(t, r.LastFailure.Equal(m.Now()))
		require.Zero(t, r.LastSuccess)
		require.Equal(t, err.Error(), r.Certificates[m.tls.Cert].Error)
		require.Empty(t, r.Certificates[m.ssh.Cert].Error)
	})

	t.Run("with a clock before the certificate's beginning nothing is decided", func(t *testing.T) {
		m := newMachine(t, ed)
		m.at(-100)
		before := snapshot(t, m)
		require.NoError(t, m.Run(t.Context()))
		require.Equal(t, before, snapshot(t, m))
		require.Contains(t, m.said.String(), `level=WARN msg="not valid yet`)
	})

	t.Run("a clock that jumps ahead and back renews once", func(t *testing.T) {
		m := newMachine(t, ed)
		m.at(0.8)
		require.NoError(t, m.Run(t.Context()))
		renewed := m.read(m.tls).Serial
		m.at(0.01)
		require.NoError(t, m.Run(t.Context()))
		require.Equal(t, renewed, m.read(m.tls).Serial)
		require.Equal(t, 1, m.told())
	})

	t.Run("what the CA refuses is in the results until it does not", func(t *testing.T) {
		m := newMachine(t, ed)
		m.at(0.9)
		away := errors.New("away")
		m.CA = func() (*enrol.Client, error) { return nil, away }
		before := snapshot(t, m)
		require.ErrorIs(t, m.Run(t.Context()), away)
		require.Equal(t, before, snapshot(t, m))
		require.Contains(t, m.results().Certificates[m.tls.Cert].Error, ": away")
		m.CA = func() (*enrol.Client, error) { return authority.client, nil }
		require.NoError(t, m.Run(t.Context()))
		require.Empty(t, m.results().Certificates[m.tls.Cert].Error)
		require.Empty(t, m.results().Errors)
		require.False(t, m.results().LastFailure.IsZero())
	})

	t.Run("nobody answers", func(t *testing.T) {
		m := newMachine(t, ed)
		m.at(0.9)
		m.CA = func() (*enrol.Client, error) { return enrol.New("https://127.0.0.1:1", authority.Root) }
		require.ErrorIs(t, m.Run(t.Context()), stepca.ErrUnreachable)
	})

	t.Run("a reload command that fails is tried again, although nothing is due any more", func(t *testing.T) {
		m := newMachine(t, ed)
		m.at(0.9)
		switchedOn := filepath.Join(t.TempDir(), "on")
		m.tls.Reload = "echo no such service >&2; test -e " + switchedOn + " && " + m.tls.Reload
		m.Pairs = []Pair{m.tls}
		for range 2 {
			require.EqualError(t, m.Run(t.Context()), fmt.Sprintf("running the reload command %q: exit status 1: %q", m.tls.Reload, "no such service"))
			require.NotEmpty(t, m.results().Certificates[m.tls.Cert].Error)
			m.at(0.1)
		}
		require.NoError(t, os.WriteFile(switchedOn, nil, 0o600))
		require.NoError(t, m.Run(t.Context()))
		require.NoError(t, m.Run(t.Context()))
		require.Equal(t, 1, m.told())
	})

	t.Run("two certificates with one reload command have it run once", func(t *testing.T) {
		m, other := newMachine(t, ed), newMachine(t, ed)
		other.tls.Reload = m.tls.Reload
		m.Pairs = []Pair{m.tls, other.tls}
		m.Force = true
		require.NoError(t, m.Run(t.Context()))
		require.Equal(t, 1, m.told())
	})

	t.Run("damaged results are begun anew", func(t *testing.T) {
		m := newMachine(t, ed)
		require.NoError(t, os.MkdirAll(m.Dir, 0o750))
		require.NoError(t, os.WriteFile(filepath.Join(m.Dir, resultsName), []byte("{"), 0o600))
		require.NoError(t, m.Run(t.Context()))
		require.False(t, m.results().LastSuccess.IsZero())
	})

	t.Run("runs take turns", func(t *testing.T) {
		m := newMachine(t, ed)
		require.NoError(t, os.MkdirAll(m.Dir, 0o750))
		unlock, err := lock(t.Context(), filepath.Join(m.Dir, lockName))
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, m.Run(ctx), context.DeadlineExceeded)
		unlock()
		require.NoError(t, m.Run(t.Context()))
	})

	t.Run("killed at any instant of a replacement", func(t *testing.T) {
		m := newMachine(t, ed)
		require.NoError(t, m.Run(t.Context()))
		for _, p := range []Pair{m.tls, m.ssh} {
			for point := range 2 * len(p.files()) {
				t.Run(fmt.Sprintf("%s: after step %d", p.Kind, point), func(t *testing.T) { killedAt(t, m, p, point) })
			}
		}
	})

	t.Run("a newer pair than the one that a killed run left stays", func(t *testing.T) {
		m := newMachine(t, ed)
		next := m.successor(m.tls)
		require.NoError(t, stage(m.tls.Key, next.key))
		require.NoError(t, stage(m.tls.Cert, next.cert))
		left, err := m.tls.read(staged(m.tls.Cert), staged(m.tls.Key))
		require.NoError(t, err)
		var newer content
		require.Eventually(t, func() bool { // certificates have whole seconds
			newer = m.successor(m.tls)
			m.write(m.tls, newer)
			return m.read(m.tls).Until.After(left.Until)
		}, 5*time.Second, 200*time.Millisecond)
		require.NoError(t, m.Run(t.Context()))
		data, err := os.ReadFile(m.tls.Cert)
		require.NoError(t, err)
		require.Equal(t, string(newer.cert), string(data))
		require.NoFileExists(t, staged(m.tls.Cert))
		require.NoFileExists(t, staged(m.tls.Key))
	})
}

// successor is a certificate for a new key.
func (m *machine) successor(p Pair) content {
	m.t.Helper()
	m.Rekey = true
	defer func() { m.Rekey = false }()
	c, err := m.ask(m.t.Context(), p, m.read(p))
	require.NoError(m.t, err)
	return c
}

// killedAt does the first steps of a replacement, of which the first half stage and the
// others rename, and then runs anew. Whatever the point, afterwards key and certificate
// belong together, nothing is left over, and if the new pair is in place its user was told.
func killedAt(t *testing.T, m *machine, p Pair, point int) {
	t.Helper()
	files := p.files()
	m.Pairs = []Pair{p}
	before, told := m.read(p), m.told()+m.sshd
	next := m.successor(p)
	data := map[string][]byte{p.Key: next.key, p.Key + ".pub": next.public, p.Cert: next.cert}
	require.NoError(t, m.pending(p))
	for i := range min(point, len(files)) {
		require.NoError(t, stage(files[i], data[files[i]]))
	}
	if point < len(files) { // in the middle of the next step
		require.NoError(t, os.WriteFile(filepath.Join(filepath.Dir(p.Key), "."+filepath.Base(staged(files[point]))+".1.tmp"), []byte("half"), 0o600))
	}
	for i := range max(0, point-len(files)) {
		require.NoError(t, durable.Rename(staged(files[i]), files[i]))
	}

	require.NoError(t, m.Run(t.Context()))
	after := m.read(p)
	require.Equal(t, point >= len(files), after.Serial != before.Serial)
	require.Equal(t, told+1, m.told()+m.sshd)
	entries, err := filepath.Glob(filepath.Join(filepath.Dir(p.Key), ".*"))
	require.NoError(t, err)
	require.Empty(t, entries)
	require.NoError(t, m.Run(t.Context()))
	require.Equal(t, told+1, m.told()+m.sshd)
}

func TestUnusable(t *testing.T) {
	dir := t.TempDir()
	p := Pair{Kind: TLS, Cert: filepath.Join(dir, "c"), Key: filepath.Join(dir, "k")}
	pairs := map[string]content{}
	for _, name := range []string{"one", "two"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		require.NoError(t, err)
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{}, &x509.Certificate{}, key.Public(), key)
		require.NoError(t, err)
		cert, err := x509.ParseCertificate(der)
		require.NoError(t, err)
		pairs[name], err = tlsContent([]*x509.Certificate{cert}, key)
		require.NoError(t, err)
	}
	tests := map[string]struct {
		key, cert []byte
		want      string
	}{
		"a key of another certificate": {pairs["one"].key, pairs["two"].cert, "private key does not match public key"},
		"half a certificate":           {pairs["one"].key, pairs["one"].cert[:100], "failed to find any PEM data in certificate input"},
		"a key with a password":        {pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")}), pairs["one"].cert, "failed to parse private key"},
		"no key":                       {nil, pairs["one"].cert, "no such file or directory"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(p.Cert, tc.cert, 0o600))
			_ = os.Remove(p.Key)
			if tc.key != nil {
				require.NoError(t, os.WriteFile(p.Key, tc.key, 0o600))
			}
			_, err := p.Read()
			require.ErrorContains(t, err, tc.want)
		})
	}
	t.Run("a link", func(t *testing.T) {
		require.NoError(t, os.WriteFile(p.Key, nil, 0o600))
		require.NoError(t, os.Remove(p.Cert))
		require.NoError(t, os.Symlink(p.Key, p.Cert))
		_, err := p.Read()
		require.EqualError(t, err, fmt.Sprintf("reading a certificate and its key: %q is not a regular file", p.Cert))
	})
}

func TestDue(t *testing.T) {
	from := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, tc := range map[string]struct{ life, due time.Duration }{
		"a day":                    {24 * time.Hour, 16 * time.Hour},
		"a minute":                 {time.Minute, 40 * time.Second},
		"longer than a Duration":   {1<<63 - 1, (1<<63 - 1) / 3 * 2},
		"a certificate of no time": {0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			c := Certificate{From: from, Until: from.Add(tc.life)}
			require.Equal(t, from.Add(tc.due), c.Due())
		})
	}
}

func TestPairs(t *testing.T) {
	require.Empty(t, Pairs(host.Record{}))
	require.Equal(t, []Pair{
		{Kind: SSH, Cert: "/etc/ssh/a-cert.pub", Key: "/etc/ssh/a"},
		{Kind: TLS, Cert: "/c", Key: "/k", Reload: "true"},
	}, Pairs(host.Record{SSH: &host.SSH{Keys: []string{"/etc/ssh/a"}}, TLS: []host.TLS{{Cert: "/c", Key: "/k", Reload: "true"}}}))
}

func TestTextfile(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{NotAfter: time.Unix(1800000000, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	c, err := tlsContent([]*x509.Certificate{cert}, key)
	require.NoError(t, err)
	t.Chdir(dir)
	p := Pair{Kind: TLS, Cert: "web.crt", Key: "web.key"}
	require.NoError(t, os.WriteFile(p.Cert, c.cert, 0o600))
	require.NoError(t, os.WriteFile(p.Key, c.key, 0o600))

	r := Results{
		LastSuccess: time.Unix(1700000000, 5), LastFailure: time.Unix(1700000900, 0),
		Certificates: map[string]Result{"gone-cert.pub": {Error: "no answer"}},
	}
	require.NoError(t, r.Textfile("out.prom", []Pair{p, {Kind: SSH, Cert: "gone-cert.pub", Key: "gone"}}))
	got, err := os.ReadFile("out.prom")
	require.NoError(t, err)
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, string(want), string(got))
}

var golden = func() string {
	path, err := filepath.Abs("testdata/textfile.prom") // before a test leaves the directory
	if err != nil {
		panic(err)
	}
	return path
}()

// snapshot is the inode, the time and the content of each file of a machine.
func snapshot(t *testing.T, m *machine) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, p := range []Pair{m.tls, m.ssh} {
		for _, path := range []string{p.Key, p.Cert} {
			info, err := os.Stat(path)
			require.NoError(t, err)
			data, err := os.ReadFile(path)
			require.NoError(t, err)
			files[path] = fmt.Sprint(info.ModTime().UnixNano(), info.Mode(), string(data))
		}
	}
	return files
}

func utc(r Results) Results {
	r.LastRun, r.LastSuccess = r.LastRun.UTC(), r.LastSuccess.UTC()
	return r
}
