package provisioner

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/jose"
	"go.step.sm/crypto/minica"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

const anOIDC = `{"type": "OIDC", "name": "partner", "clientID": "other", "clientSecret": "", "configurationEndpoint": "https://login.partner/.well-known/openid-configuration", "domains": ["partner.lan"], "options": {"x509": {"templateFile": "tls-oidc.tpl"}, "ssh": {"templateFile": "ssh-user.tpl"}}}`

// with puts further fields into a drop-in.
func with(base, fields string) string { return strings.TrimSuffix(base, "}") + ", " + fields + "}" }

func TestDropInsAreRefusedForEveryReason(t *testing.T) {
	cert := certificatePEM(t)
	public, private := keyPEM(t)
	x5c := func(roots string) string { return `{"type": "X5C", "name": "servers", "roots": "` + roots + `"}` }
	escaped := func(data []byte) string { return strings.ReplaceAll(string(data), "\n", `\n`) }
	good := x5c(b64(cert))
	for name, c := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"no JSON": {
			map[string]string{"a.json": "{\n\"type\": X5C}"},
			[]string{`provisioners.d/a.json is not JSON: line 2: invalid character 'X' looking for beginning of value`},
		},
		"an empty file":       {map[string]string{"a.json": ""}, []string{"provisioners.d/a.json is not JSON: line 1: unexpected end of JSON input"}},
		"something behind it": {map[string]string{"a.json": good + "\n{}"}, []string{`provisioners.d/a.json is not JSON: line 2: invalid character '{' after top-level value`}},
		"a list": {
			map[string]string{"a.json": "[" + good + "]"},
			[]string{"provisioners.d/a.json is not one provisioner: a JSON object with the strings type and name"},
		},
		"an unknown type that is nearly a known one": {
			map[string]string{"a.json": `{"type": "OICD", "name": "x"}`},
			[]string{`provisioners.d/a.json has the type "OICD", which step-ca does not know; did you mean "OIDC"?; it knows ACME, AWS, Azure, GCP, JWK, K8sSA, Nebula, OIDC, SCEP, SSHPOP, X5C`},
		},
		"no type": {
			map[string]string{"a.json": `{"name": "x"}`},
			[]string{`provisioners.d/a.json has the type "", which step-ca does not know; it knows ACME, AWS, Azure, GCP, JWK, K8sSA, Nebula, OIDC, SCEP, SSHPOP, X5C`},
		},
		"all problems of all files at once": {
			map[string]string{
				"a.json": `{"type": "OIDC", "clientId": "x", "claims": {"defaultTLSDuration": "1h"}, "groups": ["a"], "groups": ["b"]}`,
				"b.json": `{"type": "X5C", "name": "a b", "roots": "` + escaped(cert) + `", "options": {"x509": {"allow": {}}}}`,
			},
			[]string{
				`provisioners.d/a.json has no name; a good value: "name": "partner"`,
				`provisioners.d/a.json has the unknown field "clientId"; did you mean "clientID"?`,
				`provisioners.d/a.json has the unknown field "claims.defaultTLSDuration"`,
				`provisioners.d/a.json has the field "groups" twice`,
				`provisioners.d/b.json has the name "a b", which is not of letters, digits, dots, dashes and underscores; a good value: "partner"`,
				`provisioners.d/b.json has PEM in "roots", where step-ca wants the base64 of PEM`,
				`provisioners.d/b.json has the unknown field "options.x509.allow"`,
			},
		},
		"a field of the wrong type": {
			map[string]string{"a.json": with(good, `"claims": {"enableSSHCA": "yes"}`)},
			[]string{`provisioners.d/a.json has a string in "claims.enableSSHCA", where step-ca wants bool`},
		},
		"a duration in days": {
			map[string]string{"a.json": with(good, `"claims": {"maxTLSCertDuration": "30d"}`)},
			[]string{`provisioners.d/a.json is not as step-ca wants it: error parsing 30d as duration: time: unknown unit "d" in duration "30d"`},
		},
		"the name of a built-in provisioner": {
			map[string]string{"a.json": strings.Replace(anOIDC, "partner", "acme", 1)},
			[]string{`provisioners.d/a.json names the provisioner "acme", as ENABLE_ACME does; names must differ`},
		},
		"the name of the OpenID provider of the settings": {
			map[string]string{"a.json": strings.Replace(anOIDC, "partner", "sso", 1)},
			[]string{`provisioners.d/a.json names the provisioner "sso", as OIDC_NAME does; names must differ`},
		},
		"the name of another file's": {
			map[string]string{"a.json": good, "b.json": good},
			[]string{`provisioners.d/b.json names the provisioner "servers", as provisioners.d/a.json does; names must differ`},
		},
		"the client id of the settings": {
			map[string]string{"a.json": strings.Replace(anOIDC, "other", "step-ca", 1)},
			[]string{`provisioners.d/a.json has the clientID "step-ca", as OIDC_NAME does; step-ca tells providers apart by it`},
		},
		"the client id of another file's": {
			map[string]string{"a.json": anOIDC, "b.json": strings.Replace(anOIDC, "partner", "second", 1)},
			[]string{`provisioners.d/b.json has the clientID "other", as provisioners.d/a.json does; step-ca tells providers apart by it`},
		},
		"two for Kubernetes": {
			map[string]string{
				"a.json": `{"type": "K8sSA", "name": "east", "publicKeys": "` + b64(public) + `"}`,
				"b.json": `{"type": "K8sSA", "name": "west", "publicKeys": "` + b64(public) + `"}`,
			},
			[]string{`provisioners.d/b.json is a second K8sSA provisioner beside that of provisioners.d/a.json; tokens of service accounts do not say which one they are for`},
		},
		"no base64":                          {map[string]string{"a.json": x5c("%%%")}, []string{`provisioners.d/a.json has something in "roots" that is not base64`}},
		"base64 of no PEM":                   {map[string]string{"a.json": x5c(b64([]byte("hello")))}, []string{`provisioners.d/a.json has something in "roots" that is not PEM`}},
		"base64 of a key and no certificate": {map[string]string{"a.json": x5c(b64(public))}, []string{`provisioners.d/a.json has something in "roots" that has a block 1 that is not a certificate (PUBLIC KEY)`}},
		"base64 of more than certificates": {
			map[string]string{"a.json": x5c(b64(append(cert, "and more"...)))},
			[]string{`provisioners.d/a.json has something in "roots" that has something that is not PEM after block 1`},
		},
		"a private key for Kubernetes": {
			map[string]string{"a.json": `{"type": "K8sSA", "name": "east", "publicKeys": "` + b64(private) + `"}`},
			[]string{`provisioners.d/a.json has something in "publicKeys" that has a private key as block 1: only public keys belong there`},
		},
		"no roots": {map[string]string{"a.json": `{"type": "X5C", "name": "servers"}`}, []string{"provisioners.d/a.json would be refused by step-ca: provisioner root(s) cannot be empty"}},
		"Nebula roots that are X.509": {
			map[string]string{"a.json": `{"type": "Nebula", "name": "mesh", "roots": "` + b64(cert) + `"}`},
			[]string{`provisioners.d/a.json would be refused by step-ca: failed to create CA pool: bytes did not contain a proper certificate banner`},
		},
		"TLS lifetimes out of order": {
			map[string]string{"a.json": with(good, `"claims": {"minTLSCertDuration": "48h"}`)},
			[]string{"provisioners.d/a.json has claims by which minTLSCertDuration <= defaultTLSCertDuration <= maxTLSCertDuration is not true: 48h0m0s, 24h0m0s, 720h0m0s (what is not given comes from the settings)"},
		},
		"SSH lifetimes out of order, which step-ca does not see": {
			map[string]string{"a.json": with(good, `"claims": {"defaultUserSSHCertDuration": "8h", "maxUserSSHCertDuration": "4h", "maxHostSSHCertDuration": "0s"}`)},
			[]string{
				"provisioners.d/a.json has claims by which minUserSSHCertDuration <= defaultUserSSHCertDuration <= maxUserSSHCertDuration is not true: 5m0s, 8h0m0s, 4h0m0s (what is not given comes from the settings)",
				"provisioners.d/a.json has claims by which minHostSSHCertDuration <= defaultHostSSHCertDuration <= maxHostSSHCertDuration is not true: 5m0s, 720h0m0s, 0s (what is not given comes from the settings)",
			},
		},
		"leaves that outlive their issuer": {
			map[string]string{"a.json": with(good, `"claims": {"maxTLSCertDuration": "30000h"}`)},
			[]string{"provisioners.d/a.json has a maxTLSCertDuration longer than INTERMEDIATE_LIFETIME (30000h0m0s > 26280h0m0s)"},
		},
		"webhooks that would not be called, or not safely": {
			map[string]string{"a.json": with(good, `"options": {"webhooks": [
				{"name": "a", "url": "http://hosts.internal", "kind": "AUTHORIZING"}, {"name": "b", "url": "https://hosts.internal", "kind": "AUTHORIZING", "certType": "x509"},
				{"name": "c", "url": "https://hosts.internal", "kind": "NOTIFYING"}, {"name": "d", "url": "https://hosts.internal", "kind": "AUTHORIZING", "secret": "x"}]}`)},
			[]string{`provisioners.d/a.json has the unknown field "options.webhooks[3].secret"`},
		},
		"webhooks that would not be called, or not safely, with known fields": {
			map[string]string{"a.json": with(good, `"options": {"webhooks": [
				{"name": "a", "url": "http://hosts.internal", "kind": "AUTHORIZING"}, {"name": "b", "url": "https://hosts.internal", "kind": "AUTHORIZING", "certType": "x509"},
				{"name": "c", "url": "https://hosts.internal", "kind": "NOTIFYING"}, null]}`)},
			[]string{
				`provisioners.d/a.json has in "options.webhooks[0]" what step-ca refuses: webhook url must use https; a good value: {"name": "hosts", "url": "https://hosts.internal/check", "kind": "AUTHORIZING"}`,
				`provisioners.d/a.json has the certType "x509" in "options.webhooks[1]", which is none of ALL, X509 and SSH: step-ca would never call it`,
				`provisioners.d/a.json has the kind "NOTIFYING" in "options.webhooks[2]", which step-ca calls for SCEP alone`,
				`provisioners.d/a.json has nothing in "options.webhooks[3]"`,
			},
		},
		"an OpenID provider with step-ca's own template of TLS certificates": {
			map[string]string{"a.json": strings.Replace(anOIDC, `"x509": {"templateFile": "tls-oidc.tpl"}, `, "", 1)},
			[]string{`provisioners.d/a.json has no options.x509 template: step-ca's own takes addresses that nobody has verified; a good value: {"templateFile": "tls-oidc.tpl"}`},
		},
		"an OpenID provider with step-ca's own template of SSH certificates": {
			map[string]string{"a.json": with(strings.Replace(anOIDC, `, "ssh": {"templateFile": "ssh-user.tpl"}`, "", 1), `"claims": {"enableSSHCA": true}`)},
			[]string{`provisioners.d/a.json has no options.ssh template: step-ca's own takes addresses that nobody has verified; a good value: {"templateFile": "ssh-user.tpl"}`},
		},
		"an OpenID provider for everybody": {
			map[string]string{"a.json": strings.Replace(anOIDC, `["partner.lan"]`, "[]", 1)},
			[]string{"provisioners.d/a.json has neither domains nor groups: everybody with an account at the provider could get certificates"},
		},
		"an OpenID provider without TLS": {
			map[string]string{"a.json": strings.Replace(anOIDC, "https:", "http:", 1)},
			[]string{`provisioners.d/a.json has no https address as configurationEndpoint; a good value: "https://sso.internal/.well-known/openid-configuration"`},
		},
		"a challenge that does not exist": {
			map[string]string{"a.json": `{"type": "ACME", "name": "lab", "challenges": ["http-02"]}`},
			[]string{`provisioners.d/a.json would be refused by step-ca: acme challenge "http-02" is not supported`},
		},
		"SCEP without a key of its own": {
			map[string]string{"a.json": `{"type": "SCEP", "name": "phones", "challenge": "secret"}`},
			[]string{"provisioners.d/a.json has no decrypterKeyPEM: SCEP needs an RSA key, with its decrypterCertificate, and the intermediate's is ECDSA"},
		},
		"SCEP for everybody": {
			map[string]string{"a.json": `{"type": "SCEP", "name": "phones"}`},
			[]string{"provisioners.d/a.json has neither a challenge nor a webhook of the kind SCEPCHALLENGE: everybody could get certificates"},
		},
		"AWS for everybody": {
			map[string]string{"a.json": `{"type": "AWS", "name": "cloud"}`},
			[]string{"provisioners.d/a.json has no accounts: every instance of every customer of AWS could get certificates"},
		},
		"GCP for everybody": {
			map[string]string{"a.json": `{"type": "GCP", "name": "cloud"}`},
			[]string{"provisioners.d/a.json has neither projectIDs nor organizationID nor serviceAccounts: every instance of every customer of GCP could get certificates"},
		},
		"Azure without tenant": {map[string]string{"a.json": `{"type": "Azure", "name": "cloud"}`}, []string{"provisioners.d/a.json has no tenantID"}},
		"a template file outside the directory": {
			map[string]string{"a.json": with(good, `"options": {"x509": {"templateFile": "../ca.json"}}`)},
			[]string{`provisioners.d/a.json has "../ca.json" as "options.x509.templateFile", which is not the name of a file in templates; a good value: "tls-leaf.tpl"`},
		},
		"a template file that is not there": {
			map[string]string{"a.json": with(good, `"options": {"ssh": {"templateFile": "no.tpl"}}`)},
			[]string{"templates/no.tpl cannot be read: no such file or directory"},
		},
		"two templates": {
			map[string]string{"a.json": with(good, `"options": {"x509": {"template": "{}", "templateFile": "tls-leaf.tpl"}}`)},
			[]string{`provisioners.d/a.json has both template and templateFile in "options.x509", of which step-ca would take the first`},
		},
		"values that replace what step-ca has authenticated": {
			map[string]string{"a.json": with(good, `"options": {"x509": {"templateFile": "tls-leaf.tpl", "templateData": {"SANs": []}}}`)},
			[]string{`provisioners.d/a.json sets "options.x509.templateData.SANs", which step-ca fills with what it has authenticated`},
		},
		"a template of its own with a mistake": {
			map[string]string{"a.json": with(good, `"options": {"x509": {"template": "{\"subject\": {{ toJson .Subject }}, \"keyusage\": []}"}}`)},
			[]string{`provisioners.d/a.json (options.x509) does not work for a host with an ECDSA key: the result has the unknown field "keyusage"; did you mean "keyUsage"?`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, problems := Read(everything(), directory(t, "provisioners.d", c.files), shipped)
			require.Equal(t, c.want, messages(problems))
			require.Nil(t, d)
		})
	}
}

