package provisioner

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/certificates/api"
	authority "github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/policy"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/ca"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/jose"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/pki"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

// authorityWith runs step-ca with what settings declare.
type authorityWith struct {
	t       *testing.T
	client  *ca.Client
	url     string
	admin   *jose.JSONWebKey
	sshHost *jose.JSONWebKey
	sso     *jose.JSONWebKey // of the OpenID provider
	issuer  string
}

func run(t *testing.T, change func(*config.Issuance), rules *policy.X509PolicyOptions) *authorityWith {
	t.Helper()
	key := func() (*jose.JSONWebKey, *pki.ProvisionerKey) {
		k, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "", 0)
		require.NoError(t, err)
		k.KeyID, err = jose.Thumbprint(k)
		require.NoError(t, err)
		public := k.Public()
		return k, &pki.ProvisionerKey{Public: &public, Encrypted: "sealed"}
	}
	a := &authorityWith{t: t}
	var k Keys
	a.admin, k.Admin = key()
	a.sshHost, k.SSHHost = key()
	a.issuer, a.sso = openID(t)

	s := everything()
	s.OIDC.Endpoint = a.issuer + "/.well-known/openid-configuration"
	if change != nil {
		change(&s)
	}
	d, problems := Read(s, directory(t, "provisioners.d", nil), shipped)
	require.Empty(t, messages(problems))
	list, err := d.List(k)
	require.NoError(t, err)

	// Through JSON, as by way of ca.json.
	data, err := json.Marshal(list)
	require.NoError(t, err)
	var read provisioner.List
	require.NoError(t, json.Unmarshal(data, &read))
	dir := t.TempDir()
	server, err := stepcatest.New(dir, stepcatest.Options{SSH: true, Adjust: func(c *authority.Config) {
		c.AuthorityConfig.Provisioners = read
		if rules != nil {
			c.AuthorityConfig.Policy = &policy.Options{X509: rules}
		}
	}})
	require.NoError(t, err)
	require.NoError(t, server.Start())
	t.Cleanup(func() { require.NoError(t, server.Stop()) })
	a.url = server.URL
	a.client, err = ca.NewClient(server.URL, ca.WithRootFile(filepath.Join(server.Certs, "root_ca.crt")))
	require.NoError(t, err)
	return a
}

// openID serves discovery and keys of an OpenID provider.
func openID(t *testing.T) (issuer string, key *jose.JSONWebKey) {
	t.Helper()
	key, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "sso-key", 0)
	require.NoError(t, err)
	mux := http.NewServeMux()
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	issuer = strings.Replace(server.URL, "127.0.0.1", "localhost", 1) // a policy judges names alone
	answer := func(v any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(v) } // the client finds out
	}
	mux.HandleFunc("/.well-known/openid-configuration", answer(map[string]string{"issuer": issuer, "jwks_uri": issuer + "/keys"}))
	mux.HandleFunc("/keys", answer(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{key.Public()}}))
	return issuer, key
}

func (a *authorityWith) sign(key *jose.JSONWebKey, claims map[string]any) string {
	a.t.Helper()
	all := map[string]any{
		"iat": time.Now().Unix(), "nbf": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix(), "jti": rand.Text(), "nonce": rand.Text(),
	}
	for name, value := range claims {
		all[name] = value
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key.Key}, new(jose.SignerOptions).WithHeader("kid", key.KeyID))
	require.NoError(a.t, err)
	token, err := jose.Signed(signer).Claims(all).CompactSerialize()
	require.NoError(a.t, err)
	return token
}

// oneTime is a token as step makes it.
func (a *authorityWith) oneTime(name string, key *jose.JSONWebKey, path, subject string, further map[string]any) string {
	claims := map[string]any{"iss": name, "aud": a.url + path, "sub": subject}
	for k, v := range further {
		claims[k] = v
	}
	return a.sign(key, claims)
}

// login is an identity token. A nil value takes a claim away.
func (a *authorityWith) login(claims map[string]any) string {
	all := map[string]any{
		"iss": a.issuer, "aud": "step-ca", "azp": "step-ca", "sub": "4711", "email": "grace@internal.lan", "email_verified": true, "groups": []string{"staff"},
	}
	for k, v := range claims {
		all[k] = v
		if v == nil {
			delete(all, k)
		}
	}
	return a.sign(a.sso, all)
}

