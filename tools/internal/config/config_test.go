package config

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// good is a complete environment; a test changes what it is about.
func good() map[string]string {
	return map[string]string{
		"PKI_NAME": "", "DOMAIN_CA": "ca.internal", "PKI_DNS_NAMES": "", "CA_PORT": "", "ALLOWED_IPS": "10.0.0.0/8",
		"PROXY_PROTOCOL_FROM": "", "EDGE_MAX_CONNECTIONS": "", "EDGE_MAX_PER_ADDRESS": "", "EDGE_RATE_PER_ADDRESS": "",
		"PGBOUNCER_HOST": "", "PGBOUNCER_PORT": "", "DB_POOL_SIZE": "", "DB_MAX_CLIENTS": "", "STEP_CA_REPLICAS": "", "COMPOSE_PROFILES": "", "BACKUP_RECIPIENTS": "",
		"EDGE_SUBNET": "", "EDGE_SUBNET6": "", "REVOCATION_PORT": "", "ROOT_LIFETIME": "", "INTERMEDIATE_LIFETIME": "",
		"LOG_FORMAT": "", "TLS_MIN_LIFETIME": "", "TLS_DEFAULT_LIFETIME": "", "TLS_MAX_LIFETIME": "",
		"TLS_ORGANIZATION": "", "ENABLE_ACME": "", "ACME_CHALLENGES": "", "ACME_REQUIRE_EAB": "", "ENABLE_K8S_PROVISIONER": "",
		"POLICY_DNS": "", "POLICY_IPS": "", "POLICY_EMAILS": "", "POLICY_WILDCARDS": "", "ENABLE_SSH_PROVISIONER": "",
		"SSH_USER_MIN_LIFETIME": "", "SSH_USER_DEFAULT_LIFETIME": "", "SSH_USER_MAX_LIFETIME": "",
		"SSH_HOST_MIN_LIFETIME": "", "SSH_HOST_DEFAULT_LIFETIME": "", "SSH_HOST_MAX_LIFETIME": "",
		"OIDC_NAME": "", "OIDC_CLIENT_ID": "", "OIDC_CLIENT_SECRET": "", "OIDC_ENDPOINT": "", "OIDC_DOMAIN": "", "OIDC_GROUPS": "",
		"OIDC_ADMINS": "", "OIDC_SCOPES": "", "OIDC_LISTEN_ADDRESS": "", "OIDC_TENANT_ID": "",
		"POSTGRES_HOST": "", "POSTGRES_PORT": "", "POSTGRES_SSLMODE": "", "POSTGRES_DB": "step_ca_db", "POSTGRES_USER": "step_ca_owner",
		"CA_PASSWORD": "secret-of-the-ca", "ROOT_CA_PASSWORD": "secret-of-the-root", "PROVISIONER_PASSWORD": "secret-of-admin",
		"SSH_HOST_PROVISIONER_PASSWORD": "secret-of-the-hosts",
		"POSTGRES_PASSWORD":             "secret-of-the-owner", "STEP_CA_DB_PASSWORD": "secret-of-the-role",
		"REPORTS_DB_PASSWORD": "secret-of-the-reports",
	}
}

func read(t *testing.T, changes map[string]string) *Reader {
	t.Helper()
	env := good()
	for name, value := range changes {
		env[name] = value
	}
	for name, value := range env {
		t.Setenv(name, value)
	}
	r := NewReader()
	_, _, _ = r.Issuance(), r.Edge(), r.Database()
	r.Sizes()
	r.AllSecrets()
	return r
}

