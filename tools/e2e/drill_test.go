package e2e_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

const toolsImage = "infra-pki/tools:local"

// held is a certificate with its key, and the request by which it came.
type held struct {
	pair    tls.Certificate
	request []byte
}

// hold gets a certificate and keeps what is needed to renew it, and to ask again.
func (c *ca) hold(t *testing.T, name string) held {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{name}}, key)
	require.NoError(t, err)
	h := held{pair: tls.Certificate{PrivateKey: key}}
	h.request, err = json.Marshal(map[string]string{
		"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})), "ott": c.token(t, name),
	})
	require.NoError(t, err)
	status, answer, err := c.sign(t.Context(), h.request)
	require.NoError(t, err)
	require.Equal(t, http.StatusCreated, status, string(answer))
	h.pair.Certificate = chainOf(t, answer)
	return h
}

func chainOf(t *testing.T, answer []byte) (chain [][]byte) {
	t.Helper()
	var out struct{ CertChain []string }
	require.NoError(t, json.Unmarshal(answer, &out))
	for _, cert := range certificates(t, strings.Join(out.CertChain, "\n")) {
		chain = append(chain, cert.Raw)
	}
	return chain
}

// renew asks over mTLS for a successor and verifies it.
func (c *ca) renew(t *testing.T, h held, name string) {
	t.Helper()
	status, answer := c.askForRenewal(t, h)
	require.Equal(t, http.StatusCreated, status, string(answer))
	var chain []*x509.Certificate
	for _, raw := range chainOf(t, answer) {
		cert, err := x509.ParseCertificate(raw)
		require.NoError(t, err)
		chain = append(chain, cert)
	}
	require.NotEqual(t, h.pair.Certificate[0], chain[0].Raw)
	c.verify(t, chain, name)
}

// askForRenewal returns the answer and its status.
func (c *ca) askForRenewal(t *testing.T, h held) (int, []byte) {
	t.Helper()
	transport := c.http.Transport.(*http.Transport).Clone() // as newCA makes it
	transport.TLSClientConfig.Certificates = []tls.Certificate{h.pair}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, c.url+"/1.0/renew", http.NoBody)
	require.NoError(t, err)
	resp, err := (&http.Client{Transport: transport, Timeout: 15 * time.Second}).Do(req)
	require.NoError(t, err)
	defer resp.Body.Close() //nolint:errcheck // read to its end
	var answer bytes.Buffer
	_, err = answer.ReadFrom(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, answer.Bytes()
}