func csr(t *testing.T, key crypto.Signer, template *x509.CertificateRequest) api.CertificateRequest {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	require.NoError(t, err)
	parsed, err := x509.ParseCertificateRequest(der)
	require.NoError(t, err)
	return api.NewCertificateRequest(parsed)
}

func (a *authorityWith) tls(token string, key crypto.Signer, template *x509.CertificateRequest) (*x509.Certificate, error) {
	a.t.Helper()
	answer, err := a.client.Sign(&api.SignRequest{CsrPEM: csr(a.t, key, template), OTT: token})
	if err != nil {
		return nil, err
	}
	return answer.ServerPEM.Certificate, nil
}

func (a *authorityWith) ssh(token, kind, id string, principals ...string) (*ssh.Certificate, error) {
	a.t.Helper()
	pub, err := ssh.NewPublicKey(ecKey(a.t).Public())
	require.NoError(a.t, err)
	answer, err := a.client.SSHSign(&api.SSHSignRequest{PublicKey: pub.Marshal(), OTT: token, CertType: kind, KeyID: id, Principals: principals})
	if err != nil {
		return nil, err
	}
	return answer.Certificate.Certificate, nil
}

func ecKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func sshStep(kind string, principals ...string) map[string]any {
	return map[string]any{"step": map[string]any{"ssh": map[string]any{"certType": kind, "principals": principals}}}
}

func TestKeyOfSSHHostIsGoodForHostCertificatesOnly(t *testing.T) {
	a := run(t, nil, nil)

	host, err := a.ssh(a.oneTime(SSHHost, a.sshHost, "/1.0/ssh/sign", "web1.internal", sshStep("host", "web1.internal", "10.0.0.5")), "host", "web1.internal", "web1.internal", "10.0.0.5")
	require.NoError(t, err)
	require.EqualValues(t, ssh.HostCert, host.CertType)
	require.Equal(t, []string{"web1.internal", "10.0.0.5"}, host.ValidPrincipals)
	require.Empty(t, host.Extensions)

	const refused = "ssh-host-jwk gives SSH host certificates only"
	for name, c := range map[string]struct{ token, request string }{
		"a token and a request for a user":              {"user", "user"},
		"a token for a user, a request for nothing":     {"user", ""},
		"a token for nothing, a request for a user":     {"", "user"},
		"a token for nothing and a request for nothing": {"", ""},
	} {
		_, err := a.ssh(a.oneTime(SSHHost, a.sshHost, "/1.0/ssh/sign", "root", sshStep(c.token, "root")), c.request, "root", "root")
		require.ErrorContains(t, err, refused, name)
	}
	// A token for a host does for no other type of request.
	_, err = a.ssh(a.oneTime(SSHHost, a.sshHost, "/1.0/ssh/sign", "root", sshStep("host", "root")), "user", "root", "root")
	require.Error(t, err)

	for _, path := range []string{"/1.0/sign", "/sign"} {
		_, err = a.tls(a.oneTime(SSHHost, a.sshHost, path, "web1.internal", nil), ecKey(t), &x509.CertificateRequest{DNSNames: []string{"web1.internal"}})
		require.ErrorContains(t, err, refused)
	}
	// Revoking is the one thing beside it: step-ca lets every JWK provisioner do it
	// and asks nobody (authority/provisioner/jwk.go). Here only the database is missing.
	_, err = a.client.Revoke(&api.RevokeRequest{Serial: "1", OTT: a.oneTime(SSHHost, a.sshHost, "/1.0/revoke", "1", nil), Passive: true}, nil)
	require.ErrorContains(t, err, "not implemented")
	// Nor is it another provisioner's key.
	_, err = a.tls(a.oneTime(Admin, a.sshHost, "/1.0/sign", "web1.internal", nil), ecKey(t), &x509.CertificateRequest{DNSNames: []string{"web1.internal"}})
	require.Error(t, err)
}

func TestAdminGetsEverything(t *testing.T) {
	a := run(t, nil, nil)
	for _, kind := range []string{"user", "host"} {
		c, err := a.ssh(a.oneTime(Admin, a.admin, "/1.0/ssh/sign", "root", sshStep(kind, "root")), kind, "root", "root")
		require.NoError(t, err)
		require.Equal(t, []string{"root"}, c.ValidPrincipals)
	}
	_, err := a.tls(a.oneTime(Admin, a.admin, "/1.0/sign", "web1.internal", nil), ecKey(t), &x509.CertificateRequest{DNSNames: []string{"web1.internal"}})
	require.NoError(t, err)
}