func TestPrivateJWKIsRefused(t *testing.T) {
	key, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "", 0)
	require.NoError(t, err)
	data, err := json.Marshal(key)
	require.NoError(t, err)
	_, problems := Read(config.Issuance{}, directory(t, "provisioners.d", map[string]string{"a.json": `{"type": "JWK", "name": "x", "key": ` + string(data) + `}`}), shipped)
	require.Equal(t, []string{"provisioners.d/a.json has a key that is not a public JWK: step-ca shows it to everybody"}, messages(problems))
}

func TestDirectoryNamedLikeADropInIsAnError(t *testing.T) {
	dir := directory(t, "provisioners.d", nil)
	require.NoError(t, os.Mkdir(filepath.Join(dir, "a.json"), 0o700))
	require.NoError(t, os.Symlink("nowhere", filepath.Join(dir, "b.json")))
	_, problems := Read(config.Issuance{}, dir, shipped)
	require.Equal(t, []string{"provisioners.d/a.json cannot be read: is a directory", "provisioners.d/b.json cannot be read: no such file or directory"}, messages(problems))
}

func TestKubernetesNeedsPublicKeys(t *testing.T) {
	public, private := keyPEM(t)
	for name, c := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"public keys": {map[string]string{k8sKeys: string(public) + string(public)}, []string{}},
		"no file": {nil, []string{
			"ENABLE_K8S_PROVISIONER is true, but provisioners.d/k8s-sa.pem is missing: the public keys (PEM) that the cluster signs the tokens of its service accounts with; a good value without it: false",
		}},
		"a private key":         {map[string]string{k8sKeys: string(public) + string(private)}, []string{"provisioners.d/k8s-sa.pem has a private key as block 2: only public keys belong there"}},
		"a certificate":         {map[string]string{k8sKeys: string(certificatePEM(t))}, []string{"provisioners.d/k8s-sa.pem has a block 1 that is not a public key (CERTIFICATE)"}},
		"something else":        {map[string]string{k8sKeys: "hello"}, []string{"provisioners.d/k8s-sa.pem is not PEM"}},
		"an empty file":         {map[string]string{k8sKeys: "\n"}, []string{"provisioners.d/k8s-sa.pem is not PEM"}},
		"a drop-in for another": {map[string]string{k8sKeys: string(public), "a.json": `{"type": "K8sSA", "name": "east", "publicKeys": "` + b64(public) + `"}`}, []string{"provisioners.d/a.json is a second K8sSA provisioner beside that of ENABLE_K8S_PROVISIONER; tokens of service accounts do not say which one they are for"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, problems := Read(config.Issuance{K8s: true}, directory(t, "provisioners.d", c.files), shipped)
			require.Equal(t, c.want, messages(problems))
		})
	}
}

