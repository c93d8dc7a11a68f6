package enrol

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/ca"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // step-ca's own words
	os.Exit(m.Run())
}

type host struct {
	*Client
	tokens *ca.Provisioner
}

func start(t *testing.T, o stepcatest.Options) host {
	t.Helper()
	authority, err := stepcatest.New(t.TempDir(), o)
	require.NoError(t, err)
	require.NoError(t, authority.Start())
	t.Cleanup(func() { require.NoError(t, authority.Stop()) })
	client, err := New(authority.URL+"/", authority.Root)
	require.NoError(t, err)
	tokens, err := ca.NewProvisioner(stepcatest.Provisioner, "", authority.URL, []byte(stepcatest.Password),
		ca.WithRootFile(filepath.Join(authority.Certs, "root_ca.crt")))
	require.NoError(t, err)
	return host{client, tokens}
}

func keys(t *testing.T) map[string]crypto.Signer {
	t.Helper()
	all := map[string]crypto.Signer{}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	all["ed25519"] = ed
	for name, curve := range map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()} {
		all[name], err = ecdsa.GenerateKey(curve, rand.Reader)
		require.NoError(t, err)
	}
	all["RSA"], err = rsa.GenerateKey(rand.Reader, 3072)
	require.NoError(t, err)
	return all
}

func public(t *testing.T, key crypto.Signer) ssh.PublicKey {
	t.Helper()
	pub, err := ssh.NewPublicKey(key.Public())
	require.NoError(t, err)
	return pub
}

// One token certifies all keys of a host: the first key's certificate vouches for the others.
func TestSSH(t *testing.T) {
	ca := start(t, stepcatest.Options{SSH: true, Provisioners: provisioner.List{stepcatest.SSHPOP()}})
	all, names := keys(t), []string{"web.internal", "10.0.0.5"}
	token, err := ca.tokens.SSHToken("host", names[0], names)
	require.NoError(t, err)
	first, err := ca.SSHSign(t.Context(), token, public(t, all["ed25519"]), names)
	require.NoError(t, err)
	require.Equal(t, names, first.ValidPrincipals)
	require.Equal(t, uint64((720 * time.Hour).Seconds()), first.ValidBefore-first.ValidAfter-60)

	for name, key := range all {
		t.Run(name, func(t *testing.T) {
			for what, do := range map[string]func() (*ssh.Certificate, error){
				"rekeying": func() (*ssh.Certificate, error) {
					return ca.SSHRekey(t.Context(), first, all["ed25519"], public(t, key))
				},
				"again, since the old one stays good": func() (*ssh.Certificate, error) {
					return ca.SSHRekey(t.Context(), first, all["ed25519"], public(t, key))
				},
			} {
				cert, err := do()
				require.NoError(t, err, what)
				require.Equal(t, names, cert.ValidPrincipals)
				require.Equal(t, first.KeyId, cert.KeyId)
				require.NotEqual(t, first.Serial, cert.Serial)
				require.InDelta(t, first.ValidBefore, cert.ValidBefore, 60)

				renewed, err := ca.SSHRenew(t.Context(), cert, key)
				require.NoError(t, err)
				require.Equal(t, names, renewed.ValidPrincipals)
				require.Equal(t, cert.Key, renewed.Key)
				require.NotEqual(t, cert.Serial, renewed.Serial)
			}
		})
	}

	t.Run("the CA says no", func(t *testing.T) {
		var status *stepca.StatusError
		_, err := ca.SSHRenew(t.Context(), first, all["P-256"]) // the key of somebody else
		require.ErrorAs(t, err, &status)
		require.Equal(t, http.StatusUnauthorized, status.Code)
		_, err = ca.SSHSign(t.Context(), "no token", public(t, all["RSA"]), names)
		require.ErrorAs(t, err, &status)
		_, err = ca.SSHSign(t.Context(), token, public(t, all["RSA"]), names)
		require.ErrorAs(t, err, &status)
		require.Equal(t, http.StatusUnauthorized, status.Code) // it was used
		token, err := ca.tokens.SSHToken("host", names[0], names)
		require.NoError(t, err)
		_, err = ca.SSHSign(t.Context(), token, public(t, all["RSA"]), []string{"db.internal"})
		require.ErrorAs(t, err, &status)
		require.Equal(t, http.StatusForbidden, status.Code) // it is for others
		require.Equal(t, ca.base+"/ssh/sign", status.URL)
	})

	t.Run("the CA's keys", func(t *testing.T) {
		keys, err := ca.SSHKeys(t.Context())
		require.NoError(t, err)
		require.Len(t, keys.User, 1)
		require.Equal(t, keys.Host[0].Marshal(), first.SignatureKey.Marshal())
	})
}