func TestProblems(t *testing.T) {
	tests := map[string]struct {
		env  map[string]string
		want []string
	}{
		"a complete environment has none":       {nil, nil},
		"a missing domain":                      {map[string]string{"DOMAIN_CA": ""}, []string{"DOMAIN_CA is missing; a good value: ca.internal"}},
		"the placeholder domain":                {map[string]string{"DOMAIN_CA": "ca.example.com"}, []string{`DOMAIN_CA is still a placeholder: "ca.example.com"; a good value: ca.internal`}},
		"a domain that is a URL":                {map[string]string{"DOMAIN_CA": "https://ca"}, []string{`DOMAIN_CA is not a host name: "https://ca"; a good value: ca.internal`}},
		"a domain that is an address":           {map[string]string{"DOMAIN_CA": "192.0.2.1"}, []string{`DOMAIN_CA is not a host name: "192.0.2.1"; a good value: ca.internal`}},
		"an extra name that is none":            {map[string]string{"PKI_DNS_NAMES": "ca.lan,a b!"}, []string{`PKI_DNS_NAMES has an item that is neither a host name nor an address: "b!"; a good value: ca.lan,192.0.2.10`}},
		"a control character in the PKI's name": {map[string]string{"PKI_NAME": "a\tb"}, []string{"PKI_NAME has a control character, or white space around it; a good value: Internal CA"}},
		"a PKI name that is too long":           {map[string]string{"PKI_NAME": strings.Repeat("x", 49)}, []string{"PKI_NAME is longer than 48 characters, so that the intermediate's common name would pass 64 (RFC 5280); a good value: Internal CA"}},
		"a port that is none":                   {map[string]string{"CA_PORT": "99999"}, []string{`CA_PORT is not a TCP port: "99999"; a good value: 9000`}},
		"a switch that is neither on nor off":   {map[string]string{"ENABLE_ACME": "yes please"}, []string{`ENABLE_ACME is neither true nor false: "yes please"; a good value: true`}},
		"a lifetime in days":                    {map[string]string{"TLS_MAX_LIFETIME": "30d"}, []string{`TLS_MAX_LIFETIME is not a length of time: "30d" (units are h, m and s); a good value: 720h`}},
		"a lifetime of nothing":                 {map[string]string{"TLS_MIN_LIFETIME": "0s"}, []string{`TLS_MIN_LIFETIME is not a length of time: "0s" (units are h, m and s); a good value: 5m`}},
		"leaves that outlive the intermediate": {
			map[string]string{"TLS_MAX_LIFETIME": "30000h"},
			[]string{"TLS_MAX_LIFETIME is longer than INTERMEDIATE_LIFETIME (30000h0m0s > 26280h0m0s); a good value: 720h"},
		},
		"a list with nobody on it":                     {map[string]string{"ALLOWED_IPS": " , \n"}, []string{`ALLOWED_IPS is missing: nobody could connect; a good value: "192.0.2.10 10.20.0.0/16"`}},
		"a prefix that is too long":                    {map[string]string{"ALLOWED_IPS": "10.0.0.0/33"}, []string{`ALLOWED_IPS has items that are neither an address nor a CIDR: "10.0.0.0/33"; a good value: "192.0.2.10 10.20.0.0/16"`}},
		"a host name on the list":                      {map[string]string{"ALLOWED_IPS": "10.0.0.1 laptop.lan"}, []string{`ALLOWED_IPS has items that are neither an address nor a CIDR: "laptop.lan"; a good value: "192.0.2.10 10.20.0.0/16"`}},
		"an address with a zone":                       {map[string]string{"ALLOWED_IPS": "fe80::1%eth0"}, []string{`ALLOWED_IPS has items that are neither an address nor a CIDR: "fe80::1%eth0"; a good value: "192.0.2.10 10.20.0.0/16"`}},
		"a mapped prefix":                              {map[string]string{"ALLOWED_IPS": "::ffff:10.0.0.0/104"}, []string{`ALLOWED_IPS has items that are neither an address nor a CIDR: "::ffff:10.0.0.0/104"; a good value: "192.0.2.10 10.20.0.0/16"`}},
		"directives after a line end":                  {map[string]string{"ALLOWED_IPS": "10.0.0.0/8\nroute {\n echo\n}"}, []string{`ALLOWED_IPS has items that are neither an address nor a CIDR: "route", "{", "echo", "}"; a good value: "192.0.2.10 10.20.0.0/16"`}},
		"a balancer that is none":                      {map[string]string{"PROXY_PROTOCOL_FROM": "lb.lan"}, []string{`PROXY_PROTOCOL_FROM has items that are neither an address nor a CIDR: "lb.lan"; a good value: 192.0.2.5`}},
		"everybody as a balancer":                      {map[string]string{"PROXY_PROTOCOL_FROM": "10.0.0.1 0.0.0.0/0"}, []string{"PROXY_PROTOCOL_FROM has 0.0.0.0/0: everybody could say to be anybody; a good value: 192.0.2.5"}},
		"more connections than there are descriptors":  {map[string]string{"EDGE_MAX_CONNECTIONS": "9000"}, []string{`EDGE_MAX_CONNECTIONS is not a whole number from 10 to 8000: "9000"; a good value: 7000`}},
		"one address with more than all have together": {map[string]string{"EDGE_MAX_CONNECTIONS": "100"}, []string{"EDGE_MAX_PER_ADDRESS is more than EDGE_MAX_CONNECTIONS (5000 > 100); a good value: 5000"}},
		"a rate that is no number":                     {map[string]string{"EDGE_RATE_PER_ADDRESS": "20/s"}, []string{`EDGE_RATE_PER_ADDRESS is not a whole number from 1 to 1000000: "20/s"; a good value: 2000`}},
		"no replica":                                   {map[string]string{"STEP_CA_REPLICAS": "0"}, []string{`STEP_CA_REPLICAS is not a whole number from 1 to 16: "0"; a good value: 2`}},
		"a pool that the server has no room for":       {map[string]string{"DB_POOL_SIZE": "100"}, []string{`DB_POOL_SIZE is not a whole number from 1 to 80: "100"; a good value: 40`}},
		"a pool for fewer clients than it has":         {map[string]string{"DB_MAX_CLIENTS": "20"}, []string{"DB_POOL_SIZE is more than DB_MAX_CLIENTS (40 > 20); a good value: 40"}},
		"an owner named like the reader":               {map[string]string{"POSTGRES_USER": "reports"}, []string{`POSTGRES_USER is "reports", the name of the role that may only read; a good value: step_ca_owner`}},
		"an edge subnet that is none":                  {map[string]string{"EDGE_SUBNET": "172.28.100.1/24"}, []string{`EDGE_SUBNET is not a subnet of its family with room for hosts: "172.28.100.1/24"; a good value: 172.28.100.0/24`}},
		"an IPv6 subnet of IPv4":                       {map[string]string{"EDGE_SUBNET6": "10.0.0.0/8"}, []string{`EDGE_SUBNET6 is not a subnet of its family with room for hosts: "10.0.0.0/8"; a good value: fd1c:9000::/64`}},
		"an owner named like the role":                 {map[string]string{"POSTGRES_USER": "stepca"}, []string{`POSTGRES_USER is "stepca", the name of the role that step-ca itself runs as and that must own nothing; a good value: step_ca_owner`}},
		"a database name with a quote":                 {map[string]string{"POSTGRES_DB": `a"b`}, []string{`POSTGRES_DB is not a lower-case name of letters, digits and underscores: "a\"b"; a good value: step_ca_db`}},
		"an unknown log format":                        {map[string]string{"LOG_FORMAT": "xml"}, []string{`LOG_FORMAT is neither text nor json: "xml"; a good value: text`}},
		"an unknown TLS mode":                          {map[string]string{"POSTGRES_SSLMODE": "prefer"}, []string{`POSTGRES_SSLMODE is none of disable, require, verify-ca and verify-full: "prefer"; a good value: disable`}},
		"a secret that is missing":                     {map[string]string{"CA_PASSWORD": ""}, []string{"CA_PASSWORD is missing; " + goodSecret}},
		"a placeholder":                                {map[string]string{"ROOT_CA_PASSWORD": "change_me_root"}, []string{"ROOT_CA_PASSWORD is still the placeholder from .env.example; " + goodSecret}},
		"the original's placeholder":                   {map[string]string{"POSTGRES_PASSWORD": "step_ca_password_change_me"}, []string{"POSTGRES_PASSWORD is still the placeholder from .env.example; " + goodSecret}},
		"a secret with a space at its end": {
			map[string]string{"PROVISIONER_PASSWORD": "tr0ub4dor and three "},
			[]string{"PROVISIONER_PASSWORD begins or ends with white space (a line end in PROVISIONER_PASSWORD_FILE counts), which step-ca would trim; " + goodSecret},
		},
		"a secret with a line end inside": {map[string]string{"CA_PASSWORD": "tr0ub4dor\nthree"}, []string{"CA_PASSWORD has a line end or a NUL byte in it; " + goodSecret}},
		"a secret that is a book":         {map[string]string{"CA_PASSWORD": strings.Repeat("x", 4097)}, []string{"CA_PASSWORD is longer than 4096 bytes; " + goodSecret}},
		"a database password beyond ASCII": {
			map[string]string{"STEP_CA_DB_PASSWORD": "pässwörd-of-the-role"},
			[]string{"STEP_CA_DB_PASSWORD has a character beyond printable ASCII, which PostgreSQL's SCRAM may normalise differently on its two sides (RFC 4013); " + goodSecret},
		},
		"a port for revocation lists that is none": {map[string]string{"REVOCATION_PORT": "http"}, []string{`REVOCATION_PORT is not a TCP port: "http"; a good value: 9080`}},
		"one port for two things":                  {map[string]string{"REVOCATION_PORT": "9000"}, []string{`REVOCATION_PORT is CA_PORT, too; a good value: 9080`}},
		"a name that is kept for the CRL": {
			map[string]string{"PKI_DNS_NAMES": "crl.lan"},
			[]string{`PKI_DNS_NAMES or DOMAIN_CA has a name that begins with crl., which the edge keeps for the CRL: "crl.lan"; a good value: ca.lan,192.0.2.10`},
		},
		"an organization with a line end":                               {map[string]string{"TLS_ORGANIZATION": "a\nb"}, []string{`TLS_ORGANIZATION has a control character, or white space around it; a good value: Example Ltd`}},
		"an organization that is too long":                              {map[string]string{"TLS_ORGANIZATION": strings.Repeat("x", 65)}, []string{`TLS_ORGANIZATION is longer than 64 characters (RFC 5280, ub-organization-name); a good value: Example Ltd`}},
		"a challenge that is none":                                      {map[string]string{"ACME_CHALLENGES": "http-01 email-01"}, []string{`ACME_CHALLENGES has an item that is none of http-01, dns-01, tls-alpn-01: "email-01"; a good value: http-01,tls-alpn-01`}},
		"a person's certificate that outlives its maximum":              {map[string]string{"SSH_USER_DEFAULT_LIFETIME": "48h"}, []string{`SSH_USER_DEFAULT_LIFETIME is longer than SSH_USER_MAX_LIFETIME (48h0m0s > 24h0m0s); a good value: 16h`}},
		"a host's certificate that leaves no room for a missed renewal": {map[string]string{"SSH_HOST_DEFAULT_LIFETIME": "24h"}, []string{`SSH_HOST_DEFAULT_LIFETIME is shorter than 216h: hosts renew daily in the last third of it, and a renewal must be able to fail twice (24h0m0s); a good value: 720h`}},
		"a provider without a client":                                   {map[string]string{"OIDC_ENDPOINT": "https://sso.lan"}, []string{`OIDC_CLIENT_ID is missing while OIDC_ENDPOINT is set; a good value: step-ca`}},
		"a client without a provider":                                   {map[string]string{"OIDC_CLIENT_ID": "pki", "OIDC_DOMAIN": "lan.example"}, []string{`OIDC_ENDPOINT is missing while OIDC_CLIENT_ID is set; a good value: https://sso.internal/.well-known/openid-configuration`}},
		"a provider in clear":                                           {map[string]string{"OIDC_CLIENT_ID": "pki", "OIDC_DOMAIN": "lan.example", "OIDC_ENDPOINT": "http://sso.lan"}, []string{`OIDC_ENDPOINT is not an https address with a host name; a good value: https://sso.internal/.well-known/openid-configuration`}},
		"a provider open to the world":                                  {map[string]string{"OIDC_CLIENT_ID": "pki", "OIDC_ENDPOINT": "https://sso.lan"}, []string{`OIDC_DOMAIN is missing, and OIDC_GROUPS too: everybody with an account at the provider could get certificates; a good value: internal.lan`}},
		"a provider that is mistaken in every way": {map[string]string{"OIDC_CLIENT_ID": "pki", "OIDC_ENDPOINT": "https://sso.lan", "OIDC_DOMAIN": "@lan", "OIDC_NAME": "s s o", "OIDC_LISTEN_ADDRESS": "0.0.0.0:1", "OIDC_SCOPES": "email"}, []string{
			`OIDC_NAME is not a name of letters, digits, dots, dashes and underscores: "s s o"; a good value: sso`,
			`OIDC_DOMAIN has an item that is not a domain of e-mail addresses: "@lan"; a good value: internal.lan`,
			`OIDC_LISTEN_ADDRESS is not a port on the loopback of the person's machine: "0.0.0.0:1"; a good value: 127.0.0.1:10000`,
			`OIDC_SCOPES lacks openid, without which there is no identity token (OpenID Connect Core 1.0, section 3.1.2.1); a good value: openid email groups`,
		}},
		"names that are none": {map[string]string{"POLICY_DNS": "a.*.lan my_name ab--c.lan", "POLICY_IPS": "10.0.0.0/33", "POLICY_EMAILS": "*@lan"}, []string{
			`POLICY_DNS has an item that is neither a name nor *. and a suffix: "a.*.lan"; a good value: *.internal,www.internal`,
			`POLICY_DNS has an item that is neither a name nor *. and a suffix: "my_name"; a good value: *.internal,www.internal`,
			`POLICY_DNS has an item that is neither a name nor *. and a suffix: "ab--c.lan"; a good value: *.internal,www.internal`,
			`POLICY_IPS has an item that is neither an address nor a CIDR: "10.0.0.0/33"; a good value: 10.0.0.0/8`,
			`POLICY_EMAILS has an item that is neither a domain nor an e-mail address: "*@lan"; a good value: internal.lan`,
		}},
		"several at once": {
			map[string]string{"DOMAIN_CA": "", "CA_PORT": "0", "ALLOWED_IPS": "", "POSTGRES_DB": "", "CA_PASSWORD": "change_me_ca"},
			[]string{
				`CA_PORT is not a TCP port: "0"; a good value: 9000`,
				"DOMAIN_CA is missing; a good value: ca.internal",
				`ALLOWED_IPS is missing: nobody could connect; a good value: "192.0.2.10 10.20.0.0/16"`,
				"POSTGRES_DB is missing; a good value: step_ca_db",
				"CA_PASSWORD is still the placeholder from .env.example; " + goodSecret,
			},
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			err := read(t, tc.env).Err()
			if tc.want == nil {
				require.NoError(t, err)
				return
			}
			require.EqualError(t, err, strings.Join(tc.want, "\n"))
			var coded interface{ ExitCode() int }
			require.ErrorAs(t, err, &coded)
			require.Equal(t, 2, coded.ExitCode())
		})
	}
}

