package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io/fs"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// issuer signs CRLs as they come out of no well-behaved step-ca.
type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newIssuer(t *testing.T, usage x509.KeyUsage) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test Intermediate CA"}, SubjectKeyId: []byte{1},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: usage,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &issuer{cert: cert, key: key}
}

func (i *issuer) list(t *testing.T, number int64, issued, expires time.Time) []byte {
	t.Helper()
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(number), ThisUpdate: issued, NextUpdate: expires,
	}, i.cert, i.key)
	require.NoError(t, err)
	return der
}

func TestOnlyAGoodCRLIsPublished(t *testing.T) {
	ours, other := newIssuer(t, x509.KeyUsageCertSign|x509.KeyUsageCRLSign), newIssuer(t, x509.KeyUsageCertSign|x509.KeyUsageCRLSign)
	now := time.Now().Truncate(time.Second).UTC()
	day := now.Add(24 * time.Hour)
	stamp := func(at time.Time) string { return at.Format(time.RFC3339) }
	good := ours.list(t, 7, now, day)
	same := func(w http.ResponseWriter, data []byte) { _, _ = w.Write(data) }

	tests := map[string]struct {
		published []byte
		answer    []byte
		serve     func(w http.ResponseWriter, data []byte)
		problem   string // after the address; nothing: the answer is published
	}{
		"the first one":                          {nil, good, same, ""},
		"the same again":                         {good, good, same, ""},
		"a later one":                            {good, ours.list(t, 8, now, day), same, ""},
		"one to replace what is no CRL":          {[]byte("torn"), good, same, ""},
		"one to replace another issuer's":        {other.list(t, 99, now, day), good, same, ""},
		"of a smaller number":                    {good, ours.list(t, 6, now.Add(time.Minute), day), same, ": it is older than the published one: number 6 of " + stamp(now.Add(time.Minute)) + ", published number 7 of " + stamp(now)},
		"of an earlier time":                     {good, ours.list(t, 8, now.Add(-time.Minute), day), same, ": it is older than the published one: number 8 of " + stamp(now.Add(-time.Minute)) + ", published number 7 of " + stamp(now)},
		"signed by somebody else":                {good, other.list(t, 8, now, day), same, `: "CN=Test Intermediate CA" did not sign it: x509: ECDSA verification failure`},
		"changed on its way":                     {good, flip(ours.list(t, 8, now, day)), same, `: "CN=Test Intermediate CA" did not sign it: x509: ECDSA verification failure`},
		"past its time":                          {good, ours.list(t, 8, now.Add(-time.Hour), now), same, ": it expired on " + stamp(now)},
		"cut short":                              {good, ours.list(t, 8, now, day)[:100], same, ": x509: malformed crl"},
		"a certificate":                          {good, ours.cert.Raw, same, ": x509: unsupported crl version"},
		"larger than any that is to be expected": {good, make([]byte, maxCRL+1), same, ": it is larger than 16777216 bytes"},
		"an answer that is an error": {good, good, func(w http.ResponseWriter, data []byte) {
			w.WriteHeader(http.StatusNotFound)
			same(w, data)
		}, `: it answered "404 Not Found"`},
		"an answer that leads elsewhere": {good, good, func(w http.ResponseWriter, data []byte) {
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(http.StatusFound)
			same(w, data)
		}, `: it answered "302 Found"`},
		"an answer that breaks off": {good, good, func(w http.ResponseWriter, data []byte) {
			w.Header().Set("Content-Length", "100000")
			same(w, data)
		}, ": unexpected EOF"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { tc.serve(w, tc.answer) }))
			defer server.Close()
			c := crl{url: server.URL, certs: ours.certs(t), out: t.TempDir()}
			path := filepath.Join(c.out, crlFile)
			if tc.published != nil {
				require.NoError(t, os.WriteFile(path, tc.published, published))
			}
			_, err := c.renew(t.Context())
			after, readErr := os.ReadFile(path)
			require.NoError(t, readErr)
			if tc.problem != "" {
				require.ErrorContains(t, err, c.url+tc.problem)
				require.Equal(t, tc.published, after, "the last good one stays")
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.answer, after)
			info, err := os.Stat(path)
			require.NoError(t, err)
			require.Equal(t, fs.FileMode(0o444), info.Mode())
		})
	}

	t.Run("by an intermediate that may sign no CRL", func(t *testing.T) {
		weak := newIssuer(t, x509.KeyUsageCertSign)
		signed := newIssuer(t, x509.KeyUsageCertSign|x509.KeyUsageCRLSign)
		signed.key = weak.key
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { same(w, signed.list(t, 1, now, day)) }))
		defer server.Close()
		_, err := (&crl{url: server.URL, certs: weak.certs(t), out: t.TempDir()}).renew(t.Context())
		require.ErrorContains(t, err, "did not sign it: x509: invalid signature: parent certificate cannot sign this kind of certificate")
	})
}

