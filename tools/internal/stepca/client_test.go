package stepca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // step-ca's own words
	os.Exit(m.Run())
}

func TestRealCA(t *testing.T) {
	other, err := stepcatest.New(t.TempDir(), stepcatest.Options{})
	require.NoError(t, err)
	ca := start(t, stepcatest.Options{SSH: true})
	c, err := New(ca.URL, ca.Root)
	require.NoError(t, err)

	t.Run("it is healthy", func(t *testing.T) {
		require.NoError(t, c.Health(t.Context()))
	})
	t.Run("it serves its root", func(t *testing.T) {
		data, err := c.RootsPEM(t.Context())
		require.NoError(t, err)
		block, rest := pem.Decode(data)
		require.Empty(t, rest)
		require.Equal(t, ca.Root.Raw, block.Bytes)
	})
	t.Run("it serves its SSH CA keys", func(t *testing.T) {
		keys, err := c.SSHRoots(t.Context())
		require.NoError(t, err)
		require.Len(t, keys.Host, 1)
		require.Len(t, keys.User, 1)
		want, err := os.ReadFile(filepath.Join(ca.Certs, "ssh_host_ca_key.pub"))
		require.NoError(t, err)
		require.Equal(t, string(want), string(ssh.MarshalAuthorizedKey(keys.Host[0])))
	})
	t.Run("each replica behind its name proves itself under that name", func(t *testing.T) {
		replicas, err := c.Replicas(t.Context())
		require.NoError(t, err)
		require.Len(t, replicas, 1)
		for address, replica := range replicas {
			require.True(t, address.IsLoopback())
			require.NoError(t, replica.Health(t.Context()))
			// A replica elsewhere is the one that is asked.
			elsewhere := *replica
			elsewhere.at = netip.MustParseAddr("127.66.0.1")
			elsewhere.http = elsewhere.client()
			require.ErrorIs(t, elsewhere.Health(t.Context()), ErrUnreachable)
		}
	})
	t.Run("another root does not verify it", func(t *testing.T) {
		stranger, err := New(ca.URL, other.Root)
		require.NoError(t, err)
		require.ErrorIs(t, stranger.Health(t.Context()), ErrUntrusted)
	})
	t.Run("a wrong password does not open the provisioner's key", func(t *testing.T) {
		_, err := c.JWK(t.Context(), stepcatest.Provisioner, "wrong")
		require.ErrorIs(t, err, ErrPassword)
		require.EqualError(t, err, `opening the key of provisioner "admin": wrong password`)
	})
	t.Run("an unknown provisioner is named", func(t *testing.T) {
		_, err := c.JWK(t.Context(), "nobody", stepcatest.Password)
		require.ErrorIs(t, err, ErrNoProvisioner)
	})
	t.Run("it issues and renews", func(t *testing.T) {
		jwk, err := c.JWK(t.Context(), stepcatest.Provisioner, stepcatest.Password)
		require.NoError(t, err)
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		require.NoError(t, err)
		first, err := c.Issue(t.Context(), jwk, "host.internal", 5*time.Minute, key)
		require.NoError(t, err)
		require.Equal(t, []string{"host.internal"}, first.Leaf().DNSNames)
		require.WithinDuration(t, time.Now().Add(5*time.Minute), first.Leaf().NotAfter, time.Minute)
		second, err := c.Renew(t.Context(), first)
		require.NoError(t, err)
		require.NotEqual(t, first.Leaf().SerialNumber, second.Leaf().SerialNumber)

		t.Run("and refuses a lifetime beyond its claims", func(t *testing.T) {
			_, err := c.Issue(t.Context(), jwk, "host.internal", 1000*time.Hour, key)
			var status *StatusError
			require.ErrorAs(t, err, &status)
			require.Equal(t, http.StatusForbidden, status.Code)
			require.Contains(t, status.Message, "more than the authorized maximum certificate duration")
		})
		t.Run("and a certificate is verified against name, key and roots", func(t *testing.T) {
			require.ErrorContains(t, c.Verify(first.Chain, key.Public(), "other.internal"), "not other.internal")
			stolen, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			require.NoError(t, err)
			require.EqualError(t, c.Verify(first.Chain, stolen.Public(), "host.internal"), "it is for another key")
			stranger, err := New(ca.URL, other.Root)
			require.NoError(t, err)
			require.ErrorContains(t, stranger.Verify(first.Chain, key.Public(), "host.internal"), "unknown authority")
			require.EqualError(t, c.Verify(nil, key.Public(), "host.internal"), "there is none in the answer")
		})
	})
}

