package provisioner

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/smallstep/certificates/authority/provisioner"
)

// A template of step-ca that refuses: the key of ssh-host-jwk is for hosts alone.
const noTLS = `{{ fail "ssh-host-jwk gives SSH host certificates only" }}`

// The file with the public keys that a Kubernetes cluster signs the tokens of its
// service accounts with.
const k8sKeys = "k8s-sa.pem"

type builtIn struct {
	provisioner provisioner.Interface
	source      string // the setting that asks for it
}

// builtIn returns the provisioners that settings ask for, in the order of ca.json.
func (r *reader) builtIn() []builtIn {
	s := r.settings
	admin := &provisioner.JWK{Type: "JWK", Name: Admin, Options: &provisioner.Options{X509: r.x509("tls-leaf.tpl", forLeaf, nil)}}
	if s.SSH.Enabled {
		admin.Claims = withSSH()
	}
	list := []builtIn{{admin, "the built-in one"}}
	if s.ACME.Enabled {
		acme := &provisioner.ACME{
			Type: "ACME", Name: ACME, RequireEAB: s.ACME.RequireEAB,
			Options: &provisioner.Options{X509: r.x509("tls-leaf.tpl", forACME, nil)},
		}
		for _, c := range s.ACME.Challenges {
			acme.Challenges = append(acme.Challenges, provisioner.ACMEChallenge(c))
		}
		list = append(list, builtIn{acme, "ENABLE_ACME"})
	}
	if s.SSH.Enabled {
		list = append(list,
			builtIn{&provisioner.JWK{
				Type: "JWK", Name: SSHHost, Claims: withSSH(),
				Options: &provisioner.Options{X509: &provisioner.X509Options{Template: noTLS}, SSH: r.ssh("ssh-host.tpl", forHost, nil)},
			}, "ENABLE_SSH_PROVISIONER"},
			builtIn{&provisioner.SSHPOP{Type: "SSHPOP", Name: SSHPOP, Claims: withSSH()}, "ENABLE_SSH_PROVISIONER"})
	}
	if s.OIDC.Enabled() {
		oidc := &provisioner.OIDC{
			Type: "OIDC", Name: s.OIDC.Name, ClientID: s.OIDC.ClientID, ClientSecret: s.OIDC.ClientSecret.Reveal(),
			ConfigurationEndpoint: s.OIDC.Endpoint, TenantID: s.OIDC.TenantID, Admins: s.OIDC.Admins, Domains: s.OIDC.Domains,
			Groups: s.OIDC.Groups, ListenAddress: s.OIDC.ListenAddress, Scopes: s.OIDC.Scopes,
		}
		oidc.Options = &provisioner.Options{X509: r.x509("tls-oidc.tpl", forPerson, peopleValues(oidc))}
		if s.SSH.Enabled {
			oidc.Claims = withSSH()
			oidc.Options.SSH = r.ssh("ssh-user.tpl", forPerson, peopleValues(oidc))
		}
		list = append(list, builtIn{oidc, "OIDC_NAME"})
	}
	if s.K8s {
		if keys, ok := r.k8sKeys(); ok {
			list = append(list, builtIn{&provisioner.K8sSA{
				Type: "K8sSA", Name: K8sSA, PubKeys: keys,
				Options: &provisioner.Options{X509: r.x509("tls-request.tpl", forRequest, nil)},
			}, "ENABLE_K8S_PROVISIONER"})
		}
	}
	return list
}

func withSSH() *provisioner.Claims {
	enabled := true
	return &provisioner.Claims{EnableSSHCA: &enabled}
}

// adminNames are admins as the templates compare them. step-ca ignores the case of
// an address's domain, and takes every item for a group too (authority/provisioner/oidc.go).
func adminNames(admins []string) []string {
	var names []string
	for _, a := range admins {
		names = append(names, a)
		if i := strings.LastIndex(a, "@"); i >= 0 && a[:i]+strings.ToLower(a[i:]) != a {
			names = append(names, a[:i]+strings.ToLower(a[i:]))
		}
	}
	return names
}

// peopleValues are what the templates of an OIDC provisioner get from it.
func peopleValues(p *provisioner.OIDC) map[string]any {
	v := map[string]any{}
	if admins := adminNames(p.Admins); len(admins) > 0 {
		v["Admins"] = admins
	}
	// Microsoft Entra ID sends no email_verified.
	if p.TenantID != "" {
		v["TrustEmail"] = true
	}
	return v
}

// values are what the templates of TLS certificates get from .env, beside others.
func (r *reader) values(others map[string]any) map[string]any {
	v := map[string]any{}
	if o := r.settings.CA.Organization; o != "" {
		v["Organization"] = o
	}
	if crl := r.settings.CA.RevocationURL("crl"); crl != "" {
		v["CRL"] = []string{crl}
	}
	if r.settings.Policy.Wildcards {
		v["Wildcards"] = true
	}
	maps.Copy(v, others)
	return v
}

func templateData(values map[string]any) json.RawMessage {
	if len(values) == 0 {
		return nil
	}
	data, err := json.Marshal(values)
	if err != nil {
		panic(err) // strings, lists of strings and booleans
	}
	return data
}

// x509 returns options with a shipped template in them, checked.
func (r *reader) x509(file string, u use, others map[string]any) *provisioner.X509Options {
	text, ok := r.template(file)
	if !ok {
		return nil
	}
	o := &provisioner.X509Options{Template: text, TemplateData: templateData(r.values(others))}
	r.checkX509(short(filepath.Join(r.templates, file)), o, u)
	return o
}

func (r *reader) ssh(file string, u use, values map[string]any) *provisioner.SSHOptions {
	text, ok := r.template(file)
	if !ok {
		return nil
	}
	o := &provisioner.SSHOptions{Template: text, TemplateData: templateData(values)}
	r.checkSSH(short(filepath.Join(r.templates, file)), o, u)
	return o
}

func (r *reader) k8sKeys() ([]byte, bool) {
	path := filepath.Join(r.dropins, k8sKeys)
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.problem("ENABLE_K8S_PROVISIONER", "is true, but %s is missing: the public keys (PEM) that the cluster signs the tokens of its service accounts with; a good value without it: false", short(path))
		return nil, false
	case err != nil:
		r.problem("ENABLE_K8S_PROVISIONER", "is true, but %s cannot be read: %w", short(path), cause(err))
		return nil, false
	}
	if err := publicKeys(data); err != nil {
		r.problem(short(path), "%w", err)
		return nil, false
	}
	return data, true
}

// cause takes the path, which the message already has, from an error.
func cause(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

var errNoPEM = errors.New("is not PEM")

// blocks splits PEM. step-ca ignores whatever is between and after the blocks; here
// that is a mistake, as half a key is.
func blocks(data []byte) ([]*pem.Block, error) {
	var all []*pem.Block
	for rest := data; len(strings.TrimSpace(string(rest))) > 0; {
		block, after := pem.Decode(rest)
		if block == nil {
			if len(all) == 0 {
				return nil, errNoPEM
			}
			return nil, fmt.Errorf("has something that is not PEM after block %d", len(all))
		}
		all = append(all, block)
		rest = after
	}
	if len(all) == 0 {
		return nil, errNoPEM
	}
	return all, nil
}
