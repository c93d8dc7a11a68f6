package provisioner

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"
	"go.step.sm/crypto/sshutil"
	"go.step.sm/crypto/x509util"
	"golang.org/x/crypto/ssh"
)

// use is what a template is for: each kind of provisioner gives it other values.
type use int

const (
	forLeaf      use = iota // names checked by a one-time token
	forACME                 // names checked by challenges: there is no token
	forCertified            // X5C and Nebula: there is an authorizing certificate
	forPerson               // OIDC
	forRequest              // K8sSA: names are those of the request
	forInstance             // cloud instances
	forHost                 // ssh-host-jwk: must refuse what is not a host's
	forEnriched             // a webhook's answer is part of the values: nobody knows them before
)

// template reads a file of the templates directory, and no other.
func (r *reader) template(file string) (string, bool) {
	root, err := os.OpenRoot(r.templates)
	if err == nil {
		defer root.Close() //nolint:errcheck // read only
		var data []byte
		if data, err = root.ReadFile(file); err == nil {
			return string(data), true
		}
	}
	r.problem(short(r.templates+"/"+file), "cannot be read: %w", cause(err))
	return "", false
}

// sample is one case that a template has to master.
type sample struct {
	name string
	x509 x509util.TemplateData
	ssh  sshutil.TemplateData
	// The request.
	cert *x509.Certificate
	cr   sshutil.CertificateRequest
	// must is what has to come out where that is not free: "host" or "refusal".
	must string
}

// sampleAdmins stand in where no admins are set, so that their part of a template is checked before.
var sampleAdmins = []string{"ada@internal.lan", "pki-admins"}

// names of sample requests
const (
	sampleHost  = "www.internal"
	sampleEmail = "grace@internal.lan"
)

// A key of the right size is all that a template sees: nobody has its private half.
var sampleRSA = &rsa.PublicKey{N: new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 2047), big.NewInt(1)), E: 65537}

// samples returns the cases of a use. admins are those of the template's values.
func samples(u use, admins []string) []sample {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	if len(admins) == 0 {
		admins = sampleAdmins
	}
	token := map[string]any{
		"iss": "admin", "sub": sampleHost, "aud": "https://ca.internal/1.0/sign", "sans": []any{sampleHost},
		"exp": 1.8e9, "iat": 1.8e9, "nbf": 1.8e9, "jti": "id",
	}
	person := func(email string, groups ...any) map[string]any {
		t := map[string]any{
			"iss": "https://sso.internal", "sub": "4711", "aud": "step-ca", "azp": "step-ca", "email": email, "email_verified": true,
			"name": "Grace", "preferred_username": "grace", "nonce": "n", "exp": 1.8e9, "iat": 1.8e9,
		}
		if groups != nil {
			t["groups"] = groups
		}
		return t
	}
	type data struct {
		name         string
		cn           string
		sans         []string
		token        map[string]any
		crt          any
		kind         sshutil.CertType
		requestKind  string
		keyID        string
		principals   []string
		must         string
		sshAlone     bool
		requestNames bool // nobody has checked them
	}
	host := data{
		name: "a host", cn: sampleHost, sans: []string{sampleHost, "192.0.2.1"}, token: token,
		kind: sshutil.HostCert, requestKind: "host", keyID: sampleHost, principals: []string{sampleHost},
	}
	user := host
	user.name, user.sshAlone, user.kind, user.requestKind = "a user", true, sshutil.UserCert, "user"
	var all []data
	switch u {
	case forLeaf:
		all = []data{host, user}
	case forCertified:
		crt := &x509.Certificate{Subject: pkix.Name{CommonName: sampleHost}, DNSNames: []string{sampleHost}, NotAfter: time.Unix(1.8e9, 0)}
		host.crt, user.crt = crt, crt
		all = []data{host, user}
	case forACME:
		host.token = nil
		unnamed := host
		unnamed.name, unnamed.cn = "a request without common name", ""
		all = []data{host, unnamed}
	case forPerson:
		for _, c := range []struct {
			name, email string
			groups      []any
			request     string
		}{
			{"a person without groups", sampleEmail, nil, "user"},
			{"a person with groups", sampleEmail, []any{"developers", "Domain Users"}, "user"},
			{"an admin", address(admins), nil, "user"},
			{"an admin by group", sampleEmail, []any{"developers", admins[len(admins)-1]}, "user"},
			{"an admin's host", sampleEmail, []any{admins[len(admins)-1]}, "host"},
		} {
			local, _, _ := strings.Cut(c.email, "@")
			all = append(all, data{
				name: c.name, cn: "4711", sans: []string{c.email, "https://sso.internal#4711"}, token: person(c.email, c.groups...),
				kind: sshutil.UserCert, requestKind: c.request, keyID: c.email, principals: []string{local, c.email},
			})
		}
	case forRequest, forInstance:
		host.requestNames, host.token = true, map[string]any{
			"iss": "kubernetes/serviceaccount", "sub": "system:serviceaccount:default:web", "kubernetes.io/serviceaccount/namespace": "default",
			"kubernetes.io/serviceaccount/service-account.name": "web",
		}
		all = []data{host}
		if u == forInstance {
			named := host
			named.name, named.requestNames = "an instance with its own names", false
			all = append(all, named)
		}
	case forHost:
		host.must, user.must = "host", "refusal"
		all = []data{host, user}
	case forEnriched:
	}
	var out []sample
	for _, d := range all {
		for _, k := range []struct {
			name string
			key  crypto.PublicKey
		}{{"ECDSA", key.Public()}, {"RSA", sampleRSA}} {
			s := sample{name: fmt.Sprintf("%s with an %s key", d.name, k.name), must: d.must}
			if !d.sshAlone {
				s.x509 = x509util.CreateTemplateData(d.cn, d.sans)
				if d.requestNames {
					delete(s.x509, x509util.SANsKey)
				}
				s.x509.Set("Admins", admins)
				if d.token != nil {
					s.x509.SetToken(d.token)
				}
				if d.crt != nil {
					s.x509.SetAuthorizationCertificate(d.crt)
				}
			}
			s.ssh = sshutil.CreateTemplateData(d.kind, d.keyID, d.principals)
			s.ssh.Set("Admins", admins)
			if d.token != nil {
				s.ssh.SetToken(d.token)
			}
			if d.crt != nil {
				s.ssh.SetAuthorizationCertificate(d.crt)
			}
			s.cert = &x509.Certificate{
				PublicKey: k.key, Subject: pkix.Name{CommonName: d.cn}, DNSNames: []string{sampleHost}, IPAddresses: []net.IP{net.IPv4(192, 0, 2, 1)},
				EmailAddresses: []string{sampleEmail}, URIs: []*url.URL{{Scheme: "spiffe", Host: "internal", Path: "/web"}},
			}
			pub, err := ssh.NewPublicKey(k.key)
			if err != nil {
				panic(err) // both types are known
			}
			s.cr = sshutil.CertificateRequest{Key: pub, Type: d.requestKind, KeyID: d.keyID, Principals: d.principals}
			out = append(out, s)
		}
	}
	return out
}

