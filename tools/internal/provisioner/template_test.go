package provisioner

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// edited returns a copy of the shipped templates with one of them changed.
func edited(t *testing.T, file, old, replacement string) string {
	t.Helper()
	files := map[string]string{}
	all, err := filepath.Glob(filepath.Join(shipped, "*.tpl"))
	require.NoError(t, err)
	require.NotEmpty(t, all)
	for _, path := range all {
		data, err := os.ReadFile(path)
		require.NoError(t, err)
		text := string(data)
		if filepath.Base(path) == file {
			require.Contains(t, text, old)
			text = strings.Replace(text, old, replacement, 1)
		}
		files[filepath.Base(path)] = text
	}
	return directory(t, "templates", files)
}

func TestMistakesInTemplatesAreFoundBeforeAnybodyAsksForACertificate(t *testing.T) {
	for name, c := range map[string]struct {
		file, old, replacement string
		want                   []string
	}{
		"a missing brace": {
			"tls-oidc.tpl", "{{ toJson $subject }}", "{{ toJson $subject }",
			[]string{`templates/tls-oidc.tpl is not a template: line 38: unexpected "}" in operand`},
		},
		"a function that does not exist": {
			"ssh-user.tpl", "toJson .Extensions", "json .Extensions",
			[]string{`templates/ssh-user.tpl is not a template: line 54: function "json" not defined`},
		},
		"a function that step-ca takes away": {
			"ssh-user.tpl", "toJson .Extensions", `env "HOME"`,
			[]string{`templates/ssh-user.tpl is not a template: line 54: function "env" not defined`},
		},
		"a field that certificates do not have": {
			"tls-leaf.tpl", `"extKeyUsage"`, `"extKeyUsages"`,
			[]string{
				`templates/tls-leaf.tpl does not work for a host with an ECDSA key: the result has the unknown field "extKeyUsages"; did you mean "extKeyUsage"?`,
			},
		},
		"a field of the subject that does not exist": {
			"tls-leaf.tpl", `"organization": {{`, `"organisation": {{`,
			[]string{
				`templates/tls-leaf.tpl does not work for a host with an ECDSA key: the result has the unknown field "subject.organisation"; did you mean "organization"?`,
			},
		},
		"a usage that does not exist, for RSA keys": {
			"tls-oidc.tpl", `"keyEncipherment"`, `"encipherment"`,
			[]string{`templates/tls-oidc.tpl does not work for a person without groups with an RSA key: unsupported keyUsage encipherment`},
		},
		"a comma that is missing for admins alone": {
			"tls-oidc.tpl", "{{ toJson .Insecure.CR.EmailAddresses }},", "{{ toJson .Insecure.CR.EmailAddresses }}",
			[]string{`templates/tls-oidc.tpl does not work for an admin with an ECDSA key: the result is not JSON: line 5: invalid character '"' after object key:value pair`},
		},
		"a comma that is missing where there is a CRL": {
			"tls-request.tpl", `"crlDistributionPoints": {{ toJson . }},`, `"crlDistributionPoints": {{ toJson . }}`,
			[]string{`templates/tls-request.tpl does not work for a host with an ECDSA key: the result is not JSON: line 8: invalid character '"' after object key:value pair`},
		},
		"a value that does not exist": {
			"ssh-user.tpl", `"keyId": {{ toJson .KeyID }}`, `"keyId": "{{ .KeyId }}"`,
			[]string{`templates/ssh-user.tpl does not work for a person without groups with an ECDSA key: the result has <no value> in it: a value that does not exist was used`},
		},
		"a value of a value that does not exist": {
			"ssh-user.tpl", `toJson .KeyID`, `toJson .Tokens.email`,
			[]string{`templates/ssh-user.tpl does not work for a person without groups with an ECDSA key: the result has null as "keyId": a value that does not exist was used`},
		},
		"names that do not exist": {
			"tls-oidc.tpl", `toJson .SANs`, `toJson .Sans`,
			[]string{`templates/tls-oidc.tpl does not work for a person without groups with an ECDSA key: the result has null as "sans": a value that does not exist was used`},
		},
		"a field of a value that does not exist": {
			"tls-oidc.tpl", `typeIs "*rsa.PublicKey" .Insecure.CR.PublicKey`, `typeIs "*rsa.PublicKey" .Insecure.CR.Key`,
			[]string{`templates/tls-oidc.tpl does not work for a person without groups with an ECDSA key: line 50:40: <.Insecure.CR.Key>: can't evaluate field Key in type interface {}`},
		},
		"something behind the certificate": {
			"ssh-host.tpl", "  \"principals\": {{ toJson .Principals }}\n}", "  \"principals\": {{ toJson .Principals }}\n}}",
			[]string{`templates/ssh-host.tpl does not work for a host with an ECDSA key: the result is not JSON: line 5: invalid character '}' after top-level value`},
		},
		"no principals": {
			"ssh-host.tpl", `{{ toJson .Principals }}`, `[]`,
			[]string{`templates/ssh-host.tpl does not work for a host with an ECDSA key: the result has no principals, which OpenSSH reads as all of them (PROTOCOL.certkeys)`},
		},
		"a certificate that is for users where hosts are due": {
			"ssh-host.tpl", `"type": "host"`, `"type": "user"`,
			[]string{`templates/ssh-host.tpl does not work for a host with an ECDSA key: the result is not a host certificate`},
		},
		"a template for hosts that does not refuse users": {
			"ssh-host.tpl", `{{- if ne .Type "host" }}`, `{{- if ne .Type "hosts" | and false }}`,
			[]string{`templates/ssh-host.tpl does not work for a user with an ECDSA key: it must refuse, or the key of ssh-host-jwk is good for people's certificates; a good beginning: {{- if ne .Type "host" }}{{ fail "hosts only" }}{{ end -}}`},
		},
		"a template for hosts that refuses hosts": {
			"ssh-host.tpl", `{{- if ne .Type "host" }}`, `{{- if ne .Type "guest" }}`,
			[]string{`templates/ssh-host.tpl does not work for a host with an ECDSA key: it refuses: ssh-host-jwk gives SSH host certificates only`},
		},
		"a CA": {
			"tls-oidc.tpl", `"extKeyUsage"`, `"basicConstraints": {"isCA": true}, "extKeyUsage"`,
			[]string{`templates/tls-oidc.tpl does not work for a person without groups with an ECDSA key: the result is a CA certificate, which the intermediate may not issue (RFC 5280, pathLenConstraint)`},
		},
		"nobody's certificate": {
			"tls-request.tpl", "{{- $subject := fromJson (toJson .Insecure.CR.Subject) -}}", `{"keyUsage": ["digitalSignature"]}{{ break }}`,
			[]string{`templates/tls-request.tpl is not a template: line 11: {{break}} outside {{range}}`},
		},
		"text before the brace": {
			"tls-oidc.tpl", "{{- /*", "certificate: {{- /*",
			[]string{"templates/tls-oidc.tpl is not a template: it neither begins with { nor is base64"},
		},
		"a rule of the user's own that refuses": {
			"tls-leaf.tpl", "{{- if not .Wildcards }}", `{{- if not (hasSuffix ".corp" .Subject.CommonName) }}{{ fail "only .corp" }}{{ end }}{{- if not .Wildcards }}`,
			[]string{},
		},
		"an edit that is right": {
			"ssh-user.tpl", `"extensions": {{ toJson .Extensions }}`, `"extensions": {"permit-pty": ""}`,
			[]string{},
		},
	} {
		t.Run(name, func(t *testing.T) {
			public, _ := keyPEM(t)
			s := everything()
			s.K8s = true
			d, problems := Read(s, directory(t, "provisioners.d", map[string]string{k8sKeys: string(public)}), edited(t, c.file, c.old, c.replacement))
			require.Equal(t, c.want, messages(problems))
			require.Equal(t, len(c.want) == 0, d != nil)
		})
	}
}

