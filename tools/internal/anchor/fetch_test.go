package anchor

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // step-ca's own words
	os.Exit(m.Run())
}

func TestParseFingerprint(t *testing.T) {
	digits := strings.Repeat("a1", 32)
	colons := strings.TrimSuffix(strings.Repeat("A1:", 32), ":")
	tests := map[string]struct{ given, want, problem string }{
		"lower hex":                      {digits, digits, ""},
		"upper hex":                      {strings.ToUpper(digits), digits, ""},
		"with colons, as openssl prints": {colons, digits, ""},
		"nothing":                        {"", "", `"" has 0 hex digits: SHA-256 has 64`},
		"one digit short":                {digits[1:], "", `"` + digits[1:] + `" has 63 hex digits: SHA-256 has 64`},
		"one digit too many":             {digits + "0", "", `"` + digits + `0" has 65 hex digits: SHA-256 has 64`},
		"SHA-1":                          {digits[:40], "", `"` + digits[:40] + `" is a SHA-1 fingerprint: SHA-256 has 64 hex digits`},
		"SHA-1 with colons":              {colons[:59], "", `"` + colons[:59] + `" is a SHA-1 fingerprint: SHA-256 has 64 hex digits`},
		"a letter that is no hex digit":  {"g" + digits[1:], "", `"g` + digits[1:] + `" has 'g' in it, which is not a hex digit`},
		"a letter beyond ASCII":          {digits[:62] + "ａ", "", `"` + digits[:62] + `ａ" has 'ａ' in it, which is not a hex digit`},
		"a space at the end":             {digits + " ", "", `"` + digits + ` " has ' ' in it, which is not a hex digit`},
		"a colon at the end":             {colons + ":", "", `"` + colons + `:" has colons elsewhere than between pairs of hex digits`},
		"one colon":                      {"a:1" + digits[2:], "", `"a:1` + digits[2:] + `" has colons elsewhere than between pairs of hex digits`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := ParseFingerprint(tc.given)
			if tc.problem != "" {
				require.EqualError(t, err, tc.problem)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.want, got)
		})
	}
}

// What is taken for a fingerprint is one, and says the same as what was given.
func FuzzParseFingerprint(f *testing.F) {
	f.Add(strings.Repeat("a1", 32))
	f.Add(strings.TrimSuffix(strings.Repeat("A1:", 32), ":"))
	f.Add(":")
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseFingerprint(s)
		if err != nil {
			return
		}
		if len(got) != 64 || strings.Trim(got, "0123456789abcdef") != "" || got != strings.ToLower(strings.ReplaceAll(s, ":", "")) {
			t.Fatalf("%q was read as %q", s, got)
		}
		if again, err := ParseFingerprint(got); err != nil || again != got {
			t.Fatalf("%q was read as %q, and that as %q", s, got, again)
		}
	})
}

func TestFetchFromStepCA(t *testing.T) {
	second := newRoot(t, "Second Root", nil)
	ca, err := stepcatest.New(t.TempDir(), stepcatest.Options{Served: []*x509.Certificate{second}})
	require.NoError(t, err)
	require.NoError(t, ca.Start())
	t.Cleanup(func() { require.NoError(t, ca.Stop()) })

	for name, root := range map[string]*x509.Certificate{"the current root": ca.Root, "a root that comes next": second} {
		t.Run(name, func(t *testing.T) {
			bundle, err := Fetch(t.Context(), ca.URL, strings.ToUpper(x509util.Fingerprint(root)), time.Now())
			require.NoError(t, err)
			require.Equal(t, []*x509.Certificate{root}, bundle.Roots())
		})
	}
	t.Run("a root that it does not have", func(t *testing.T) {
		fp := strings.Repeat("0", 64)
		_, err := Fetch(t.Context(), ca.URL, fp, time.Now())
		require.EqualError(t, err, `asking "`+ca.URL+`/root/`+fp+`": status 404, "root certificate with fingerprint \"`+fp+`\" was not found"`)
		require.Contains(t, strings.Join(oneshot.Hints(err), "\n"), "trust/fingerprint on the CA host")
	})
}

