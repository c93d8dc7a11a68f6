package trustbundle

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/x509util"
)

var now = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

func TestParseRefuses(t *testing.T) {
	good := block(t, nil)
	leaf := func(c *x509.Certificate) { c.IsCA = false }
	tests := map[string]struct {
		data []byte
		want string
	}{
		"an empty file":               {nil, "it has no certificate in it"},
		"white space alone":           {[]byte("\n \t\n"), "it has no certificate in it"},
		"a file that never ends":      {bytes.Repeat([]byte("\n"), MaxSize+1), "it is larger than 1048576 bytes"},
		"a private key after a root":  {join(good, typed("PRIVATE KEY", nil)), "it has a private key in it"},
		"a private key before a root": {join(typed("EC PRIVATE KEY", nil), good), "it has a private key in it"},
		"an encrypted private key":    {join(good, typed("ENCRYPTED PRIVATE KEY", nil)), "it has a private key in it"},
		"a damaged private key, which PEM readers skip": {
			join(good, []byte("-----BEGIN OPENSSH PRIVATE KEY-----\n!!\n-----END OPENSSH PRIVATE KEY-----\n")), "it has a private key in it",
		},
		"the head of a private key that was cut off": {join(good, []byte("-----BEGIN PRIVATE KEY-----\nMIG")), "it has a private key in it"},
		"a certificate request":                      {join(good, typed("CERTIFICATE REQUEST", nil)), `PEM block 2 is a "CERTIFICATE REQUEST", not a certificate`},
		"a public key":                               {typed("PUBLIC KEY", nil), `PEM block 1 is a "PUBLIC KEY", not a certificate`},
		"a block with headers":                       {typed("CERTIFICATE", map[string]string{"Proc-Type": "4,ENCRYPTED"}), "PEM block 1 has headers, which certificates never have"},
		"text before the roots":                      {join([]byte("subject=CN=Root\n"), good), "it has text beside its certificates, before PEM block 1 or at the end"},
		"text after the roots":                       {join(good, []byte("bye\n")), "it has text beside its certificates, before PEM block 2 or at the end"},
		"text between the roots":                     {join(good, []byte("#\n"), good), "it has text beside its certificates, before PEM block 2 or at the end"},
		"a damaged block before a good one":          {join([]byte("-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----\n"), good), "PEM block 1 is damaged"},
		"a block that was cut off":                   {good[:len(good)/2], "PEM block 1 is damaged"},
		"DER instead of PEM":                         {root2der(t, good), "it has text beside its certificates, before PEM block 1 or at the end"},
		"a block that is no certificate inside":      {typed("CERTIFICATE", nil), "certificate 1: x509: malformed certificate"},
		"a leaf":                                     {block(t, leaf), `certificate 1: "CN=Root" is not a CA`},
		"a certificate of version 1":                 {block(t, func(c *x509.Certificate) { c.BasicConstraintsValid = false; c.IsCA = false }), `certificate 1: "CN=Root" is not a CA`},
		"a CA that may not sign certificates":        {block(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), `certificate 1: "CN=Root" may not sign certificates (key usage)`},
		"an expired root":                            {block(t, func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }), `certificate 1: "CN=Root" expired on 2026-05-01T11:59:59Z`},
		"a root of the future":                       {block(t, func(c *x509.Certificate) { c.NotBefore = now.Add(time.Second) }), `certificate 1: "CN=Root" is valid only from 2026-05-01T12:00:01Z on`},
		"an intermediate":                            {intermediate(t), `certificate 1: "CN=Intermediate" is not signed by itself, so it is an intermediate and not a root`},
		"two bad ones, both told": {
			join(block(t, leaf), good, intermediate(t)),
			"certificate 1: \"CN=Root\" is not a CA\ncertificate 3: \"CN=Intermediate\" is not signed by itself, so it is an intermediate and not a root",
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			b, err := Parse(tc.data, now)
			require.EqualError(t, err, tc.want)
			require.Empty(t, b.Roots())
		})
	}
}

func TestParseKeepsEachRootOnceAndInOrder(t *testing.T) {
	one, two := block(t, nil), block(t, nil)
	b, err := Parse(join(two, []byte("\r\n\n"), one, two), now)
	require.NoError(t, err)
	require.Len(t, b.Roots(), 2)
	require.Equal(t, two, PEM(b.Current()), "the current root is the first of the file")
	require.Less(t, x509util.Fingerprint(b.Roots()[0]), x509util.Fingerprint(b.Roots()[1]))

	other, err := Parse(join(one, two), now)
	require.NoError(t, err)
	require.Equal(t, b.PEM(), other.PEM(), "the order of the file does not matter for the bundle")
}

