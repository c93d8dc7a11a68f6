package e2e_test

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// Each setting of what is issued is turned on, changed and turned off on the running
// CA, by "make init" alone. want is what GET /provisioners answers then, without keys
// and templates; check looks at what only a certificate shows.
func TestTheRunningCAHasTheDeclaredProvisioners(t *testing.T) {
	dropins := t.TempDir()
	require.NoError(t, os.Chmod(dropins, 0o755)) //nolint:gosec // G302: read by another user
	s := stack.New(t, stack.Settings{"PROVISIONERS_DIR": dropins})
	s.Up()
	client := bootstrap(t, s)
	const renewSecond = "step ca renew --force /tmp/second.crt /tmp/second.key"
	const (
		admin   = `"admin": {"type": "JWK", "claims": {"enableSSHCA": true}}`
		sshHost = `"ssh-host-jwk": {"type": "JWK", "claims": {"enableSSHCA": true}}`
		sshPOP  = `"ssh-pop": {"type": "SSHPOP", "claims": {"enableSSHCA": true}}`
		acme    = `"acme": {"type": "ACME", "challenges": ["http-01", "dns-01", "tls-alpn-01"]}`
	)
	provider := stack.Settings{
		"OIDC_CLIENT_ID": "pki", "OIDC_CLIENT_SECRET": "of the provider", "OIDC_ENDPOINT": "https://sso.e2e.test/.well-known/openid-configuration",
		"OIDC_DOMAIN": "e2e.test", "OIDC_ADMINS": "root@e2e.test", "OIDC_GROUPS": "staff", "OIDC_SCOPES": "openid email groups",
		"OIDC_LISTEN_ADDRESS": ":10000", "OIDC_TENANT_ID": "tenant",
	}
	steps := []struct {
		name     string
		settings stack.Settings
		files    map[string]string
		want     string
		check    func(t *testing.T)
	}{
		{name: "what is on by default", want: join(admin, sshHost, sshPOP, acme), check: func(t *testing.T) {
			t.Helper()
			cert := leaf(t, client, "any.name.at.all")
			require.Empty(t, cert.Subject.Organization)
			require.Equal(t, 16*time.Hour, sshLifetime(t, client))
			require.Contains(t, step(client, "*.e2e.test").Exits(t, 1).Output(), "POLICY_WILDCARDS")
		}},
		{
			name: "everything on", settings: merge(provider, stack.Settings{
				"ACME_REQUIRE_EAB": "true", "ACME_CHALLENGES": "dns-01", "ENABLE_K8S_PROVISIONER": "true", "TLS_ORGANIZATION": "Ünited e2e",
				"POLICY_DNS": "*.e2e.test", "POLICY_IPS": "192.0.2.0/24", "POLICY_EMAILS": "e2e.test", "POLICY_WILDCARDS": "true",
				"SSH_USER_MIN_LIFETIME": "1m", "SSH_USER_DEFAULT_LIFETIME": "2h", "SSH_USER_MAX_LIFETIME": "3h",
				"SSH_HOST_MIN_LIFETIME": "1m", "SSH_HOST_DEFAULT_LIFETIME": "240h", "SSH_HOST_MAX_LIFETIME": "241h",
			}), files: map[string]string{"second.json": `{"type": "ACME", "name": "second"}`, "k8s-sa.pem": publicKey(t, client)},
			want: join(admin, sshHost, sshPOP, `"acme": {"type": "ACME", "requireEAB": true, "challenges": ["dns-01"]}`,
				`"sso": {"type": "OIDC", "clientID": "pki", "clientSecret": "of the provider",
				"configurationEndpoint": "https://sso.e2e.test/.well-known/openid-configuration", "domains": ["e2e.test"],
				"admins": ["root@e2e.test"], "groups": ["staff"], "scopes": ["openid", "email", "groups"], "listenAddress": ":10000",
				"tenantID": "tenant", "claims": {"enableSSHCA": true}}`,
				`"k8s-sa": {"type": "K8sSA"}`, `"second": {"type": "ACME"}`),
			check: func(t *testing.T) {
				t.Helper()
				require.Equal(t, []string{"Ünited e2e"}, leaf(t, client, "*.e2e.test").Subject.Organization)
				require.Equal(t, 2*time.Hour, sshLifetime(t, client))
				require.Contains(t, step(client, "www.elsewhere.test").Exits(t, 1).Output(), "not allowed")
				require.Contains(t, step(client, "198.51.100.1").Exits(t, 1).Output(), "not allowed")
				step(client, "192.0.2.1").OK(t)
				client.Shell("step ca certificate " + stack.ClientName + " /tmp/second.crt /tmp/second.key --force --provisioner second").OK(t)
				client.Shell(renewSecond).OK(t)
			},
		},
		{
			name: "everything changed", settings: stack.Settings{
				"ACME_REQUIRE_EAB": "false", "ACME_CHALLENGES": "http-01 tls-alpn-01", "TLS_ORGANIZATION": "Other", "OIDC_NAME": "login",
				"OIDC_CLIENT_ID": "other", "OIDC_CLIENT_SECRET": "", "OIDC_ENDPOINT": "https://login.e2e.test", "OIDC_DOMAIN": "a.test,b.test",
				"OIDC_ADMINS": "", "OIDC_GROUPS": "", "OIDC_SCOPES": "", "OIDC_LISTEN_ADDRESS": "", "OIDC_TENANT_ID": "",
				"POLICY_DNS": "www.elsewhere.test", "POLICY_IPS": "", "POLICY_WILDCARDS": "false", "SSH_USER_DEFAULT_LIFETIME": "3h",
			}, files: map[string]string{"second.json": `{"type": "acme", "name": "third", "claims": {"disableRenewal": true}}`},
			want: join(admin, sshHost, sshPOP, `"acme": {"type": "ACME", "challenges": ["http-01", "tls-alpn-01"]}`,
				`"login": {"type": "OIDC", "clientID": "other", "clientSecret": "",
				"configurationEndpoint": "https://login.e2e.test/.well-known/openid-configuration", "domains": ["a.test", "b.test"],
				"claims": {"enableSSHCA": true}}`,
				`"k8s-sa": {"type": "K8sSA"}`, `"third": {"type": "acme", "claims": {"disableRenewal": true}}`),
			check: func(t *testing.T) {
				t.Helper()
				require.Equal(t, []string{"Other"}, leaf(t, client, "www.elsewhere.test").Subject.Organization)
				require.Equal(t, 3*time.Hour, sshLifetime(t, client))
				require.Contains(t, step(client, "www.e2e.test").Exits(t, 1).Output(), "not allowed")
				require.Contains(t, step(client, "192.0.2.1").Exits(t, 1).Output(), "not allowed")
				// Whoever issued it is gone.
				requireRefused(t, s, "provisioner not found", func() stack.Result { return client.Shell(renewSecond) })
			},
		},
		{name: "everything off", settings: stack.Settings{
			"ENABLE_ACME": "false", "ENABLE_SSH_PROVISIONER": "false", "ENABLE_K8S_PROVISIONER": "false", "OIDC_CLIENT_ID": "", "OIDC_ENDPOINT": "",
			"POLICY_DNS": "", "POLICY_EMAILS": "", "TLS_ORGANIZATION": "",
		}, files: map[string]string{"second.json": ""}, want: `"admin": {"type": "JWK"}`, check: func(t *testing.T) {
			t.Helper()
			require.Empty(t, leaf(t, client, "any.name.at.all").Subject.Organization)
			requireRefused(t, s, "sshCA is disabled", func() stack.Result { return client.Shell(certificateOfAda) })
		}},
		{
			name: "on again", settings: stack.Settings{"ENABLE_ACME": "true", "ENABLE_SSH_PROVISIONER": "true", "ACME_CHALLENGES": "http-01,dns-01,tls-alpn-01"},
			want: join(admin, sshHost, sshPOP, acme), check: func(t *testing.T) { t.Helper(); sshLifetime(t, client) },
		},
	}
	kids := ""
	for _, tc := range steps {
		t.Run(tc.name, func(t *testing.T) {
			s.Set(tc.settings)
			for name, content := range tc.files {
				path := filepath.Join(dropins, name)
				if content == "" {
					require.NoError(t, os.Remove(path))
					continue
				}
				require.NoError(t, os.WriteFile(path, []byte(content), 0o644)) //nolint:gosec // G306: read by another user
			}
			said := s.Make("init").OK(t).Output()
			require.Empty(t, s.Find(said))
			live := client.Run("curl", "-sS", "--cacert", "/trust/root_ca.crt", s.URL()+"/provisioners?limit=100").OK(t).Stdout
			require.JSONEq(t, "{"+tc.want+"}", declaration(t, live))
			tc.check(t)
			if now := kidOf(t, live); kids == "" {
				kids = now
			} else {
				require.Equal(t, kids, now, "the key of admin is the same through all changes")
			}
			require.Contains(t, s.Make("init").OK(t).Output(), "changes=0")
		})
	}
}

