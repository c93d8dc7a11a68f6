// Package provisioner turns settings, drop-in files and templates into the
// provisioners of ca.json.
//
// step-ca forgives: it drops a provisioner of an unknown type and every unknown
// field in silence, and finds a mistake in a template when the first certificate is
// asked for. Here everything is checked before, with step-ca's own types and
// functions, and templates are put into ca.json as they were checked.
package provisioner

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/smallstep/certificates/authority/provisioner"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/pki"
)

// Names of the provisioners that the settings make, on which clients rely. That
// of the OpenID provider is a setting.
const (
	Admin   = "admin"
	ACME    = "acme"
	SSHHost = "ssh-host-jwk"
	SSHPOP  = "ssh-pop"
	K8sSA   = "k8s-sa"
)

// Keys are those of the JWK provisioners.
type Keys struct {
	Admin   *pki.ProvisionerKey
	SSHHost *pki.ProvisionerKey
}

// Declared is what settings and files ask for, checked.
type Declared struct {
	list []provisioner.Interface
	oidc []*provisioner.OIDC
}

// List returns the provisioners in the order of ca.json.
func (d *Declared) List(k Keys) (provisioner.List, error) {
	list := make(provisioner.List, 0, len(d.list))
	for _, p := range d.list {
		if jwk, ok := p.(*provisioner.JWK); ok && jwk.Key == nil { // a built-in one
			key := map[string]*pki.ProvisionerKey{Admin: k.Admin, SSHHost: k.SSHHost}[jwk.Name]
			if key == nil {
				return nil, fmt.Errorf("provisioner %q: has no key", jwk.Name)
			}
			withKey := *jwk
			withKey.Key, withKey.EncryptedKey = key.Public, key.Encrypted
			p = &withKey
		}
		list = append(list, p)
	}
	return list, nil
}

// OIDC returns the OpenID providers among them.
func (d *Declared) OIDC() []*provisioner.OIDC { return slices.Clone(d.oidc) }

// Read checks settings, the *.json files of the directory dropins, and the
// templates, and returns what they declare, or all that is wrong.
func Read(s config.Issuance, dropins, templates string) (*Declared, []error) {
	r := &reader{settings: s, dropins: dropins, templates: templates, names: map[string]string{}, tokenIDs: map[string]string{}}
	for _, b := range r.builtIn() {
		r.add(b.provisioner, b.source)
	}
	r.readDropIns()
	if len(r.problems) > 0 {
		return nil, r.problems
	}
	return &r.declared, nil
}

// reader collects provisioners and problems.
type reader struct {
	settings  config.Issuance
	dropins   string
	templates string
	declared  Declared
	problems  []error
	names     map[string]string // name to its source: a setting or a file
	tokenIDs  map[string]string // what step-ca finds the provisioner of a token by
}

// problem records what is wrong with a setting or a file, once: several provisioners
// may have the same template.
func (r *reader) problem(source, format string, args ...any) {
	err := fmt.Errorf("%s %w", source, fmt.Errorf(format, args...))
	if !slices.ContainsFunc(r.problems, func(other error) bool { return other.Error() == err.Error() }) {
		r.problems = append(r.problems, err)
	}
}

// add puts a provisioner on the list unless another has its name, or the identity
// that step-ca looks up the provisioner of a token by (smallstep/certificates
// v0.30.2, authority/provisioner/collection.go: the start fails on either).
func (r *reader) add(p provisioner.Interface, source string) {
	name := p.GetName()
	if other, taken := r.names[name]; taken {
		r.problem(source, "names the provisioner %q, as %s does; names must differ", name, other)
		return
	}
	r.names[name] = source
	if jwk, ok := p.(*provisioner.JWK); !ok || jwk.Key != nil { // its own name is part of the identity
		id := p.GetIDForToken()
		if other, taken := r.tokenIDs[id]; taken {
			switch p.(type) {
			case *provisioner.K8sSA:
				r.problem(source, "is a second K8sSA provisioner beside that of %s; tokens of service accounts do not say which one they are for", other)
			case *provisioner.OIDC:
				r.problem(source, "has the clientID %q, as %s does; step-ca tells providers apart by it", id, other)
			default:
				r.problem(source, "has the identity %q in tokens, as %s does; step-ca tells provisioners apart by it", id, other)
			}
			return
		}
		r.tokenIDs[id] = source
	}
	r.declared.list = append(r.declared.list, p)
	if oidc, ok := p.(*provisioner.OIDC); ok {
		r.declared.oidc = append(r.declared.oidc, oidc)
	}
}

// short is how a message names a file: by its last directory, as the user knows it
// from the repository, and not by the place where it is mounted.
func short(path string) string {
	return filepath.Join(filepath.Base(filepath.Dir(path)), filepath.Base(path))
}

func joined(items []string) string { return strings.Join(items, ", ") }
