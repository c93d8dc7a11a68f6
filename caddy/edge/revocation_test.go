package edge

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRevocationListsAreServedAndNothingElse(t *testing.T) {
	t.Parallel()
	e := newEdge(t, nil, "127.0.0.1:1", allowList)
	e.run(t)

	t.Run("no volume", func(t *testing.T) {
		require.Equal(t, http.StatusNotFound, e.get(t, http.MethodGet, "/crl").status)
	})
	require.NoError(t, os.Mkdir(e.revocation, 0o700))
	t.Run("an empty volume", func(t *testing.T) {
		require.Equal(t, http.StatusNotFound, e.get(t, http.MethodGet, "/krl").status)
	})
	write := func(name, content string) {
		require.NoError(t, os.WriteFile(filepath.Join(e.revocation, name), []byte(content), 0o600))
	}
	write("ca.crl", "the CRL")
	write("ssh.krl", "the KRL")
	write(".ca.crl.1.tmp", "half a CRL")

	for name, tc := range map[string]struct {
		method, path string
		kind, body   string // nothing: not found
	}{
		"the CRL":                       {http.MethodGet, "/crl", "application/pkix-crl", "the CRL"},
		"the KRL":                       {http.MethodGet, "/krl", "application/octet-stream", "the KRL"},
		"the CRL with a query":          {http.MethodGet, "/crl?pem", "application/pkix-crl", "the CRL"},
		"only the header":               {http.MethodHead, "/crl", "application/pkix-crl", ""},
		"the directory":                 {http.MethodGet, "/", "", ""},
		"a file by its name":            {http.MethodGet, "/ca.crl", "", ""},
		"a file that is being written":  {http.MethodGet, "/.ca.crl.1.tmp", "", ""},
		"a way out of the directory":    {http.MethodGet, "/crl/../../Caddyfile", "", ""},
		"the same in disguise":          {http.MethodGet, "/crl/%2e%2e/%2e%2e/Caddyfile", "", ""},
		"a path below the CRL":          {http.MethodGet, "/crl/", "", ""},
		"a method that reads nothing":   {http.MethodPut, "/crl", "", ""},
		"the API of the CA":             {http.MethodGet, "/1.0/crl", "", ""},
		"what would be Caddy's own API": {http.MethodGet, "/config/", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got := e.get(t, tc.method, tc.path)
			require.Equal(t, tc.body, got.body)
			require.Empty(t, got.header.Get("Server"))
			if tc.kind == "" {
				require.Equal(t, http.StatusNotFound, got.status)
				require.Empty(t, got.header.Get("Cache-Control"))
				return
			}
			require.Equal(t, http.StatusOK, got.status)
			require.Equal(t, tc.kind, got.header.Get("Content-Type"))
			require.Equal(t, "max-age=60", got.header.Get("Cache-Control"))
			require.NotEmpty(t, got.header.Get("ETag"))
		})
	}

	t.Run("a new file at once", func(t *testing.T) {
		write("ca.crl", "a newer CRL")
		require.Equal(t, "a newer CRL", e.get(t, http.MethodGet, "/crl").body)
	})
	t.Run("after a reload too", func(t *testing.T) {
		out, err := e.reload(t)
		require.NoError(t, err, out)
		require.Equal(t, http.StatusOK, e.get(t, http.MethodGet, "/crl").status)
	})
	e.waitForLog(t, `"decision":"admitted","remote":"`+insider+":")
}

func TestOutsiderGetsNoByteFromTheRevocationPort(t *testing.T) {
	t.Parallel()
	e := newEdge(t, nil, "127.0.0.1:1", allowList)
	e.run(t)
	for name, tc := range map[string]struct {
		from string
		send []byte
	}{
		"silent":               {from: outsider},
		"with a GET":           {from: "127.0.0.4", send: []byte("GET /crl HTTP/1.1\r\nHost: ca.internal\r\n\r\n")},
		"with 64 KiB of noise": {from: "127.0.0.5", send: bytes.Repeat([]byte{0x16}, 1<<16)},
		"over IPv6":            {from: "::1", send: []byte("GET /crl HTTP/1.0\r\n\r\n")},
	} {
		t.Run(name, func(t *testing.T) {
			local := requireClosed(t, dial(t, tc.from, e.plainPort), tc.send)
			e.waitForLog(t, `"decision":"denied","remote":"`+local+`"`)
		})
	}
}