func join(parts ...string) string { return strings.Join(parts, ",") }

func merge(all ...stack.Settings) stack.Settings {
	out := stack.Settings{}
	for _, settings := range all {
		for name, value := range settings {
			out[name] = value
		}
	}
	return out
}

// declaration is the answer of GET /provisioners by name, without what is made and not
// declared.
func declaration(t *testing.T, answer string) string {
	t.Helper()
	var list struct{ Provisioners []map[string]any }
	require.NoError(t, json.Unmarshal([]byte(answer), &list))
	byName := map[string]map[string]any{}
	for _, p := range list.Provisioners {
		byName[fmt.Sprint(p["name"])] = p
		for _, made := range []string{"name", "key", "encryptedKey", "publicKeys", "options", "state", "stateReason"} {
			delete(p, made)
		}
		claims, _ := p["claims"].(map[string]any)
		for name, value := range claims {
			if value == false || value == nil { // step-ca writes some of those that are not set
				delete(claims, name)
			}
		}
		if len(claims) == 0 {
			delete(p, "claims")
		}
	}
	data, err := json.Marshal(byName)
	require.NoError(t, err)
	return string(data)
}

func kidOf(t *testing.T, answer string) string {
	t.Helper()
	var list struct {
		Provisioners []struct {
			Name string
			Key  struct{ Kid string }
		}
	}
	require.NoError(t, json.Unmarshal([]byte(answer), &list))
	for _, p := range list.Provisioners {
		if p.Name == "admin" {
			return p.Key.Kid
		}
	}
	return ""
}