// decrypter returns an RSA key, and a certificate for it.
func decrypter(t *testing.T) (key, cert []byte) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	ca, err := minica.New()
	require.NoError(t, err)
	c, err := ca.Sign(&x509.Certificate{Subject: pkix.Name{CommonName: "decrypter"}, PublicKey: private.Public()})
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(private)
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func TestDropInsOfEveryTypeFollowTheBuiltIns(t *testing.T) {
	cert := certificatePEM(t)
	public, _ := keyPEM(t)
	rsaKey, rsaCert := decrypter(t)
	jwk, err := json.Marshal(keys(t).Admin.Public)
	require.NoError(t, err)
	dir := directory(t, "provisioners.d", map[string]string{
		"README.md": "", "50-oidc.json": with(anOIDC, `"admins": ["Root@PARTNER.lan"], "claims": {"enableSSHCA": true, "maxUserSSHCertDuration": "16h"}`),
		"10-x5c.json":   `{"type": "x5c", "name": "servers", "roots": "` + b64(append(cert, cert...)) + `", "options": {"x509": {"templateFile": "tls-leaf.tpl", "templateData": {"Organization": "Other"}}}}`,
		"20-jwk.json":   `{"type": "JWK", "name": "ci", "key": ` + string(jwk) + `, "options": {"webhooks": [{"name": "hosts", "url": "https://hosts.internal/check", "kind": "enriching"}], "x509": {"template": "{\"subject\": {{ toJson .Webhooks.hosts.subject }}}"}}}`,
		"30-k8s.json":   `{"type": "K8sSA", "name": "east", "publicKeys": "` + b64(public) + `", "options": {"x509": {"templateFile": "tls-request.tpl"}}}`,
		"40-acme.json":  `{"type": "ACME", "name": "devices", "challenges": ["device-attest-01"], "attestationFormats": ["step"], "attestationRoots": "` + b64(cert) + `", "claims": {"maxTLSCertDuration": "720h"}}`,
		"60-aws.json":   `{"type": "AWS", "name": "aws", "accounts": ["1"], "disableCustomSANs": true, "instanceAge": "1h", "options": {"ssh": {"template": "{\"type\": {{ toJson .Type }}, \"keyId\": {{ toJson .KeyID }}, \"principals\": {{ toJson .Principals }}}"}}}`,
		"61-gcp.json":   `{"type": "GCP", "name": "gcp", "projectIDs": ["p"], "disableSSHCAUser": true}`,
		"62-azure.json": `{"type": "Azure", "name": "azure", "tenantID": "t"}`,
		"63-scep.json":  `{"type": "SCEP", "name": "phones", "challenge": "secret", "encryptionAlgorithmIdentifier": 2, "decrypterKeyPEM": "` + b64(rsaKey) + `", "decrypterCertificate": "` + b64(rsaCert) + `"}`,
		"70-pop.json":   `{"type": "SSHPOP", "name": "second-pop", "claims": {"enableSSHCA": true}}`,
	})
	d, problems := Read(everything(), dir, shipped)
	require.Empty(t, messages(problems))
	list, err := d.List(keys(t))
	require.NoError(t, err)
	require.Equal(t, []string{
		"admin", "acme", "ssh-host-jwk", "ssh-pop", "sso", "servers", "ci", "east", "devices", "partner", "aws", "gcp", "azure", "phones", "second-pop",
	}, names(list))
	require.Equal(t, []string{"sso", "partner"}, []string{d.OIDC()[0].Name, d.OIDC()[1].Name})

	servers := list[5].(*provisioner.X5C)
	require.JSONEq(t, `{"Organization": "Other", "CRL": ["http://ca.internal:9080/crl"]}`, string(servers.Options.X509.TemplateData))
	text, err := os.ReadFile(filepath.Join(shipped, "tls-leaf.tpl"))
	require.NoError(t, err)
	require.Equal(t, string(text), servers.Options.X509.Template)
	require.Empty(t, servers.Options.X509.TemplateFile)
	partner := d.OIDC()[1]
	require.JSONEq(t, `{"Organization": "Example Ltd", "CRL": ["http://ca.internal:9080/crl"], "Admins": ["Root@PARTNER.lan", "Root@partner.lan"]}`, string(partner.Options.X509.TemplateData))
	require.JSONEq(t, `{"Admins": ["Root@PARTNER.lan", "Root@partner.lan"]}`, string(partner.Options.SSH.TemplateData))
}