// address returns the first admin that is one.
func address(admins []string) string {
	for _, a := range admins {
		if strings.Contains(a, "@") {
			return a
		}
	}
	return sampleEmail
}

func adminsOf(templateData json.RawMessage) []string {
	var values struct{ Admins []string }
	if len(templateData) == 0 || json.Unmarshal(templateData, &values) != nil {
		return nil
	}
	return values.Admins
}

// checkX509 runs a template as step-ca will. A case that the template itself
// refuses, with "fail", is no mistake.
func (r *reader) checkX509(source string, o *provisioner.X509Options, u use) {
	text, err := plain(o.Template)
	if err == nil {
		err = x509util.ValidateTemplate([]byte(text))
	}
	if err != nil {
		r.problem(source, "is not a template: %w", readable(err))
		return
	}
	for _, s := range samples(u, adminsOf(o.TemplateData)) {
		if s.x509 == nil {
			continue
		}
		if err := tryX509(o, s); err != nil {
			r.problem(source, "does not work for %s: %w", s.name, readable(err))
			return
		}
	}
}

func tryX509(o *provisioner.X509Options, s sample) error {
	options, err := provisioner.TemplateOptions(&provisioner.Options{X509: o}, s.x509)
	if err != nil {
		return err
	}
	var out x509util.Options
	request := &x509.CertificateRequest{
		PublicKey: s.cert.PublicKey, Subject: s.cert.Subject, DNSNames: s.cert.DNSNames, IPAddresses: s.cert.IPAddresses,
		EmailAddresses: s.cert.EmailAddresses, URIs: s.cert.URIs,
	}
	for _, option := range options.Options(provisioner.SignOptions{}) {
		var refused *x509util.TemplateError
		if err := option(request, &out); errors.As(err, &refused) {
			return nil
		} else if err != nil {
			return err
		}
	}
	result := out.CertBuffer.Bytes()
	if err := checkResult(result, reflect.TypeFor[x509util.Certificate]()); err != nil {
		return err
	}
	certificate, err := x509util.NewCertificateFromX509(s.cert, func(_ *x509.CertificateRequest, o *x509util.Options) error {
		o.CertBuffer = bytes.NewBuffer(result)
		return nil
	})
	if err != nil {
		return err
	}
	leaf := certificate.GetCertificate()
	if leaf.IsCA {
		return errors.New("the result is a CA certificate, which the intermediate may not issue (RFC 5280, pathLenConstraint)")
	}
	leaf.NotBefore, leaf.NotAfter = time.Unix(1.8e9, 0), time.Unix(1.8e9+60, 0)
	_, signer, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	signed, err := x509util.CreateCertificate(leaf, &x509.Certificate{Subject: pkix.Name{CommonName: "sample"}}, s.cert.PublicKey, signer)
	if err != nil {
		return err
	}
	if signed.Subject.CommonName == "" && len(signed.DNSNames)+len(signed.IPAddresses)+len(signed.EmailAddresses)+len(signed.URIs) == 0 && !extended(signed) {
		return errors.New("the result has neither a common name nor subject alternative names")
	}
	return nil
}