// bootstrap lets the client's step know the CA and the password of admin.
func bootstrap(t *testing.T, s *stack.Stack) *stack.Client {
	t.Helper()
	client := s.Client()
	client.Write("/tmp/admin", s.Get("PROVISIONER_PASSWORD"))
	client.Run("step", "ca", "bootstrap", "--force", "--ca-url", s.URL(), "--fingerprint", strings.TrimSpace(client.Read("/trust/fingerprint"))).OK(t)
	return client
}

const asAdmin = " --provisioner admin --provisioner-password-file /tmp/admin"

// step asks for a TLS certificate with the key of admin.
func step(client *stack.Client, name string) stack.Result {
	return client.Shell("step ca certificate '" + name + "' /tmp/x.crt /tmp/x.key --force" + asAdmin)
}

// leaf is the certificate that step gets.
func leaf(t *testing.T, client *stack.Client, name string) *x509.Certificate {
	t.Helper()
	step(client, name).OK(t)
	return certificates(t, client.Read("/tmp/x.crt"))[0]
}

const certificateOfAda = "step ssh certificate ada /tmp/ada --force --no-agent --no-password --insecure" + asAdmin

// sshLifetime is that of an SSH user certificate.
func sshLifetime(t *testing.T, client *stack.Client) time.Duration {
	t.Helper()
	client.Shell(certificateOfAda).OK(t)
	return validity(t, client, "/tmp/ada-cert.pub") - time.Minute // backdated
}

// publicKey is one as Kubernetes has it.
func publicKey(t *testing.T, client *stack.Client) string {
	t.Helper()
	return client.Shell("openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 | openssl pkey -pubout").OK(t).Stdout
}

func TestAReloadThatStepCARefusesIsReportedWithItsReason(t *testing.T) {
	s := stack.Shared(t)
	t.Cleanup(func() { s.Make("init").OK(t) })
	s.WithDirectory(s.Volume("step-ca-config"), `sed -i 's/"address": ":9000"/"address": "nowhere"/' ca.json`)
	refused := s.Make("apply").Exits(t, 2)
	require.Contains(t, refused.Output(), "step-ca: error: it has not taken the new configuration and keeps running with the old one")
	require.Contains(t, refused.Output(), `error reloading ca: invalid address nowhere`)
	newCA(t, s).issue(t, "still-serving.e2e.test")

	// What was edited by hand is drift, and overwritten.
	require.Contains(t, s.Compose("run", "--rm", "--no-deps", "-T", "provisioner-init", "--check").Exits(t, 3).Output(), `msg=updated item="CA configuration"`)
	require.Contains(t, s.Make("init").OK(t).Output(), `msg=updated item="CA configuration"`)
	s.Compose("run", "--rm", "--no-deps", "-T", "provisioner-init", "--check").OK(t)
}