func TestLifetimesThatAreWrongInTheSettingsAreNotBlamedOnDropIns(t *testing.T) {
	s := everything()
	s.CA.TLS = config.Lifetimes{Min: time.Hour}
	_, problems := Read(s, directory(t, "provisioners.d", map[string]string{"a.json": with(anOIDC, `"claims": {"enableSSHCA": true}`)}), shipped)
	require.Empty(t, messages(problems))
}

func TestDropInKeepsItsKeyUnderTheNameOfABuiltInThatIsOff(t *testing.T) {
	k := keys(t)
	jwk, err := json.Marshal(k.Admin.Public)
	require.NoError(t, err)
	d, problems := Read(config.Issuance{}, directory(t, "provisioners.d", map[string]string{"a.json": `{"type": "JWK", "name": "ssh-host-jwk", "key": ` + string(jwk) + `}`}), shipped)
	require.Empty(t, messages(problems))
	list, err := d.List(k)
	require.NoError(t, err)
	require.Equal(t, k.Admin.Public.KeyID, list[1].(*provisioner.JWK).Key.KeyID)
}

// Two built-in provisioners can meet only through OIDC_NAME.
func TestNameOfTheOpenIDProviderMayNotBeTaken(t *testing.T) {
	for name, want := range map[string]string{
		"admin":        `OIDC_NAME names the provisioner "admin", as the built-in one does; names must differ`,
		"ssh-host-jwk": `OIDC_NAME names the provisioner "ssh-host-jwk", as ENABLE_SSH_PROVISIONER does; names must differ`,
	} {
		s := everything()
		s.OIDC.Name = name
		_, problems := Read(s, directory(t, "provisioners.d", nil), shipped)
		require.Equal(t, []string{want}, messages(problems))
	}
}