func TestAdminIsForTLSAloneWithoutSSH(t *testing.T) {
	a := run(t, func(s *config.Issuance) { s.SSH.Enabled = false }, nil)
	_, err := a.ssh(a.oneTime(Admin, a.admin, "/1.0/ssh/sign", "root", sshStep("user", "root")), "user", "root", "root")
	require.Error(t, err)
	_, err = a.ssh(a.login(nil), "user", "")
	require.Error(t, err)
}

// leaf is what matters of a TLS certificate.
type leaf struct {
	Subject     string
	Names       []string
	CRL         []string
	KeyUsage    x509.KeyUsage
	ExtKeyUsage []x509.ExtKeyUsage
}

func read(c *x509.Certificate) leaf {
	l := leaf{Subject: c.Subject.String(), CRL: c.CRLDistributionPoints, KeyUsage: c.KeyUsage, ExtKeyUsage: c.ExtKeyUsage}
	l.Names = append(l.Names, c.DNSNames...)
	for _, ip := range c.IPAddresses {
		l.Names = append(l.Names, ip.String())
	}
	l.Names = append(l.Names, c.EmailAddresses...)
	for _, u := range c.URIs {
		l.Names = append(l.Names, u.String())
	}
	return l
}

func TestTLSCertificatesAreAsTheTemplatesSay(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	crl := []string{"http://ca.internal:9080/crl"}
	full := run(t, nil, nil)
	bare := run(t, func(s *config.Issuance) {
		s.CA.Organization, s.CA.RevocationPort, s.OIDC.Admins, s.OIDC.Domains, s.Policy.Wildcards = "", 0, nil, nil, true
		s.OIDC.TenantID = ""
	}, nil)
	person := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"www.internal"}}
	request := &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "db.internal", OrganizationalUnit: []string{"Databases"}}, DNSNames: []string{"db.internal"}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 5)},
	}
	own := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "db.internal", Organization: []string{"Own"}}, DNSNames: []string{"db.internal"}}
	web := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "web.internal"}, DNSNames: []string{"web.internal"}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 5)}}
	wild := &x509.CertificateRequest{DNSNames: []string{"*.internal"}}
	oneTime := func(a *authorityWith, subject string, sans ...string) string {
		return a.oneTime(Admin, a.admin, "/1.0/sign", subject, map[string]any{"sans": sans})
	}
	id := func(a *authorityWith) string { return a.issuer + "#4711" }
	ec, rs := x509.KeyUsageDigitalSignature, x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment
	const noWildcards = "certificates for wildcards are switched off (POLICY_WILDCARDS)"
	for name, c := range map[string]struct {
		ca      *authorityWith
		token   string
		key     crypto.Signer
		request *x509.CertificateRequest
		want    leaf
		refused string
	}{
		"a server with an ECDSA key": {full, oneTime(full, "web.internal", "web.internal", "10.0.0.5"), ecKey(t), web, leaf{"CN=web.internal,O=Example Ltd", []string{"web.internal", "10.0.0.5"}, crl, ec, both}, ""},
		"a server with an RSA key":   {full, oneTime(full, "web.internal", "web.internal", "10.0.0.5"), rsaKey, web, leaf{"CN=web.internal,O=Example Ltd", []string{"web.internal", "10.0.0.5"}, crl, rs, both}, ""},
		"a server where neither organisation nor CRL is set": {
			bare, oneTime(bare, "web.internal", "web.internal", "10.0.0.5"), ecKey(t), web, leaf{"CN=web.internal", []string{"web.internal", "10.0.0.5"}, nil, ec, both}, "",
		},
		"a wildcard":                        {full, oneTime(full, "any", "*.internal"), ecKey(t), wild, leaf{}, noWildcards},
		"a wildcard as common name":         {full, oneTime(full, "*.internal", "web.internal"), ecKey(t), &x509.CertificateRequest{Subject: pkix.Name{CommonName: "*.internal"}, DNSNames: []string{"web.internal"}}, leaf{}, noWildcards},
		"a wildcard where they are allowed": {bare, oneTime(bare, "any", "*.internal"), ecKey(t), wild, leaf{"CN=any", []string{"*.internal"}, nil, ec, both}, ""},
		"a person gets their own names whatever they request": {
			full, full.login(nil), ecKey(t), person, leaf{"CN=grace@internal.lan,O=Example Ltd", []string{"grace@internal.lan", id(full)}, crl, ec, both}, "",
		},
		"a person with an RSA key, where nothing is set": {
			bare, bare.login(nil), rsaKey, person, leaf{"CN=grace@internal.lan", []string{"grace@internal.lan", id(bare)}, nil, rs, both}, "",
		},
		"an admin by address, in another case, gets what is requested": {
			full, full.login(map[string]any{"email": "Ada@Internal.LAN"}), ecKey(t), request,
			leaf{"CN=db.internal,OU=Databases,O=Example Ltd", []string{"db.internal", "10.0.0.5"}, crl, ec, both},
			"",
		},
		"an admin by group, with an organisation of their own": {
			full, full.login(map[string]any{"groups": []string{"staff", "pki-admins"}}), rsaKey, own, leaf{"CN=db.internal,O=Own", []string{"db.internal"}, crl, rs, both}, "",
		},
		"an address that differs from an admin's in the case of its local part": {
			full, full.login(map[string]any{"email": "ada@internal.lan"}), ecKey(t), request, leaf{"CN=ada@internal.lan,O=Example Ltd", []string{"ada@internal.lan", id(full)}, crl, ec, both}, "",
		},
		"an admin's wildcard":              {full, full.login(map[string]any{"email": "Ada@internal.lan"}), ecKey(t), wild, leaf{}, noWildcards},
		"a person without an address":      {full, full.login(map[string]any{"email": nil}), ecKey(t), person, leaf{}, "the identity token has no e-mail address; ask for the scope email"},
		"a person whose address is a host": {bare, bare.login(map[string]any{"email": "www.internal"}), ecKey(t), person, leaf{}, "the identity token has no e-mail address; ask for the scope email"},
		"a person whose address is a URI":  {bare, bare.login(map[string]any{"email": "spiffe://internal/ca@x"}), ecKey(t), person, leaf{}, "the identity token has no e-mail address; ask for the scope email"},
		"a person whose address the provider has not verified": {
			full, full.login(map[string]any{"email_verified": false}), ecKey(t), person, leaf{}, "the OpenID provider does not say that this e-mail address is verified",
		},
		"a person of whose address the provider says nothing": {
			bare, bare.login(map[string]any{"email_verified": nil}), ecKey(t), person, leaf{}, "the OpenID provider does not say that this e-mail address is verified",
		},
		"a person of whose address a tenant of Entra ID says nothing": {
			full, full.login(map[string]any{"email_verified": nil}), ecKey(t), person, leaf{"CN=grace@internal.lan,O=Example Ltd", []string{"grace@internal.lan", id(full)}, crl, ec, both}, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := c.ca.tls(c.token, c.key, c.request)
			if c.refused != "" {
				require.ErrorContains(t, err, c.refused)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want, read(got))
		})
	}
}