// More than step-ca tells at a time, and than a client may ask for at a time.
func TestProvisionersOfManyPages(t *testing.T) {
	var many provisioner.List
	names := []string{stepcatest.Provisioner}
	for i := range 130 {
		names = append(names, fmt.Sprintf("acme-%d", i))
		many = append(many, &provisioner.ACME{Type: "ACME", Name: names[i+1]})
	}
	ca := start(t, stepcatest.Options{Provisioners: many})
	c, err := New(ca.URL, ca.Root)
	require.NoError(t, err)
	all, err := c.Provisioners(t.Context())
	require.NoError(t, err)
	var got []string
	for _, data := range all {
		var p struct{ Name string }
		require.NoError(t, json.Unmarshal(data, &p))
		got = append(got, p.Name)
	}
	require.ElementsMatch(t, names, got)
}

func TestProvisionersWithoutEndAreGivenUp(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"provisioners":[],"nextCursor":"again"}`) // httptest
	}))
	t.Cleanup(srv.Close)
	c, err := New(srv.URL, srv.Certificate())
	require.NoError(t, err)
	_, err = c.Provisioners(t.Context())
	require.EqualError(t, err, `asking "`+srv.URL+`/provisioners": the list has no end`)
}

func TestNoSSHCAHasNoKeys(t *testing.T) {
	ca := start(t, stepcatest.Options{})
	c, err := New(ca.URL, ca.Root)
	require.NoError(t, err)
	keys, err := c.SSHRoots(t.Context())
	require.NoError(t, err)
	require.Equal(t, SSHKeys{}, keys)
}

func TestAddress(t *testing.T) {
	for _, bad := range []string{
		"", "step-ca:9000", "http://step-ca:9000", "https://", "https://ca/acme", "https://u:p@ca", "https://ca?x=1", "https://ca#x", "https://ca:x",
	} {
		_, err := New(bad)
		require.Error(t, err, bad)
	}
	c, err := New("https://ca.internal:9000/")
	require.NoError(t, err)
	require.Equal(t, "https://ca.internal:9000", c.base)
}

func TestFailures(t *testing.T) {
	refused := listen(t)
	require.NoError(t, refused.Close())
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	tests := map[string]struct {
		url  string
		want error
	}{
		"nobody listens":                          {"https://" + refused.Addr().String(), ErrUnreachable},
		"the name does not exist":                 {"https://no-such-host.invalid:9000", ErrUnreachable},
		"the connection is closed at once":        {"https://" + closer(t, false), ErrClosed},
		"the connection is reset after the hello": {"https://" + closer(t, true), ErrClosed},
		"what answers is not TLS":                 {"https" + strings.TrimPrefix(plain.URL, "http"), ErrUntrusted},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c, err := New(tc.url)
			require.NoError(t, err)
			err = c.Health(t.Context())
			require.ErrorIs(t, err, tc.want)
			require.True(t, strings.HasPrefix(err.Error(), `asking "`+tc.url+`/health": `), err.Error())
		})
	}
}

func TestAnswersAreBounded(t *testing.T) {
	tests := map[string]struct {
		answer http.HandlerFunc
		want   string
	}{
		"a body without end": {func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(make([]byte, maxBody+1)) // the client hangs up
		}, "the answer is larger than 1048576 bytes"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://elsewhere.invalid", http.StatusFound)
		}, "status 302"},
		"step-ca's own words": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"status":401,"message":"no \u001b[31mway"}`) // httptest
		}, `status 401, "no \x1b[31mway"`},
		"something that is not JSON": {func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "<html>") // httptest
		}, "reading the answer: invalid character '<' looking for beginning of value"},
		"another state than ok": {func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"status":"ill"}`) // httptest
		}, `the CA says that it is "ill"`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewTLSServer(tc.answer)
			t.Cleanup(srv.Close)
			c, err := New(srv.URL, srv.Certificate())
			require.NoError(t, err)
			err = c.Health(t.Context())
			require.ErrorContains(t, err, tc.want)
			require.False(t, errors.Is(err, ErrUnreachable) || errors.Is(err, ErrClosed))
		})
	}
}

func start(t *testing.T, o stepcatest.Options) *stepcatest.CA {
	t.Helper()
	ca, err := stepcatest.New(t.TempDir(), o)
	require.NoError(t, err)
	require.NoError(t, ca.Start())
	t.Cleanup(func() { require.NoError(t, ca.Stop()) })
	return ca
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	return l
}

// closer accepts connections and ends each one, as an edge does with strangers.
func closer(t *testing.T, afterHello bool) string {
	t.Helper()
	l := listen(t)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if afterHello {
				_, _ = conn.Read(make([]byte, 16)) // the rest stays unread, so closing resets
			}
			_ = conn.Close() // nothing to do about it
		}
	}()
	return l.Addr().String()
}