func TestReadNamesTheFileInEachProblem(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root_ca.crt")
	_, err := Read(path, now)
	require.EqualError(t, err, "reading roots: open "+path+": no such file or directory")
	bad := block(t, func(c *x509.Certificate) { c.IsCA = false })
	require.NoError(t, os.WriteFile(path, join(bad, bad), 0o600))
	_, err = Read(path, now)
	require.EqualError(t, err, `reading roots from "`+path+`": certificate 1: "CN=Root" is not a CA`+"\n"+
		`reading roots from "`+path+`": certificate 2: "CN=Root" is not a CA`)
}

func TestPKCS12IsComparedByContent(t *testing.T) {
	one, two := block(t, nil), block(t, nil)
	both, err := Parse(join(one, two), now)
	require.NoError(t, err)
	first, err := both.PKCS12()
	require.NoError(t, err)
	second, err := both.PKCS12()
	require.NoError(t, err)
	require.NotEqual(t, first, second, "if this ever holds, comparing bytes is enough")
	require.True(t, both.SamePKCS12(first))

	single, err := Parse(one, now)
	require.NoError(t, err)
	require.False(t, single.SamePKCS12(first))
	require.False(t, both.SamePKCS12(first[:len(first)/2]), "a half-written store")
	require.False(t, both.SamePKCS12(nil))
}

// The programs that read our files are the judges of them.
func TestOtherProgramsReadTheBundle(t *testing.T) {
	b, err := Parse(join(block(t, nil), block(t, nil)), now)
	require.NoError(t, err)
	store, err := b.PKCS12()
	require.NoError(t, err)
	dir := t.TempDir()
	p12, der := filepath.Join(dir, "truststore.p12"), filepath.Join(dir, "root_ca.der")
	require.NoError(t, os.WriteFile(p12, store, 0o600))
	require.NoError(t, os.WriteFile(der, b.Current().Raw, 0o600))

	t.Run("openssl reads the trust store", func(t *testing.T) {
		out := tool(t, "openssl", "pkcs12", "-in", p12, "-passin", "pass:"+Password, "-nokeys")
		require.Equal(t, 2, strings.Count(out, "BEGIN CERTIFICATE"))
	})
	t.Run("openssl tells the same fingerprint", func(t *testing.T) {
		out := tool(t, "openssl", "x509", "-in", der, "-inform", "DER", "-noout", "-fingerprint", "-sha256")
		require.Contains(t, strings.ToLower(strings.ReplaceAll(out, ":", "")), "="+x509util.Fingerprint(b.Current()))
	})
	t.Run("keytool reads the trust store", func(t *testing.T) {
		out := tool(t, "keytool", "-J-Duser.language=en", "-list", "-keystore", p12, "-storepass", Password)
		require.Equal(t, 2, strings.Count(out, "trustedCertEntry"), out)
	})
}

func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		const advice = "%s is missing: apt-get install openssl default-jre-headless"
		if os.Getenv("CI") != "" {
			t.Fatalf(advice, name)
		}
		t.Skipf(advice, name)
	}
	out, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput()
	require.NoError(t, err, string(out))
	return string(out)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func typed(kind string, headers map[string]string) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Headers: headers, Bytes: []byte("content")})
}

func root2der(t *testing.T, data []byte) []byte {
	t.Helper()
	b, _ := pem.Decode(data)
	require.NotNil(t, b)
	return b.Bytes
}

// block makes a self-signed root, changed by change, in PEM.
func block(tb testing.TB, change func(*x509.Certificate)) []byte {
	tb.Helper()
	key := newKey(tb)
	c := template("Root")
	if change != nil {
		change(c)
	}
	return sign(tb, c, c, key, key)
}

func intermediate(t *testing.T) []byte {
	t.Helper()
	return sign(t, template("Intermediate"), template("Root"), newKey(t), newKey(t))
}

func template(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(tb, err)
	return key
}

func sign(tb testing.TB, c, issuer *x509.Certificate, key, issuerKey *ecdsa.PrivateKey) []byte {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, issuer, key.Public(), issuerKey)
	require.NoError(tb, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
