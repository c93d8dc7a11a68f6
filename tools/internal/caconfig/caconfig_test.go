package caconfig

import (
	"crypto/x509"
	"encoding/json"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	authority "github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/policy"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/pki"
)

var store = pki.Store{Root: "/root-ca", Certs: "/home/step/certs", Secrets: "/home/step/secrets"}

func settings() Settings {
	return Settings{Issuance: config.Issuance{
		CA: config.CA{
			Name: "Test", Domain: "ca.internal", Names: []string{"ca.internal"}, Port: 9000, RevocationPort: 9080,
			TLS: config.Lifetimes{Min: time.Minute, Default: time.Hour, Max: 24 * time.Hour},
		},
		SSH: config.SSH{
			User: config.Lifetimes{Min: time.Minute, Default: time.Hour, Max: 24 * time.Hour},
			Host: config.Lifetimes{Min: time.Minute, Default: time.Hour, Max: 24 * time.Hour},
		},
		OIDC: config.OIDC{ClientID: "pki", Domains: []string{"people.internal"}},
	}, Provisioners: provisioner.List{
		&provisioner.OIDC{Type: "OIDC", Name: "sso", ClientID: "pki", ConfigurationEndpoint: "https://sso.internal:8443/.well-known/openid-configuration"},
	}}
}

func TestTheCRLServiceDiffersInItsCRLAlone(t *testing.T) {
	s := settings()
	read := func(data []byte, err error) (c authority.Config) {
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(data, &c))
		return c
	}
	ca, crl := read(Render(s, store, "postgresql://db")), read(RenderCRL(s, store, "postgresql://db"))
	require.Nil(t, ca.CRL)
	require.Empty(t, ca.InsecureAddress)
	require.Equal(t, &authority.CRLConfig{
		Enabled: true, GenerateOnRevoke: true, RenewPeriod: duration(time.Minute), CacheDuration: duration(24 * time.Hour),
		IDPurl: "http://ca.internal:9080/crl",
	}, crl.CRL)
	require.Equal(t, []string{"ca.internal", "crl", "crl.ca.internal"}, crl.DNSNames)
	crl.CRL, crl.InsecureAddress, crl.DNSNames = nil, "", ca.DNSNames
	require.Equal(t, ca, crl)
}

func TestPolicy(t *testing.T) {
	some := config.Policy{DNS: []string{"*.internal", "www.lan"}, IPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Emails: []string{"@lan", "a@b.lan"}}
	server := func(name string) *x509.Certificate { return &x509.Certificate{DNSNames: []string{name}} }
	person := func(address, issuer string) *x509.Certificate {
		u, err := url.Parse(issuer + "#4711")
		require.NoError(t, err)
		c := &x509.Certificate{EmailAddresses: []string{address}, URIs: []*url.URL{u}}
		c.Subject.CommonName = address
		return c
	}
	tests := map[string]struct {
		policy config.Policy
		leaf   *x509.Certificate
		want   string
	}{
		"without a policy any name is good":                   {config.Policy{}, server("a_b.anywhere"), ""},
		"a star stands for a label":                           {some, server("a.internal"), ""},
		"and for one label only":                              {some, server("a.b.internal"), `dns name "a.b.internal" not allowed`},
		"an exact name":                                       {some, server("www.lan"), ""},
		"a name that is not on the list":                      {some, server("mail.lan"), `dns name "mail.lan" not allowed`},
		"a wildcard":                                          {some, server("*.internal"), `dns name "*.internal" not allowed`},
		"a wildcard where they are on":                        {config.Policy{DNS: some.DNS, Wildcards: true}, server("*.internal"), ""},
		"an address":                                          {some, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(10, 1, 2, 3)}}, ""},
		"an address that is not on the list":                  {some, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(11, 1, 2, 3)}}, `ip name "11.1.2.3" not allowed`},
		"a kind of which none is on the list":                 {config.Policy{DNS: some.DNS}, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(10, 1, 2, 3)}}, `ip name "10.1.2.3" not allowed`},
		"a person of the provider":                            {some, person("ada@people.internal", "https://sso.internal:8443"), ""},
		"a person of the provider where only hosts are named": {config.Policy{DNS: some.DNS}, person("ada@people.internal", "https://sso.internal:8443"), ""},
		"a person of another provider":                        {some, person("ada@people.internal", "https://sso.evil"), `uri name "https://sso.evil#4711" not allowed`},
		"an address of another domain":                        {some, person("ada@evil", "https://sso.internal"), `email name "ada@evil" not allowed`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			s := settings()
			s.Policy = tc.policy
			engine := policies(t, s)
			err := engine.IsX509CertificateAllowed(tc.leaf)
			if tc.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, tc.want)
		})
	}
}

func TestPolicyOfSSH(t *testing.T) {
	tests := map[string]struct {
		policy     config.Policy
		certType   uint32
		principals []string
		allowed    bool
	}{
		"without a policy any host":    {config.Policy{}, ssh.HostCert, []string{"anything", "192.0.2.1"}, true},
		"a host on the list":           {config.Policy{DNS: []string{"*.internal"}}, ssh.HostCert, []string{"h.internal"}, true},
		"a host that is not":           {config.Policy{DNS: []string{"*.internal"}}, ssh.HostCert, []string{"h.lan"}, false},
		"a host where addresses are":   {config.Policy{IPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}, ssh.HostCert, []string{"10.1.2.3"}, true},
		"a host where only people are": {config.Policy{Emails: []string{"@lan"}}, ssh.HostCert, []string{"h.internal"}, false},
		"people are no matter of it":   {config.Policy{DNS: []string{"*.internal"}}, ssh.UserCert, []string{"ada", "ada@anywhere", "group-x"}, true},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			s := settings()
			s.Policy = tc.policy
			err := policies(t, s).IsSSHCertificateAllowed(&ssh.Certificate{CertType: tc.certType, ValidPrincipals: tc.principals})
			require.Equal(t, tc.allowed, err == nil, "%v", err)
		})
	}
}

// policies is what step-ca makes of the rendered policy.
func policies(t *testing.T, s Settings) *policy.Engine {
	t.Helper()
	data, err := Render(s, store, "postgresql://db")
	require.NoError(t, err)
	var c authority.Config
	require.NoError(t, json.Unmarshal(data, &c))
	engine, err := policy.New(c.AuthorityConfig.Policy)
	require.NoError(t, err)
	return engine
}

// Every policy that the settings let pass is one that step-ca starts with.
func FuzzPolicy(f *testing.F) {
	for _, seed := range []string{"*.internal www.lan", "10.0.0.0/8 2001:db8::/32", "@lan root@lan", "xn--bcher-kva.lan", "0", "a-.lan", "00--0"} {
		f.Add(seed, seed)
	}
	f.Fuzz(func(t *testing.T, names, addresses string) {
		if strings.Contains(names+addresses, "\x00") {
			t.Skip("cannot stand in an environment")
		}
		for name, value := range map[string]string{"POLICY_DNS": names, "POLICY_EMAILS": addresses, "POLICY_IPS": ""} {
			t.Setenv(name, value)
		}
		r := config.NewReader()
		s := settings()
		if s.Policy = r.Policy(); r.Err() != nil {
			t.Skip("refused")
		}
		if _, err := policy.New(namePolicy(s)); err != nil {
			t.Fatalf("%+v: %v", s.Policy, err)
		}
	})
}