func TestMissingTemplateIsNamed(t *testing.T) {
	dir := edited(t, "", "", "")
	require.NoError(t, os.Remove(filepath.Join(dir, "ssh-host.tpl")))
	_, problems := Read(everything(), directory(t, "provisioners.d", nil), dir)
	require.Equal(t, []string{"templates/ssh-host.tpl cannot be read: no such file or directory"}, messages(problems))
}

func TestTemplateThatLeadsOutOfItsDirectoryIsNotRead(t *testing.T) {
	dir := edited(t, "", "", "")
	outside := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(outside, []byte("{}"), 0o600))
	require.NoError(t, os.Symlink(outside, filepath.Join(dir, "link.tpl")))
	_, problems := Read(everything(), directory(t, "provisioners.d", map[string]string{
		"a.json": `{"type": "ACME", "name": "x", "options": {"x509": {"templateFile": "link.tpl"}}}`,
	}), dir)
	require.Equal(t, []string{"templates/link.tpl cannot be read: path escapes from parent"}, messages(problems))
}

func TestTemplatesOfDropInsMayBeBase64(t *testing.T) {
	encoded := base64.StdEncoding.EncodeToString([]byte(`{"subject": {{ toJson .Subject }}, "sans": {{ toJson .SANs }}}`))
	for text, want := range map[string][]string{
		encoded: {},
		"hello": {"provisioners.d/a.json (options.x509) is not a template: it neither begins with { nor is base64"},
	} {
		_, problems := Read(everything(), directory(t, "provisioners.d", map[string]string{
			"a.json": `{"type": "ACME", "name": "x", "options": {"x509": {"template": "` + text + `"}}}`,
		}), shipped)
		require.Equal(t, want, messages(problems))
	}
}