func TestAdmittedClientCannotHoldTheRevocationPort(t *testing.T) {
	t.Parallel()
	e := newEdge(t, nil, "127.0.0.1:1", allowList)
	e.run(t)
	conn := dial(t, insider, e.plainPort)
	start := time.Now()
	_, err := io.WriteString(conn, "GET /crl HTTP/1.1\r\nHost: ca")
	require.NoError(t, err)
	require.NoError(t, conn.SetReadDeadline(start.Add(20*time.Second)))
	_, err = io.Copy(io.Discard, conn)
	require.NoError(t, err, "closed by the edge, not by our own deadline")
	require.Less(t, time.Since(start), 10*time.Second)
}

func TestNameBeginningWithCRLLeadsToTheCAThatKeepsIt(t *testing.T) {
	t.Parallel()
	main, crl := newAuthority(t), newAuthority(t)
	up := main.serve(t)
	e := newEdge(t, main, up.addr, allowList)
	write(t, e.root, string(main.rootPEM())+string(crl.rootPEM()))
	server := crl.server(t, new(upstream))
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", e.crl)
	require.NoError(t, err)
	go func() { _ = server.ServeTLS(ln, "", "") }()
	e.run(t)

	for name, tc := range map[string]struct {
		sni  string
		want *authority
	}{
		"the name of the CRL's service":       {"crl.ca.internal", crl},
		"in capitals":                         {"CRL.CA.INTERNAL", crl},
		"the name of the CA":                  {"ca.internal", main},
		"a name with crl further behind":      {"ca.crl.internal", main},
		"a name that only begins like it":     {"crlca.internal", main},
		"no name, as when by address":         {"", main},
		"the service's name in the stack":     {"crl", main},
		"the name by which health is checked": {"localhost", main},
	} {
		t.Run(name, func(t *testing.T) {
			conn := handshake(t, e.dial(t, insider), tc.sni)
			require.NoError(t, conn.HandshakeContext(t.Context()))
			require.Equal(t, tc.want.cert.Subject.CommonName, conn.ConnectionState().PeerCertificates[0].Issuer.CommonName)
		})
	}
}

func TestNameBeginningWithCRLWhereThereIsNoSuchService(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	for name, crl := range map[string]string{
		"nothing listens":       "",
		"the name is not known": "crl.infra-pki.invalid:9000",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEdge(t, ca, up.addr, allowList)
			if crl != "" {
				config, err := os.ReadFile(e.caddyfile)
				require.NoError(t, err)
				require.NoError(t, os.WriteFile(e.caddyfile, bytes.Replace(config, []byte(e.crl), []byte(crl), 1), 0o600))
			}
			e.run(t)
			start := time.Now()
			conn := handshake(t, e.dial(t, insider), "crl.ca.internal")
			closed := make(chan error, 1)
			go func() { closed <- conn.HandshakeContext(context.WithoutCancel(t.Context())) }()

			require.Equal(t, "client of the test", e.whoami(t, insider, ca), "others are served meanwhile")
			require.Error(t, <-closed)
			require.Less(t, time.Since(start), 15*time.Second)
		})
	}
}

// handshake is a connection that begins with sni and does not mind who answers.
func handshake(t *testing.T, raw net.Conn, sni string) *tls.Conn {
	t.Helper()
	require.NoError(t, raw.SetDeadline(time.Now().Add(20*time.Second)))
	return tls.Client(raw, &tls.Config{ServerName: sni, InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}) //nolint:gosec // the test looks at who it is
}

type answer struct {
	status int
	header http.Header
	body   string
}

// get asks the port for plain HTTP from an admitted address, with the path as it stands.
func (e *edge) get(t *testing.T, method, path string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://ca.internal", http.NoBody)
	require.NoError(t, err)
	req.URL.Opaque, req.URL.RawQuery, _ = strings.Cut(path, "?")
	client := http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DialContext:       func(context.Context, string, string) (net.Conn, error) { return dial(t, insider, e.plainPort), nil },
			DisableKeepAlives: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return answer{resp.StatusCode, resp.Header, string(body)}
}