const goodSecret = `a good value: the output of "openssl rand -base64 24", in single quotes`

func TestWarnings(t *testing.T) {
	tests := map[string]struct {
		env  map[string]string
		want []string
	}{
		"a careful environment has none":      {nil, nil},
		"everybody on IPv4":                   {map[string]string{"ALLOWED_IPS": "0.0.0.0/0"}, []string{"ALLOWED_IPS has 0.0.0.0/0: every such address may connect"}},
		"everybody on IPv6":                   {map[string]string{"ALLOWED_IPS": "::/0"}, []string{"ALLOWED_IPS has ::/0: every such address may connect"}},
		"the gateway without IPv6 is no news": {map[string]string{"ALLOWED_IPS": "172.28.100.1"}, nil},
		"the gateway with IPv6": {
			map[string]string{"ALLOWED_IPS": "172.28.100.1", "EDGE_SUBNET6": "fd1c:9000::/64"},
			[]string{"ALLOWED_IPS has 172.28.100.1/32, which covers 172.28.100.1, the gateway of the edge network: with IPv6 on, IPv6 clients from anywhere may arrive with that address (Docker Engine before 27, or without ip6tables)"},
		},
		"private_ranges with IPv6": {
			map[string]string{"ALLOWED_IPS": "private_ranges", "EDGE_SUBNET6": "fd1c:9000::/64"},
			[]string{
				"ALLOWED_IPS has 172.16.0.0/12, which covers 172.28.100.1, the gateway of the edge network: with IPv6 on, IPv6 clients from anywhere may arrive with that address (Docker Engine before 27, or without ip6tables)",
				"ALLOWED_IPS has fd00::/8, which covers fd1c:9000::1, the gateway of the edge network: with IPv6 on, IPv6 clients from anywhere may arrive with that address (Docker Engine before 27, or without ip6tables)",
			},
		},
		"a short secret":        {map[string]string{"CA_PASSWORD": "tr0ub4dor"}, []string{"CA_PASSWORD is shorter than 12 bytes and can be guessed by whoever gets hold of an encrypted key"}},
		"one secret used twice": {map[string]string{"ROOT_CA_PASSWORD": "secret-of-the-ca"}, []string{"CA_PASSWORD and ROOT_CA_PASSWORD are the same: whoever learns one has both"}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := read(t, tc.env)
			require.NoError(t, r.Err())
			require.Equal(t, tc.want, r.Warnings())
		})
	}
}

