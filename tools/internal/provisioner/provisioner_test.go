package provisioner

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/jose"
	"go.step.sm/crypto/minica"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/pki"
)

// shipped is where the templates are that users get.
const shipped = "../../../step-ca/templates"

// everything is a complete set of settings.
func everything() config.Issuance {
	hours := func(a, b, c time.Duration) config.Lifetimes {
		return config.Lifetimes{Min: a, Default: b * time.Hour, Max: c * time.Hour}
	}
	return config.Issuance{
		CA: config.CA{
			Domain: "ca.internal", Organization: "Example Ltd", RevocationPort: 9080,
			TLS: hours(5*time.Minute, 24, 720), IntermediateLifetime: 26280 * time.Hour,
		},
		ACME: config.ACME{Enabled: true, Challenges: []string{"http-01", "tls-alpn-01"}, RequireEAB: true},
		SSH:  config.SSH{Enabled: true, User: hours(5*time.Minute, 16, 24), Host: hours(5*time.Minute, 720, 720)},
		OIDC: config.OIDC{
			Name: "sso", ClientID: "step-ca", ClientSecret: "not so secret", Endpoint: "https://sso.internal/.well-known/openid-configuration",
			Domains: []string{"internal.lan"}, Groups: []string{"staff"}, Admins: []string{"Ada@INTERNAL.lan", "pki-admins"},
			Scopes: []string{"openid", "email", "groups"}, ListenAddress: "127.0.0.1:10000", TenantID: "tenant",
		},
	}
}

// keys makes the keys of the JWK provisioners.
func keys(t *testing.T) Keys {
	t.Helper()
	key := func() *pki.ProvisionerKey {
		k, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "", 0)
		require.NoError(t, err)
		k.KeyID, err = jose.Thumbprint(k)
		require.NoError(t, err)
		public := k.Public()
		return &pki.ProvisionerKey{Public: &public, Encrypted: "sealed"}
	}
	return Keys{Admin: key(), SSHHost: key()}
}

// certificatePEM returns a certificate.
func certificatePEM(t *testing.T) []byte {
	t.Helper()
	ca, err := minica.New()
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Root.Raw})
}

func keyPEM(t *testing.T) (public, private []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	require.NoError(t, err)
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}

func b64(data []byte) string { return base64.StdEncoding.EncodeToString(data) }

// directory makes a directory with the given name and files.
func directory(t *testing.T, name string, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.Mkdir(dir, 0o700))
	for file, content := range files {
		require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600))
	}
	return dir
}

func messages(problems []error) []string {
	out := []string{}
	for _, p := range problems {
		out = append(out, p.Error())
	}
	return out
}

func names(list provisioner.List) []string {
	out := []string{}
	for _, p := range list {
		out = append(out, p.GetName())
	}
	return out
}

func TestSettingsMakeTheBuiltInProvisioners(t *testing.T) {
	public, _ := keyPEM(t)
	for name, c := range map[string]struct {
		change func(*config.Issuance)
		want   []string
	}{
		"everything":      {func(s *config.Issuance) { s.K8s = true }, []string{"admin", "acme", "ssh-host-jwk", "ssh-pop", "sso", "k8s-sa"}},
		"without ACME":    {func(s *config.Issuance) { s.ACME.Enabled = false }, []string{"admin", "ssh-host-jwk", "ssh-pop", "sso"}},
		"without SSH":     {func(s *config.Issuance) { s.SSH.Enabled = false }, []string{"admin", "acme", "sso"}},
		"without OIDC":    {func(s *config.Issuance) { s.OIDC = config.OIDC{} }, []string{"admin", "acme", "ssh-host-jwk", "ssh-pop"}},
		"with no options": {func(s *config.Issuance) { *s = config.Issuance{} }, []string{"admin"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := everything()
			c.change(&s)
			d, problems := Read(s, directory(t, "provisioners.d", map[string]string{"README.md": "", "k8s-sa.pem": string(public), ".hidden.json": "{"}), shipped)
			require.Empty(t, messages(problems))
			list, err := d.List(keys(t))
			require.NoError(t, err)
			require.Equal(t, c.want, names(list))
			data, err := json.Marshal(list)
			require.NoError(t, err)
			var again provisioner.List
			require.NoError(t, json.Unmarshal(data, &again))
			read, err := json.Marshal(again)
			require.NoError(t, err)
			require.JSONEq(t, string(data), string(read), "step-ca reads something else")
			for _, p := range list {
				claims, _ := parts(p)
				wantSSH := s.SSH.Enabled && p.GetName() != ACME && p.GetName() != K8sSA
				require.Equal(t, wantSSH, claims != nil && claims.EnableSSHCA != nil && *claims.EnableSSHCA, "SSH at %s", p.GetName())
			}
		})
	}
}