func TestDirectoryThatIsNotThereIsAnErrorAndNotEmpty(t *testing.T) {
	_, problems := Read(config.Issuance{}, "/nowhere/provisioners.d", shipped)
	require.Equal(t, []string{"provisioners.d cannot be read: no such file or directory"}, messages(problems))
}

func TestKeysThatAreMissingAreAnError(t *testing.T) {
	d, problems := Read(config.Issuance{}, directory(t, "provisioners.d", nil), shipped)
	require.Empty(t, messages(problems))
	_, err := d.List(Keys{})
	require.EqualError(t, err, `provisioner "admin": has no key`)
}

// The examples of the README are files that would be taken.
func TestExamplesOfTheREADMEAreRight(t *testing.T) {
	data, err := os.ReadFile("../../../step-ca/provisioners.d/README.md")
	require.NoError(t, err)
	public, _ := keyPEM(t)
	text := strings.NewReplacer("BASE64-OF-ROOTS", b64(certificatePEM(t)), "BASE64-OF-PUBLIC-KEYS", b64(public)).Replace(string(data))
	files := map[string]string{}
	for i, block := range strings.Split(text, "```json\n")[1:] {
		files[string(rune('a'+i))+".json"], _, _ = strings.Cut(block, "```")
	}
	require.Len(t, files, 5)
	d, problems := Read(everything(), directory(t, "provisioners.d", files), shipped)
	require.Empty(t, messages(problems))
	list, err := d.List(keys(t))
	require.NoError(t, err)
	require.Equal(t, []string{"partner", "servers", "cluster-east", "lab", "checked"}, names(list)[5:])
}