func TestSSHCertificatesOfPeople(t *testing.T) {
	a := run(t, nil, nil)
	extensions := map[string]string{
		"permit-X11-forwarding": "", "permit-agent-forwarding": "", "permit-port-forwarding": "", "permit-pty": "", "permit-user-rc": "",
	}
	type want struct {
		kind       uint32
		id         string
		principals []string
		extensions map[string]string
	}
	for name, c := range map[string]struct {
		claims  map[string]any
		kind    string
		id      string
		request []string
		want    want
		refused string
	}{
		"names after the address, and groups": {
			map[string]any{"email": "Grace.Hopper@internal.lan", "groups": []string{"staff", "DB-admins", "Domain Users", "root", "/ops", ""}},
			"user", "", nil,
			want{ssh.UserCert, "Grace.Hopper@internal.lan", []string{"gracehopper", "Grace.Hopper", "Grace.Hopper@internal.lan", "group-staff", "group-DB-admins", "group-root"}, extensions},
			"",
		},
		"an address cannot be taken for a group": {
			map[string]any{"email": "group-root@internal.lan"},
			"user", "", nil,
			want{ssh.UserCert, "group-root@internal.lan", []string{"group-root@internal.lan", "group-staff"}, extensions},
			"",
		},
		"other names on request": {nil, "user", "", []string{"root"}, want{ssh.UserCert, "grace@internal.lan", []string{"grace", "grace@internal.lan", "group-staff"}, extensions}, ""},
		"a host":                 {nil, "host", "web1", []string{"web1"}, want{}, "ssh certificate type does not match"},
		"an admin gets other names on request": {
			map[string]any{"email": "Ada@INTERNAL.lan"}, "user", "ada", []string{"root"}, want{ssh.UserCert, "ada", []string{"root", "group-staff"}, extensions}, "",
		},
		"an admin's host without a name, which would be good for every host": {
			map[string]any{"email": "Ada@internal.lan"}, "host", "web1", nil, want{}, "ssh certificate principals cannot be empty",
		},
		"an admin by group gets a host": {
			map[string]any{"groups": []string{"pki-admins", "staff"}}, "host", "web1", []string{"web1"}, want{ssh.HostCert, "web1", []string{"web1"}, map[string]string{}}, "",
		},
		"no address":              {map[string]any{"email": nil}, "user", "", nil, want{}, "the identity token has no e-mail address; ask for the scope email"},
		"an unverified address":   {map[string]any{"email_verified": false}, "user", "", nil, want{}, "the OpenID provider does not say that this e-mail address is verified"},
		"an address of elsewhere": {map[string]any{"email": "grace@elsewhere.lan"}, "user", "", nil, want{}, "lacked necessary authorization"},
		"none of the groups":      {map[string]any{"groups": []string{"guests"}}, "user", "", nil, want{}, "lacked necessary authorization"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := a.ssh(a.login(c.claims), c.kind, c.id, c.request...)
			if c.refused != "" {
				require.ErrorContains(t, err, c.refused)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want, want{got.CertType, got.KeyId, got.ValidPrincipals, got.Extensions})
		})
	}
}