// Whoever is in the middle holds no key that anybody trusts, and needs none: the
// client cannot verify TLS before it has the root. The fingerprint has to do.
func TestFetchRefusesWhatAManInTheMiddleAnswers(t *testing.T) {
	root := newRoot(t, "Root", nil)
	evil := newRoot(t, "Evil Root", nil)
	expired := newRoot(t, "Expired Root", func(c *x509.Certificate) { c.NotAfter = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) })
	leaf := newRoot(t, "Leaf", func(c *x509.Certificate) { c.IsCA = false })
	intermediate := newIntermediate(t)
	fp := x509util.Fingerprint
	foreign := func(c *x509.Certificate) string {
		return `a certificate that nobody vouches for: "` + c.Subject.String() + `" with the fingerprint ` + fp(c)
	}
	good := string(trustbundle.PEM(root))
	key := "-----BEGIN PRIVATE KEY-----\nMIG\n-----END PRIVATE KEY-----\n"

	tests := map[string]struct {
		serves http.HandlerFunc
		wants  string
		err    string // after "checking what URL serves as its root: ", or all of it where URL stands in it
	}{
		"another root":                           {answers(trustbundle.PEM(evil)), fp(root), foreign(evil)},
		"another root after the right one":       {answers(trustbundle.PEM(root, evil)), fp(root), foreign(evil)},
		"another root before the right one":      {answers(trustbundle.PEM(evil, root)), fp(root), foreign(evil)},
		"a leaf with that fingerprint":           {answers(trustbundle.PEM(leaf)), fp(leaf), `certificate 1: "CN=Leaf" is not a CA`},
		"a leaf beside the root":                 {answers(trustbundle.PEM(root, leaf)), fp(root), `certificate 2: "CN=Leaf" is not a CA`},
		"an intermediate with that fingerprint":  {answers(trustbundle.PEM(intermediate)), fp(intermediate), `certificate 1: "CN=Intermediate" is not signed by itself, so it is an intermediate and not a root`},
		"an expired root with that fingerprint":  {answers(trustbundle.PEM(expired)), fp(expired), `certificate 1: "CN=Expired Root" expired on 2026-01-02T03:04:05Z`},
		"a private key beside the root":          {answers([]byte(good + key)), fp(root), "it has a private key in it"},
		"the root in the midst of text":          {answers([]byte("Root of ours\n" + good)), fp(root), "it has text beside its certificates, before PEM block 1 or at the end"},
		"no certificate":                         {answers(nil), fp(root), "it has no certificate in it"},
		"JSON of another kind":                   {says(`{"status":"ok"}`), fp(root), "it has no certificate in it"},
		"an HTML error page with status 200":     {says("<!doctype html><title>Captive portal</title>"), fp(root), `asking "URL": reading the answer: invalid character '<' looking for beginning of value`},
		"an HTML error page with its own status": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "<html>", http.StatusBadGateway) }, fp(root), `asking "URL": status 502`},
		"the root in PEM and not in JSON":        {says(good), fp(root), `asking "URL": reading the answer: invalid character '-' in numeric literal`},
		"more than is read":                      {says(`{"ca":"` + strings.Repeat("A", 1<<20)), fp(root), `asking "URL": the answer is larger than 1048576 bytes`},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://elsewhere.example/", http.StatusFound)
		}, fp(root), `asking "URL": status 302`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewTLSServer(tc.serves)
			t.Cleanup(server.Close)
			bundle, err := Fetch(t.Context(), server.URL, tc.wants, time.Now())
			want := `checking what "` + server.URL + `" serves as its root: ` + tc.err
			if strings.Contains(tc.err, "URL") {
				want = strings.Replace(tc.err, "URL", server.URL+"/root/"+tc.wants, 1)
			}
			require.EqualError(t, err, want)
			require.Empty(t, bundle.Roots())
			require.NotEmpty(t, oneshot.Hints(err))
		})
	}
}

func TestFetchSaysWhyNothingAnswers(t *testing.T) {
	fp := strings.Repeat("0", 64)
	plain := httptest.NewServer(answers(nil))
	t.Cleanup(plain.Close)
	gone := httptest.NewTLSServer(answers(nil))
	gone.Close()
	tests := map[string]struct {
		url  string
		want error
	}{
		"nobody listens":           {gone.URL, stepca.ErrUnreachable},
		"what answers has no TLS":  {strings.Replace(plain.URL, "http:", "https:", 1), stepca.ErrUntrusted},
		"an address without https": {plain.URL, nil},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := Fetch(t.Context(), tc.url, fp, time.Now())
			require.Error(t, err)
			if tc.want != nil {
				require.ErrorIs(t, err, tc.want)
			}
			require.NotEmpty(t, oneshot.Hints(err))
		})
	}
	_, err := Fetch(t.Context(), gone.URL, "abc", time.Now())
	require.EqualError(t, err, `reading the fingerprint: "abc" has 3 hex digits: SHA-256 has 64`)
}

// answers as step-ca does.
func answers(pem []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]string{"ca": string(pem)}) // the client notices
	}
}

func says(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) } // the client notices
}

func template(name string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)) // it never fails
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Now().Add(time.Hour).UTC().Truncate(time.Second),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
}

func newRoot(tb testing.TB, name string, change func(*x509.Certificate)) *x509.Certificate {
	tb.Helper()
	c := template(name)
	if change != nil {
		change(c)
	}
	key := newKey(tb)
	return sign(tb, c, c, key, key)
}

func newIntermediate(tb testing.TB) *x509.Certificate {
	tb.Helper()
	return sign(tb, template("Intermediate"), template("Root"), newKey(tb), newKey(tb))
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(tb, err)
	return key
}

func sign(tb testing.TB, c, issuer *x509.Certificate, key, issuerKey *ecdsa.PrivateKey) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, issuer, key.Public(), issuerKey)
	require.NoError(tb, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(tb, err)
	return cert
}