func TestCA(t *testing.T) {
	ca := func(env map[string]string) CA { return read(t, env).CA() }
	require.Equal(t, CA{
		Name: "Internal CA", Domain: "ca.internal", Names: []string{"ca.internal", "localhost", "127.0.0.1", "step-ca"}, Port: 9000,
		RootLifetime: 87600 * time.Hour, IntermediateLifetime: 26280 * time.Hour,
		TLS: Lifetimes{Min: 5 * time.Minute, Default: 24 * time.Hour, Max: 720 * time.Hour},
	}, ca(nil))
	require.Equal(t, "https://ca.internal:9443", ca(map[string]string{"CA_PORT": "9443"}).URL())
	require.Equal(t, []string{"ca.internal", "localhost", "127.0.0.1", "step-ca", "ca.lan", "192.0.2.10"},
		ca(map[string]string{"PKI_DNS_NAMES": "localhost, CA.lan 192.0.2.10"}).Names)
	require.Empty(t, ca(nil).RevocationURL("crl"))
	require.Equal(t, "http://ca.internal:9080/crl", ca(map[string]string{"REVOCATION_PORT": "9080"}).RevocationURL("crl"))
}

func TestIssuance(t *testing.T) {
	tests := map[string]struct {
		env  map[string]string
		want func(i *Issuance)
	}{
		"what is on by default": {nil, func(*Issuance) {}},
		"ACME off":              {map[string]string{"ENABLE_ACME": "False"}, func(i *Issuance) { i.ACME.Enabled = false }},
		"ACME with one challenge, for known accounts": {
			map[string]string{"ACME_CHALLENGES": "dns-01", "ACME_REQUIRE_EAB": "true"},
			func(i *Issuance) { i.ACME = ACME{Enabled: true, Challenges: []string{"dns-01"}, RequireEAB: true} },
		},
		"SSH off, Kubernetes on": {
			map[string]string{"ENABLE_SSH_PROVISIONER": "false", "ENABLE_K8S_PROVISIONER": "true"},
			func(i *Issuance) { i.SSH.Enabled, i.K8s = false, true },
		},
		"OIDC with an issuer in place of its discovery document": {
			map[string]string{
				"OIDC_CLIENT_ID": "pki", "OIDC_ENDPOINT": "https://sso.lan/realms/a/", "OIDC_DOMAIN": "Lan.example, b.example",
				"OIDC_GROUPS": "People, Site Admins", "OIDC_ADMINS": "root@lan.example", "OIDC_SCOPES": "openid email groups",
				"OIDC_LISTEN_ADDRESS": ":10000", "OIDC_TENANT_ID": "t", "OIDC_CLIENT_SECRET": "short",
			},
			func(i *Issuance) {
				i.OIDC = OIDC{
					Name: "sso", ClientID: "pki", ClientSecret: "short", Endpoint: "https://sso.lan/realms/a/.well-known/openid-configuration",
					Domains: []string{"lan.example", "b.example"}, Groups: []string{"People", "Site Admins"}, Admins: []string{"root@lan.example"},
					Scopes: []string{"openid", "email", "groups"}, ListenAddress: ":10000", TenantID: "t",
				}
			},
		},
		"names of each kind": {
			map[string]string{
				"POLICY_DNS": "*.Internal www.lan", "POLICY_IPS": "10.1.2.3/8,192.0.2.1", "POLICY_EMAILS": "lan.example, Root@lan.example",
				"POLICY_WILDCARDS": "true",
			},
			func(i *Issuance) {
				i.Policy = Policy{
					DNS: []string{"*.internal", "www.lan"}, IPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.1/32")},
					Emails: []string{"@lan.example", "root@lan.example"}, Wildcards: true,
				}
			},
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := read(t, tc.env)
			require.NoError(t, r.Err())
			require.Empty(t, r.Warnings())
			want := Issuance{
				CA:   r.CA(),
				ACME: ACME{Enabled: true, Challenges: []string{"http-01", "dns-01", "tls-alpn-01"}},
				SSH: SSH{
					Enabled: true,
					User:    Lifetimes{Min: 5 * time.Minute, Default: 16 * time.Hour, Max: 24 * time.Hour},
					Host:    Lifetimes{Min: 5 * time.Minute, Default: 720 * time.Hour, Max: 720 * time.Hour},
				},
				OIDC: OIDC{Name: "sso"},
			}
			tc.want(&want)
			require.Equal(t, want, r.Issuance())
		})
	}
}