// Invariant 9: a second CA comes out of a backup, on another port and another network,
// and is the first one to its clients.
func TestDrill(t *testing.T) {
	s := stack.New(t, nil)
	work := t.TempDir()
	identity, backups := filepath.Join(work, "identity"), filepath.Join(work, "backups")
	said := stack.Docker(t, "run", "--rm", "--network", "none", "--user", "0:0", "--volume", work+":/work",
		toolsImage, "pkictl", "backup", "keygen", "/work/identity").OK(t)
	s.Set(stack.Settings{"BACKUP_RECIPIENTS": strings.TrimSpace(said.Stdout)})
	s.Up()
	root := rootOf(t, s)
	before := newCA(t, s)
	kept := before.hold(t, "kept.e2e.test")
	issued := s.SQL("select count(*) from x509_certs")

	t.Setenv("ENV_FILE", s.EnvFile())
	t.Setenv("BACKUP_DIR", backups)
	backup := func() string {
		t.Helper()
		earlier, _ := filepath.Glob(filepath.Join(backups, "*")) // the pattern is good
		s.Make("backup").OK(t)
		files, err := filepath.Glob(filepath.Join(backups, "*"))
		require.NoError(t, err)
		files = slices.DeleteFunc(files, func(f string) bool { return slices.Contains(earlier, f) })
		require.Len(t, files, 1)
		info, err := os.Stat(files[0])
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode())
		return files[0]
	}
	verify := func(archive string) {
		t.Helper()
		t.Setenv("ARCHIVE", archive)
		t.Setenv("IDENTITY", identity)
		require.Contains(t, s.Make("verify").OK(t).Stdout, "\nroot          "+root+"\n")
	}
	began := time.Now()
	archive := backup()
	info, err := os.Stat(archive)
	require.NoError(t, err)
	t.Logf("make backup: %.1f s, %d bytes", time.Since(began).Seconds(), info.Size())
	require.Equal(t, fmt.Sprintf("%d|%s", info.Size(), issued), s.SQL("select bytes, certificates from infra_pki.backups"))
	verify(archive)
	data, err := os.ReadFile(archive)
	require.NoError(t, err)
	require.Empty(t, s.Find(string(data)))

	t.Run("a backup while certificates are issued is whole", func(t *testing.T) {
		var requests [300][]byte
		for i := range requests {
			requests[i] = before.signRequest(t, before.token(t, "busy.e2e.test"), "busy.e2e.test")
		}
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for _, request := range requests {
				select {
				case <-stop:
					return
				default:
					_, _, _ = before.sign(t.Context(), request) // it is only work for the database
				}
			}
		}()
		busy := backup()
		close(stop)
		<-done
		verify(busy)
	})

	t.Run("the stack that made it is not empty, and stays as it is", func(t *testing.T) {
		containers, files := s.Containers(), s.Snapshot(stack.Rendered...)
		refused := restoreInto(t, s, identity, archive)
		require.NotZero(t, refused.Code)
		require.Contains(t, refused.Output(), "pkictl: error: the stack is not empty: its database belongs to the CA with root "+root)
		require.Equal(t, files, s.Snapshot(stack.Rendered...), "files changed")
		requireSameProcesses(t, containers, s.Containers())
		before.issue(t, "untouched.e2e.test")
	})

	t.Run("its .env is the stack's, to the byte", func(t *testing.T) {
		stack.Docker(t, "run", "--rm", "--network", "none", "--user", "0:0", "--volume", work+":/work",
			toolsImage, "pkictl", "backup", "files", "--identity", "/work/identity", "--into", "/work/checkout", "/work/backups/"+filepath.Base(archive)).OK(t)
		require.Equal(t, contentOf(t, s.EnvFile()), contentOf(t, work, "checkout", ".env"))
		require.Equal(t, checkedIn(t, "step-ca", "templates", "tls-leaf.tpl"), contentOf(t, work, "checkout", "step-ca", "templates", "tls-leaf.tpl"))
	})

	s.Down() // as after the loss of a machine
	scratch := stack.New(t, nil)
	scratch.Compose("create").OK(t)
	files := scratch.Snapshot(stack.Rendered...)

	for name, damage := range map[string]func(data []byte) []byte{
		"corrupted": func(data []byte) []byte { data[len(data)/2] ^= 1; return data },
		"truncated": func(data []byte) []byte { return data[:len(data)-1] },
		"empty":     func([]byte) []byte { return nil },
	} {
		t.Run("an archive that is "+name+" changes nothing", func(t *testing.T) {
			bad := filepath.Join(t.TempDir(), "bad.age")
			require.NoError(t, os.WriteFile(bad, damage(slices.Clone(data)), 0o600))
			refused := restoreInto(t, scratch, identity, bad)
			require.NotZero(t, refused.Code)
			require.Contains(t, refused.Output(), "pkictl: error: reading the archive: it is ")
			require.Contains(t, refused.Output(), "pkictl: hint: nothing was changed")
			require.Equal(t, files, scratch.Snapshot(stack.Rendered...), "files changed")
			require.Equal(t, "0", scratch.SQL("select count(*) from pg_tables where schemaname in ('public', 'infra_pki')"))
		})
	}
	t.Run("another identity changes nothing", func(t *testing.T) {
		stack.Docker(t, "run", "--rm", "--network", "none", "--user", "0:0", "--volume", work+":/work",
			toolsImage, "pkictl", "backup", "keygen", "/work/other").OK(t)
		refused := restoreInto(t, scratch, filepath.Join(work, "other"), archive)
		require.NotZero(t, refused.Code)
		require.Contains(t, refused.Output(), "pkictl: error: reading the archive: the identity does not open it")
		require.Equal(t, files, scratch.Snapshot(stack.Rendered...), "files changed")
	})

	t.Run("killed half-way, no other CA is made of what is there, and the next run continues", func(t *testing.T) {
		restoreInto(t, scratch, identity, archive).OK(t)
		require.Equal(t, issued, scratch.SQL("select count(*) from x509_certs"))
		// What a run that was killed before its last file leaves.
		stack.Docker(t, "run", "--rm", "--network", "none", "--volume", scratch.Volume("step-ca-certs")+":/certs",
			"debian:bookworm-slim", "rm", "/certs/root_ca.crt").OK(t)
		require.NotZero(t, scratch.Compose("up", "-d", "--wait").Code)
		require.Contains(t, scratch.Logs("provisioner-init"), `provisioner-init: error: the root certificate "/home/step/certs/root_ca.crt" is missing`)
		again := restoreInto(t, scratch, identity, archive).OK(t)
		require.Contains(t, again.Output(), "msg=created item=certs/root_ca.crt")
		require.Equal(t, 1, strings.Count(again.Output(), "msg=created"))
	})

	begin := time.Now()
	scratch.Up()
	t.Logf("up after the restore: %.1f s", time.Since(begin).Seconds())
	require.Equal(t, root, rootOf(t, scratch))
	scratch.Compose("run", "--rm", "--no-deps", "-T", "provisioner-init", "--check").OK(t)
	after := newCA(t, scratch)

	t.Run("a certificate from before is renewed", func(t *testing.T) { after.renew(t, kept, "kept.e2e.test") })
	t.Run("a token that was used before is refused", func(t *testing.T) {
		status, answer, err := after.sign(t.Context(), kept.request)
		require.NoError(t, err)
		require.Equal(t, http.StatusUnauthorized, status, string(answer))
	})
	t.Run("a token is good for one certificate", func(t *testing.T) {
		ca := openCA(t, scratch)
		for range 5 {
			body, err := ca.SignBody("race.e2e.test")
			require.NoError(t, err)
			require.Equal(t, 1, together(t, func(ctx context.Context, _ int) error {
				_, err := ca.Sign(ctx, body)
				return err
			}))
		}
	})
	t.Run("a new certificate is issued", func(t *testing.T) { after.issue(t, "new.e2e.test") })
	t.Run("all this told no secret", func(t *testing.T) { requireUntold(t, scratch) })
}

// restoreInto does what "make restore" does between .env and the start.
func restoreInto(t *testing.T, s *stack.Stack, identity, archive string) stack.Result {
	t.Helper()
	t.Setenv("ARCHIVE", archive)
	t.Setenv("IDENTITY", identity)
	return s.Make("load")
}