// extended says whether there are subject alternative names of kinds that Go does not read.
func extended(c *x509.Certificate) bool {
	for _, e := range c.Extensions {
		if e.Id.Equal([]int{2, 5, 29, 17}) {
			return true
		}
	}
	return false
}

// checkSSH is checkX509 for SSH.
func (r *reader) checkSSH(source string, o *provisioner.SSHOptions, u use) {
	text, err := plain(o.Template)
	if err == nil {
		err = sshutil.ValidateTemplate([]byte(text))
	}
	if err != nil {
		r.problem(source, "is not a template: %w", readable(err))
		return
	}
	for _, s := range samples(u, adminsOf(o.TemplateData)) {
		if err := trySSH(o, s); err != nil {
			r.problem(source, "does not work for %s: %w", s.name, readable(err))
			return
		}
	}
}

func trySSH(o *provisioner.SSHOptions, s sample) error {
	options, err := provisioner.TemplateSSHOptions(&provisioner.Options{SSH: o}, s.ssh)
	if err != nil {
		return err
	}
	var out sshutil.Options
	for _, option := range options.Options(provisioner.SignSSHOptions{}) {
		var refused *sshutil.TemplateError
		if err := option(s.cr, &out); errors.As(err, &refused) {
			if s.must == "host" {
				return fmt.Errorf("it refuses: %w", err)
			}
			return nil
		} else if err != nil {
			return err
		}
	}
	if s.must == "refusal" {
		return errors.New(`it must refuse, or the key of ssh-host-jwk is good for people's certificates; a good beginning: {{- if ne .Type "host" }}{{ fail "hosts only" }}{{ end -}}`)
	}
	result := out.CertBuffer.Bytes()
	if err := checkResult(result, reflect.TypeFor[sshutil.Certificate]()); err != nil {
		return err
	}
	certificate, err := sshutil.NewCertificate(s.cr, func(_ sshutil.CertificateRequest, o *sshutil.Options) error {
		o.CertBuffer = bytes.NewBuffer(result)
		return nil
	})
	if err != nil {
		return err
	}
	c := certificate.GetCertificate()
	switch {
	case c.CertType != ssh.UserCert && c.CertType != ssh.HostCert:
		return errors.New("the result has no type, user or host")
	case s.must == "host" && c.CertType != ssh.HostCert:
		return errors.New("the result is not a host certificate")
	case c.KeyId == "":
		return errors.New("the result has no keyId")
	case len(c.ValidPrincipals) == 0:
		return errors.New("the result has no principals, which OpenSSH reads as all of them (PROTOCOL.certkeys)")
	}
	return nil
}

// checkResult finds what step-ca would overlook in the JSON that a template gives.
func checkResult(result []byte, t reflect.Type) error {
	if err := syntax(result); err != nil {
		return fmt.Errorf("the result %w", err)
	}
	if bytes.Contains(result, []byte("<no value>")) {
		return errors.New("the result has <no value> in it: a value that does not exist was used")
	}
	if problems := strictResult(result, t); len(problems) > 0 {
		return fmt.Errorf("the result %w", problems[0])
	}
	return nil
}

// plain is the text of a template as step-ca reads it: base64 unless it begins with a
// brace (authority/provisioner/options.go).
func plain(template string) (string, error) {
	text := strings.TrimSpace(template)
	if strings.HasPrefix(text, "{") {
		return text, nil
	}
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return "", errors.New("it neither begins with { nor is base64")
	}
	return string(data), nil
}

// readable takes the names that step-ca gives to every template from an error.
func readable(err error) error {
	text := err.Error()
	for _, prefix := range []string{"error parsing template: ", "error executing template: ", "error unmarshaling certificate: "} {
		text = strings.TrimPrefix(text, prefix)
	}
	if rest, ok := strings.CutPrefix(text, "template: template:"); ok {
		text = "line " + strings.Replace(rest, `executing "template" at `, "", 1)
	}
	return errors.New(text)
}