func TestAllowedIPs(t *testing.T) {
	tests := map[string]struct{ list, want string }{
		"addresses become prefixes":         {"192.0.2.1 2001:db8::1", "192.0.2.1/32 2001:db8::1/128"},
		"spaces, commas and line ends part": {"10.0.0.0/8,192.0.2.1\n 2001:db8::/32", "10.0.0.0/8 192.0.2.1/32 2001:db8::/32"},
		"host bits are masked":              {"10.1.2.3/8", "10.0.0.0/8"},
		"each range stands once":            {"10.0.0.0/8 10.1.2.3/8", "10.0.0.0/8"},
		"a mapped address is IPv4":          {"::ffff:192.0.2.1", "192.0.2.1/32"},
		"private_ranges is written out":     {"private_ranges", "192.168.0.0/16 172.16.0.0/12 10.0.0.0/8 127.0.0.0/8 fd00::/8 ::1/128"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			var want []netip.Prefix
			for p := range strings.FieldsSeq(tc.want) {
				want = append(want, netip.MustParsePrefix(p))
			}
			require.Equal(t, want, read(t, map[string]string{"ALLOWED_IPS": tc.list}).Edge().Allowed)
		})
	}
}

func TestSecretsAreExact(t *testing.T) {
	for _, value := range []string{"a \"b'c`d$e\\f#g@h%i{j", "pässwörd ünd Schlüssel", "-starts-with-a-dash"} {
		require.Equal(t, value, read(t, map[string]string{"CA_PASSWORD": value}).CAPassword().Reveal())
		file := filepath.Join(t.TempDir(), "secret")
		require.NoError(t, os.WriteFile(file, []byte(value), 0o600))
		r := read(t, map[string]string{"CA_PASSWORD": "", "CA_PASSWORD_FILE": file})
		require.NoError(t, r.Err())
		require.Equal(t, value, r.CAPassword().Reveal())
		t.Setenv("CA_PASSWORD_FILE", "")
	}
}

