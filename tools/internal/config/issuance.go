package config

import (
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/idna"
)

// Issuance is what the CA issues, to whom and for how long.
type Issuance struct {
	CA     CA
	ACME   ACME
	SSH    SSH
	OIDC   OIDC
	Policy Policy
	K8s    bool // the provisioner "k8s-sa" for the service accounts of a Kubernetes cluster
}

// Issuance reads all of it.
func (r *Reader) Issuance() Issuance {
	return Issuance{
		CA: r.CA(), ACME: r.ACME(), SSH: r.SSH(), OIDC: r.OIDC(), Policy: r.Policy(),
		K8s: r.boolean("ENABLE_K8S_PROVISIONER", r.env.EnableK8s),
	}
}

// ACME is what the provisioner "acme" offers.
type ACME struct {
	Enabled    bool
	Challenges []string // in the order of the setting
	RequireEAB bool     // RFC 8555 section 7.3.4
}

// The challenges of RFC 8555 section 8 and RFC 8737 that step-ca validates.
// device-attest-01 needs attestation roots, so it is left to a drop-in.
var acmeChallenges = []string{"http-01", "dns-01", "tls-alpn-01"}

// ACME reads ENABLE_ACME and ACME_*.
func (r *Reader) ACME() ACME {
	acme := ACME{
		Enabled:    r.boolean("ENABLE_ACME", r.env.EnableACME),
		Challenges: items(r.env.ACMEChallenges),
		RequireEAB: r.boolean("ACME_REQUIRE_EAB", r.env.ACMERequireEAB),
	}
	if len(acme.Challenges) == 0 {
		r.problem("ACME_CHALLENGES", "http-01,tls-alpn-01", "names none")
	}
	for _, c := range acme.Challenges {
		if !slices.Contains(acmeChallenges, c) {
			r.problem("ACME_CHALLENGES", "http-01,tls-alpn-01", "has an item that is none of %s: %q", strings.Join(acmeChallenges, ", "), c)
		}
	}
	return acme
}

// Lifetimes bound what clients may ask for.
type Lifetimes struct {
	Min     time.Duration
	Default time.Duration
	Max     time.Duration
}

// SSH is what SSH certificates look like.
type SSH struct {
	Enabled bool
	User    Lifetimes
	Host    Lifetimes
}

// A host renews once two thirds of its certificate's life are over, by a timer
// that runs daily. The last third has to hold three such runs, so that two
// may fail before anybody's login does.
const minHostDefault = 9 * 24 * time.Hour

// SSH reads ENABLE_SSH_PROVISIONER and SSH_*_LIFETIME.
func (r *Reader) SSH() SSH {
	ssh := SSH{Enabled: r.boolean("ENABLE_SSH_PROVISIONER", r.env.EnableSSH)}
	ssh.User = r.lifetimes("SSH_USER", r.env.SSHUserMin, r.env.SSHUserDefault, r.env.SSHUserMax, "5m", "16h", "24h")
	ssh.Host = r.lifetimes("SSH_HOST", r.env.SSHHostMin, r.env.SSHHostDefault, r.env.SSHHostMax, "5m", "720h", "720h")
	if ssh.Host.Default > 0 && ssh.Host.Default < minHostDefault {
		r.problem("SSH_HOST_DEFAULT_LIFETIME", "720h",
			"is shorter than %dh: hosts renew daily in the last third of it, and a renewal must be able to fail twice (%s)",
			int(minHostDefault.Hours()), ssh.Host.Default)
	}
	return ssh
}

// lifetimes reads PREFIX_MIN_LIFETIME, PREFIX_DEFAULT_LIFETIME and PREFIX_MAX_LIFETIME.
// step-ca itself compares only those of TLS (smallstep/certificates v0.30.2,
// authority/provisioner/claims.go).
func (r *Reader) lifetimes(prefix, minimum, byDefault, maximum, exampleMin, exampleDefault, exampleMax string) Lifetimes {
	ls := []lifetime{
		{setting: prefix + "_MIN_LIFETIME", example: exampleMin},
		{setting: prefix + "_DEFAULT_LIFETIME", example: exampleDefault},
		{setting: prefix + "_MAX_LIFETIME", example: exampleMax},
	}
	for i, value := range []string{minimum, byDefault, maximum} {
		ls[i].value = r.duration(ls[i].setting, value, ls[i].example)
	}
	r.order(ls...)
	return Lifetimes{Min: ls[0].value, Default: ls[1].value, Max: ls[2].value}
}

// OIDC is the provider that people log in with. It is off without a client id.
type OIDC struct {
	Name          string
	ClientID      string
	ClientSecret  Secret // empty for a public client; step-ca tells it to every client that is admitted
	Endpoint      string // of the discovery document
	Domains       []string
	Groups        []string
	Admins        []string // e-mail addresses or groups
	Scopes        []string
	ListenAddress string
	TenantID      string
}

// Enabled says whether there is a provider.
func (o OIDC) Enabled() bool { return o.ClientID != "" }

const discoveryPath = "/.well-known/openid-configuration"