func TestVerifySSH(t *testing.T) {
	_, authority, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	signer, err := ssh.NewSignerFromKey(authority)
	require.NoError(t, err)
	all := keys(t)
	key := public(t, all["P-256"])
	now := uint64(time.Now().Unix()) //nolint:gosec // after 1970
	tests := map[string]struct {
		change func(*ssh.Certificate)
		keys   []ssh.PublicKey
		want   string
	}{
		"what was asked for is good":    {func(*ssh.Certificate) {}, []ssh.PublicKey{key, signer.PublicKey()}, ""},
		"a user certificate":            {func(c *ssh.Certificate) { c.CertType = ssh.UserCert }, []ssh.PublicKey{signer.PublicKey()}, "it is not a host certificate"},
		"another key":                   {func(c *ssh.Certificate) { c.Key = public(t, all["RSA"]) }, []ssh.PublicKey{signer.PublicKey()}, "it is for another key"},
		"a stranger's signature":        {func(*ssh.Certificate) {}, []ssh.PublicKey{key}, "it is signed by a key that is none of the CA's SSH host keys"},
		"a name that is missing":        {func(c *ssh.Certificate) { c.ValidPrincipals = []string{"web.internal"} }, []ssh.PublicKey{signer.PublicKey()}, `principal "10.0.0.5" not in the set of valid principals for given certificate: ["web.internal"]`},
		"an expired one":                {func(c *ssh.Certificate) { c.ValidBefore = now - 1 }, []ssh.PublicKey{signer.PublicKey()}, "cert has expired"},
		"one that is not valid yet":     {func(c *ssh.Certificate) { c.ValidAfter = now + 300 }, []ssh.PublicKey{signer.PublicKey()}, "cert is not yet valid"},
		"one that was changed later on": {nil, []ssh.PublicKey{signer.PublicKey()}, "certificate signature does not verify"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			cert := &ssh.Certificate{
				Key: key, CertType: ssh.HostCert, ValidPrincipals: []string{"web.internal", "10.0.0.5"}, ValidAfter: now - 60, ValidBefore: now + 60,
			}
			if tc.change != nil {
				tc.change(cert)
			}
			require.NoError(t, cert.SignCert(rand.Reader, signer))
			if tc.change == nil {
				cert.Serial++
			}
			err := VerifySSH(cert, key, []string{"web.internal", "10.0.0.5"}, tc.keys)
			if tc.want == "" {
				require.NoError(t, err)
				return
			}
			require.EqualError(t, err, tc.want)
		})
	}
	require.EqualError(t, VerifySSH(nil, key, nil, nil), "there is none in the answer")
}

func TestTLS(t *testing.T) {
	ca := start(t, stepcatest.Options{})
	all, names := keys(t), []string{"web.internal", "10.0.0.5"}
	token, err := ca.tokens.Token(names[0], names...)
	require.NoError(t, err)
	chain, err := ca.TLSSign(t.Context(), token, all["P-256"], names)
	require.NoError(t, err)
	require.Len(t, chain, 2)
	require.Equal(t, names, Names(chain[0]))
	require.Equal(t, names[0], chain[0].Subject.CommonName)

	pair := func(chain []*x509.Certificate, key crypto.Signer) tls.Certificate {
		p := tls.Certificate{PrivateKey: key}
		for _, x := range chain {
			p.Certificate = append(p.Certificate, x.Raw)
		}
		return p
	}
	renewed, err := ca.TLSRenew(t.Context(), pair(chain, all["P-256"]))
	require.NoError(t, err)
	require.Equal(t, names, Names(renewed[0]))
	require.Equal(t, chain[0].PublicKey, renewed[0].PublicKey)
	require.NotEqual(t, chain[0].SerialNumber, renewed[0].SerialNumber)

	rekeyed, err := ca.TLSRekey(t.Context(), pair(renewed, all["P-256"]), all["RSA"])
	require.NoError(t, err)
	require.Equal(t, names, Names(rekeyed[0]))
	require.Equal(t, all["RSA"].Public(), rekeyed[0].PublicKey)

	var status *stepca.StatusError
	_, err = ca.TLSSign(t.Context(), token, all["P-256"], []string{"db.internal"})
	require.ErrorAs(t, err, &status)
	_, err = ca.TLSRenew(t.Context(), tls.Certificate{})
	require.EqualError(t, err, "reading the certificate: it is not a pair of certificate and key")
	_, err = ca.SSHKeys(t.Context())
	require.ErrorIs(t, err, ErrNoSSH)
}

// A stranger's root, an address where nobody is, and a client who gives up.
func TestFailuresAreThoseOfStepca(t *testing.T) {
	authority := start(t, stepcatest.Options{SSH: true})
	other, err := stepcatest.New(t.TempDir(), stepcatest.Options{})
	require.NoError(t, err)
	key := keys(t)["P-256"]
	ask := func(url string, root *x509.Certificate, ctx context.Context) error { //nolint:revive // the context is what varies
		c, err := New(url, root)
		require.NoError(t, err)
		_, err = c.SSHSign(ctx, "token", public(t, key), []string{"web.internal"})
		return err
	}
	err = ask(authority.base, other.Root, t.Context())
	require.ErrorIs(t, err, stepca.ErrUntrusted)
	require.ErrorContains(t, err, `asking "`+authority.base+`/ssh/sign": certificate not trusted: x509: certificate signed by unknown authority`)
	err = ask("https://127.0.0.1:1", other.Root, t.Context())
	require.ErrorIs(t, err, stepca.ErrUnreachable)
	require.EqualError(t, err, `asking "https://127.0.0.1:1/ssh/sign": no answer: dial tcp 127.0.0.1:1: connect: connection refused`)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, ask(authority.base, other.Root, ctx), context.Canceled)
	_, err = New("ca.internal")
	require.ErrorContains(t, err, "is not of the form https://HOST:PORT")
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	for name, key := range keys(t) {
		block, err := ssh.MarshalPrivateKey(key, "")
		require.NoError(t, err)
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, pem.EncodeToMemory(block), 0o600))
		got, err := ReadKey(path)
		require.NoError(t, err)
		require.Equal(t, key.Public(), got.Public())
		require.NoError(t, os.WriteFile(path+".pub", ssh.MarshalAuthorizedKey(public(t, key)), 0o600))
		_, err = ReadSSHCertificate(path + ".pub")
		require.EqualError(t, err, `reading the SSH certificate "`+path+`.pub": it is a key without a certificate`)
		_, err = ReadKey(path + ".pub")
		require.ErrorContains(t, err, "reading the host key")
	}
	_, err := ReadKey(filepath.Join(dir, "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = ReadSSHCertificate(filepath.Join(dir, "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
}