// What caconfig renders from POLICY_* rests on this.
func TestPolicyOfNames(t *testing.T) {
	a := run(t, func(s *config.Issuance) { s.CA.Organization = "" }, &policy.X509PolicyOptions{AllowedNames: &policy.X509NameOptions{
		DNSDomains: []string{"*.internal"}, IPRanges: []string{"10.0.0.0/8", "2001:db8::/32"}, EmailAddresses: []string{"@internal.lan"}, URIDomains: []string{"localhost"},
	}})
	for name, refused := range map[string]string{
		"a.internal": "", "10.1.2.3": "", "2001:db8::1": "",
		"a.b.internal": `dns name "a.b.internal" not allowed`, "internal": `dns name "internal" not allowed`, "11.0.0.1": `ip name "11.0.0.1" not allowed`,
	} {
		request := &x509.CertificateRequest{}
		if ip := net.ParseIP(name); ip != nil {
			request.IPAddresses = []net.IP{ip}
		} else {
			request.DNSNames = []string{name}
		}
		_, err := a.tls(a.oneTime(Admin, a.admin, "/1.0/sign", name, nil), ecKey(t), request)
		if refused == "" {
			require.NoError(t, err, name)
		} else {
			require.ErrorContains(t, err, refused)
		}
	}
	_, err := a.tls(a.login(nil), ecKey(t), &x509.CertificateRequest{})
	require.NoError(t, err, "a person's certificate has an address twice, and the provider's URI")
	_, err = a.tls(a.login(map[string]any{"email": "grace@sub.internal.lan", "groups": []string{"staff", "pki-admins"}}), ecKey(t), &x509.CertificateRequest{EmailAddresses: []string{"grace@sub.internal.lan"}})
	require.ErrorContains(t, err, `email name "grace@sub.internal.lan" not allowed`)
	// step-ca answers although its own names, localhost among them, are not allowed ones; and SSH is not judged.
	_, err = a.ssh(a.login(nil), "user", "")
	require.NoError(t, err)
	_, err = a.ssh(a.oneTime(SSHHost, a.sshHost, "/1.0/ssh/sign", "web1", sshStep("host", "web1")), "host", "web1", "web1")
	require.NoError(t, err)
}

// With no allowed names there is nothing by which authority.policy would refuse a
// wildcard: that is why the templates do.
func TestPolicyWithoutAllowedNamesLetsWildcardsPass(t *testing.T) {
	a := run(t, func(s *config.Issuance) { s.Policy.Wildcards = true }, &policy.X509PolicyOptions{DeniedNames: &policy.X509NameOptions{DNSDomains: []string{"dummy.invalid"}}})
	_, err := a.tls(a.oneTime(Admin, a.admin, "/1.0/sign", "any", map[string]any{"sans": []string{"*.internal"}}), ecKey(t), &x509.CertificateRequest{DNSNames: []string{"*.internal"}})
	require.NoError(t, err)
}