// OIDC reads OIDC_*.
func (r *Reader) OIDC() OIDC {
	o := OIDC{
		Name: r.env.OIDCName, ClientID: r.env.OIDCClientID, ClientSecret: r.oidcClientSecret(),
		Endpoint: r.env.OIDCEndpoint, Domains: items(strings.ToLower(r.env.OIDCDomain)), Groups: list(r.env.OIDCGroups),
		Admins: list(r.env.OIDCAdmins), Scopes: items(r.env.OIDCScopes),
		ListenAddress: r.env.OIDCListenAddress, TenantID: r.env.OIDCTenantID,
	}
	if !o.Enabled() {
		if o.Endpoint != "" {
			r.problem("OIDC_CLIENT_ID", "step-ca", "is missing while OIDC_ENDPOINT is set")
		}
		return o
	}
	if !ProvisionerName(o.Name) {
		r.problem("OIDC_NAME", "sso", "is not a name of letters, digits, dots, dashes and underscores: %q", o.Name)
	}
	u, err := url.Parse(o.Endpoint)
	switch {
	case o.Endpoint == "":
		r.problem("OIDC_ENDPOINT", oidcEndpointExample, "is missing while OIDC_CLIENT_ID is set")
	case err != nil || u.Scheme != "https" || u.User != nil || u.RawQuery != "" || u.Fragment != "" ||
		!dnsName(strings.ToLower(u.Hostname())):
		r.problem("OIDC_ENDPOINT", oidcEndpointExample, "is not an https address with a host name")
	case !strings.HasSuffix(u.Path, discoveryPath):
		o.Endpoint = strings.TrimSuffix(o.Endpoint, "/") + discoveryPath
	}
	if len(o.Domains) == 0 && len(o.Groups) == 0 {
		r.problem("OIDC_DOMAIN", "internal.lan", "is missing, and OIDC_GROUPS too: everybody with an account at the provider could get certificates")
	}
	for _, d := range o.Domains {
		if !dnsName(d) {
			r.problem("OIDC_DOMAIN", "internal.lan", "has an item that is not a domain of e-mail addresses: %q", d)
		}
	}
	if o.ListenAddress != "" {
		if host, port, err := net.SplitHostPort(o.ListenAddress); err != nil || (host != "" && !loopback(host)) || !portNumber(port) {
			r.problem("OIDC_LISTEN_ADDRESS", "127.0.0.1:10000", "is not a port on the loopback of the person's machine: %q", o.ListenAddress)
		}
	}
	if len(o.Scopes) > 0 && !slices.Contains(o.Scopes, "openid") {
		r.problem("OIDC_SCOPES", "openid email groups", "lacks openid, without which there is no identity token (OpenID Connect Core 1.0, section 3.1.2.1)")
	}
	return o
}

const oidcEndpointExample = "https://sso.internal/.well-known/openid-configuration"

func loopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || (err == nil && addr.IsLoopback())
}

func portNumber(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

var provisionerName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$`)

// ProvisionerName says whether a name needs no quoting in a shell or a URL, so that
// clients can give it to --provisioner and in an ACME directory's path.
func ProvisionerName(s string) bool { return provisionerName.MatchString(s) }

// Policy is which names may stand in certificates. Where it names none of a kind, and
// none of any other kind, every name is allowed.
type Policy struct {
	DNS       []string // exact names, and "*." before a suffix: exactly one label
	IPs       []netip.Prefix
	Emails    []string // addresses, and "@" before a domain
	Wildcards bool     // whether a certificate may be for *.NAME
}

// Restricts says whether it names anything.
func (p Policy) Restricts() bool { return len(p.DNS)+len(p.IPs)+len(p.Emails) > 0 }

// dnsName says whether a name can stand in step-ca's policy, which takes none that
// IDNA refuses (RFC 5891): with such a one it would not start.
func dnsName(s string) bool {
	_, err := idna.Lookup.ToASCII(s)
	return err == nil && HostName(s) && !strings.Contains(s, "_")
}

// The part of an address before the @ (RFC 5322 section 3.2.3, dot-atom), without the
// star, which somebody would mean as one.
var localPart = regexp.MustCompile("^([a-z0-9!#$%&'+/=?^_`{|}~-]+(\\.[a-z0-9!#$%&'+/=?^_`{|}~-]+)*)?$")

// Policy reads POLICY_*.
func (r *Reader) Policy() Policy {
	p := Policy{Wildcards: r.boolean("POLICY_WILDCARDS", r.env.PolicyWildcards)}
	for _, name := range items(strings.ToLower(r.env.PolicyDNS)) {
		if !dnsName(strings.TrimPrefix(name, "*.")) {
			r.problem("POLICY_DNS", "*.internal,www.internal", "has an item that is neither a name nor *. and a suffix: %q", name)
			continue
		}
		p.DNS = append(p.DNS, name)
	}
	for _, text := range items(r.env.PolicyIPs) {
		prefix, err := parseRange(text)
		if err != nil {
			r.problem("POLICY_IPS", "10.0.0.0/8", "has an item that is neither an address nor a CIDR: %q", text)
			continue
		}
		p.IPs = append(p.IPs, prefix)
	}
	for _, text := range items(strings.ToLower(r.env.PolicyEmails)) {
		local, domain, at := strings.Cut(text, "@")
		if !at {
			local, domain = "", text
		}
		if !dnsName(domain) || !localPart.MatchString(local) {
			r.problem("POLICY_EMAILS", "internal.lan", "has an item that is neither a domain nor an e-mail address: %q", text)
			continue
		}
		p.Emails = append(p.Emails, local+"@"+domain)
	}
	return p
}

// list splits at commas alone, for items that may have spaces in them.
func list(s string) []string {
	var out []string
	for item := range strings.SplitSeq(s, ",") {
		if item = strings.TrimSpace(item); item != "" {
			out = append(out, item)
		}
	}
	return out
}