func TestSecretFile(t *testing.T) {
	dir := t.TempDir()
	ends := filepath.Join(dir, "ends-with-a-line-end")
	require.NoError(t, os.WriteFile(ends, []byte("secret-of-the-ca\n"), 0o600))
	tests := map[string]struct{ value, file, want string }{
		"a file that is not there counts as missing": {"", filepath.Join(dir, "none"), "CA_PASSWORD is missing; " + goodSecret},
		"a directory":                {"", dir, "CA_PASSWORD cannot be read: read " + dir + ": is a directory; " + goodSecret},
		"a line end is not cut off":  {"", ends, "CA_PASSWORD begins or ends with white space (a line end in CA_PASSWORD_FILE counts), which step-ca would trim; " + goodSecret},
		"both at once are ambiguous": {"secret-of-the-ca", ends, "CA_PASSWORD cannot be read: both CA_PASSWORD and CA_PASSWORD_FILE are set, only one may be; " + goodSecret},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			require.EqualError(t, read(t, map[string]string{"CA_PASSWORD": tc.value, "CA_PASSWORD_FILE": tc.file}).Err(), tc.want)
		})
	}
}

func TestASecretIsNeverTold(t *testing.T) {
	s := Secret("hunter2")
	var out strings.Builder
	slog.New(slog.NewJSONHandler(&out, nil)).LogAttrs(t.Context(), slog.LevelInfo, "x", slog.Any("s", s))
	asJSON, err := json.Marshal(map[string]any{"s": s})
	require.NoError(t, err)
	out.Write(asJSON)
	fmt.Fprintf(&out, "%v %s %q %#v %+v", s, s, s, s, struct{ S Secret }{s})
	require.NotContains(t, out.String(), "hunter2")
	require.Contains(t, out.String(), "[redacted]")

	for _, bad := range []string{"hunter2 ", "hunter2\nhunter2", "hunter2-change_me"} {
		err := read(t, map[string]string{"CA_PASSWORD": bad}).Err()
		require.Error(t, err)
		require.NotContains(t, err.Error(), "hunter2")
	}
}
