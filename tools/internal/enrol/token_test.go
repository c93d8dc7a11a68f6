package enrol

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/jose"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

func signed(tb testing.TB, claims map[string]any) string {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(tb, err)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, nil)
	require.NoError(tb, err)
	raw, err := jose.Signed(signer).Claims(claims).CompactSerialize()
	require.NoError(tb, err)
	return raw
}

func TestReadToken(t *testing.T) {
	end := time.Unix(1_800_000_000, 0)
	host := map[string]any{"ssh": map[string]any{"certType": "host", "principals": []string{"web.internal", "10.0.0.5"}}}
	const ca = "https://ca.internal:9000"
	tests := map[string]struct {
		claims map[string]any
		want   Token
		err    string
	}{
		"for an SSH host":         {map[string]any{"aud": ca + "/1.0/ssh/sign", "exp": end.Unix(), "sub": "web.internal", "step": host, "sha": "2f"}, Token{SSH: true, Names: []string{"web.internal", "10.0.0.5"}, Expires: end, Fingerprint: "2f"}, ""},
		"for TLS":                 {map[string]any{"aud": ca + "/1.0/sign", "exp": end.Unix(), "sub": "web.internal", "sans": []string{"web.internal"}}, Token{Names: []string{"web.internal"}, Expires: end}, ""},
		"for TLS, of older paths": {map[string]any{"aud": ca + "/sign", "exp": end.Unix(), "sub": "web.internal"}, Token{Names: []string{"web.internal"}, Expires: end}, ""},
		"for a person":            {map[string]any{"aud": ca + "/1.0/ssh/sign", "exp": end.Unix(), "sub": "ann", "step": map[string]any{"ssh": map[string]any{"certType": "user"}}}, Token{}, "it is for a person's SSH certificate, and not for a host's"},
		"for revoking":            {map[string]any{"aud": ca + "/1.0/revoke", "exp": end.Unix(), "sub": "1"}, Token{}, "it is for /revoke, and not for a certificate"},
		"without an end":          {map[string]any{"aud": ca + "/1.0/sign", "sub": "web.internal"}, Token{}, "it is a token of another kind"},
		"without a name":          {map[string]any{"aud": ca + "/1.0/sign", "exp": end.Unix()}, Token{}, "it is a token of another kind"},
		"with claims of no token": {map[string]any{"aud": ca + "/1.0/sign", "exp": end.Unix(), "sub": "a", "sans": 7}, Token{}, "it is a token of another kind"},
		"for several things":      {map[string]any{"aud": []string{ca + "/1.0/sign", ca + "/1.0/revoke"}, "exp": end.Unix(), "sub": "a"}, Token{}, "it is a token of another kind"},
		"for what is no address":  {map[string]any{"aud": "https://ca:x/1.0/sign", "exp": end.Unix(), "sub": "a"}, Token{}, "it is a token of another kind"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			raw := signed(t, tc.claims)
			got, err := ReadToken(raw)
			if tc.err != "" {
				require.EqualError(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			tc.want.Raw = config.Secret(raw)
			require.WithinDuration(t, tc.want.Expires, got.Expires, 0)
			tc.want.Expires = got.Expires
			require.Equal(t, tc.want, got)
			require.NotContains(t, fmt.Sprintf("%v %+v %#v", got, got, got), raw)
		})
	}
	for _, broken := range []string{"", "eyJhbGciOiJFUzI1NiJ9", "a.b.c"} {
		_, err := ReadToken(broken)
		require.EqualError(t, err, "it is not a token, or only a part of one", broken)
	}
}

func FuzzReadToken(f *testing.F) {
	f.Add(signed(f, map[string]any{"aud": "https://ca/1.0/sign", "exp": 1_800_000_000, "sub": "web.internal"}))
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Fuzz(func(t *testing.T, raw string) {
		token, err := ReadToken(raw)
		if err == nil && (len(token.Names) == 0 || token.Expires.IsZero()) {
			t.Fatal("it took a token without names or end")
		}
	})
}