// flip changes a bit of the signature, which comes last.
func flip(der []byte) []byte {
	der[len(der)-1] ^= 1
	return der
}

// certs is a directory as step-ca has it.
func (i *issuer) certs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.cert.Raw})
	require.NoError(t, os.WriteFile(filepath.Join(dir, "intermediate_ca.crt"), data, 0o600))
	return dir
}

func TestIssuerOfTheCRL(t *testing.T) {
	tests := map[string]struct{ content, problem string }{
		"no PEM":            {"nothing", "does not begin with a certificate in PEM"},
		"a key":             {"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "does not begin with a certificate in PEM"},
		"a damaged content": {"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "x509: malformed certificate"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "intermediate_ca.crt")
			require.NoError(t, os.WriteFile(path, []byte(tc.content), 0o600))
			_, err := readIssuer(path)
			require.ErrorContains(t, err, tc.problem)
			require.ErrorContains(t, err, path)
		})
	}
}

func TestHealth(t *testing.T) {
	ours := newIssuer(t, x509.KeyUsageCRLSign)
	now := time.Now()
	good, past := ours.list(t, 1, now, now.Add(time.Hour)), ours.list(t, 1, now.Add(-2*time.Hour), now.Add(-time.Hour))
	tests := map[string]struct {
		crl     []byte
		krl     bool
		round   time.Duration // ago; negative: never
		problem string
	}{
		"both files and a round just now":     {good, true, 0, ""},
		"the last round a minute ago":         {good, true, time.Minute, ""},
		"the last round longer than that ago": {good, true, 61 * time.Second, "the last complete round was 1m1s ago, more than 1m0s"},
		"no complete round":                   {good, true, -1, "looking for the last complete round"},
		"no KRL":                              {good, false, 0, "looking for the KRL"},
		"no CRL":                              {nil, true, 0, "no CRL has been published yet"},
		"what is no CRL":                      {[]byte("torn"), true, 0, "what is published is not a CRL"},
		"a CRL that no relying party takes":   {past, true, 0, "checking the published CRL: it expired on "},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			state := filepath.Join(dir, "state")
			write := func(name string, data []byte) {
				require.NoError(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
			}
			if tc.crl != nil {
				write(crlFile, tc.crl)
			}
			if tc.krl {
				write(krlFile, nil)
			}
			if tc.round >= 0 {
				write("state", nil)
				require.NoError(t, os.Chtimes(state, now.Add(-tc.round), now.Add(-tc.round)))
			}
			err := healthy(dir, state, time.Minute, now)
			if tc.problem == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, tc.problem)
		})
	}
}

// After the restore of a backup the CA's list is older than the published one, and
// is taken when the operator says so.
func TestForget(t *testing.T) {
	ours := newIssuer(t, x509.KeyUsageCRLSign)
	now := time.Now()
	restored := ours.list(t, 1, now, now.Add(time.Hour))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(restored) }))
	defer server.Close()
	c := crl{url: server.URL, certs: ours.certs(t), out: t.TempDir()}
	path := filepath.Join(c.out, crlFile)
	require.NoError(t, os.WriteFile(path, ours.list(t, 9, now, now.Add(time.Hour)), published))

	_, err := c.renew(t.Context())
	require.ErrorContains(t, err, "it is older than the published one")
	require.NoError(t, run(t.Context(), []string{"--forget", "--out", c.out}, nil))
	_, err = os.Stat(path)
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = c.renew(t.Context())
	require.NoError(t, err)
}
