package e2e_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// ca is the CA as a program on this machine sees it, with the key of the
// provisioner "admin". The step CLI is the client of the other tests; this one is
// for what needs many requests, or requests at one instant.
type ca struct {
	url   string
	roots *x509.CertPool
	http  *http.Client
	kid   string
	key   *ecdsa.PrivateKey
}

func newCA(t *testing.T, s *stack.Stack) *ca {
	t.Helper()
	pool := roots(t, s)
	c := &ca{url: s.URL(), roots: pool, http: &http.Client{
		Timeout: 15 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig:     &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
			MaxIdleConnsPerHost: 16,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, network, s.Address())
			},
		},
	}}
	t.Cleanup(c.http.CloseIdleConnections)

	var list struct {
		Provisioners []struct{ Name, EncryptedKey string }
	}
	require.Equal(t, http.StatusOK, c.get(t, "/provisioners", &list))
	client := s.Client()
	client.Write("/tmp/password", s.Get("PROVISIONER_PASSWORD"))
	for _, p := range list.Provisioners {
		if p.Name == "admin" {
			client.Write("/tmp/jwe", p.EncryptedKey)
		}
	}
	jwk := client.Shell("step crypto jwe decrypt --password-file /tmp/password < /tmp/jwe").OK(t)
	var key struct{ Kid, D string }
	require.NoError(t, json.Unmarshal([]byte(jwk.Stdout), &key))
	d, err := base64.RawURLEncoding.DecodeString(key.D)
	require.NoError(t, err)
	c.kid = key.Kid
	c.key, err = ecdsa.ParseRawPrivateKey(elliptic.P256(), d)
	require.NoError(t, err)
	return c
}

// roots is what clients of the stack trust.
func roots(t *testing.T, s *stack.Stack) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM([]byte(contentOf(t, s.Trust(), "root_ca.crt"))))
	return pool
}

func (c *ca) get(t *testing.T, path string, out any) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.url+path, http.NoBody)
	require.NoError(t, err)
	resp, err := c.http.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close() //nolint:errcheck // read to its end
	require.NoError(t, json.NewDecoder(resp.Body).Decode(out))
	return resp.StatusCode
}

// token is a one-time token for a certificate with the name (RFC 7519).
func (c *ca) token(t *testing.T, name string) string {
	t.Helper()
	part := func(v any) string {
		data, err := json.Marshal(v)
		require.NoError(t, err)
		return base64.RawURLEncoding.EncodeToString(data)
	}
	now := time.Now()
	signed := part(map[string]any{"alg": "ES256", "kid": c.kid, "typ": "JWT"}) + "." + part(map[string]any{
		"iss": "admin", "sub": name, "sans": []string{name}, "aud": c.url + "/1.0/sign", "jti": rand.Text(),
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(),
	})
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, c.key, digest[:])
	require.NoError(t, err)
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// signRequest is the body of a request for a certificate.
func (c *ca) signRequest(t *testing.T, token, name string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{name}}, key)
	require.NoError(t, err)
	body, err := json.Marshal(map[string]string{
		"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})), "ott": token,
	})
	require.NoError(t, err)
	return body
}

// sign sends a request and returns the status and what came with it.
func (c *ca) sign(ctx context.Context, body []byte) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+"/1.0/sign", bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// issue gets a certificate through the published port and verifies it.
func (c *ca) issue(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	status, answer, err := c.sign(t.Context(), c.signRequest(t, c.token(t, name), name))
	require.NoError(t, err)
	require.Equal(t, http.StatusCreated, status, string(answer))
	var out struct{ CertChain []string }
	require.NoError(t, json.Unmarshal(answer, &out))
	certs := certificates(t, strings.Join(out.CertChain, "\n"))
	c.verify(t, certs, name)
	return certs[0]
}

// verify holds a chain, leaf first, against the exported root.
func (c *ca) verify(t *testing.T, chain []*x509.Certificate, name string) {
	t.Helper()
	intermediates := x509.NewCertPool()
	for _, cert := range chain[1:] {
		intermediates.AddCert(cert)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{DNSName: name, Roots: c.roots, Intermediates: intermediates})
	require.NoError(t, err)
}

func certificates(t *testing.T, text string) []*x509.Certificate {
	t.Helper()
	var list []*x509.Certificate
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			require.NotEmpty(t, list, "no certificate in %q", text)
			return list
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		require.NoError(t, err)
		list = append(list, cert)
	}
}

func serials(certs []*x509.Certificate) []*big.Int {
	var list []*big.Int
	for _, c := range certs {
		list = append(list, c.SerialNumber)
	}
	return list
}
