package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

func acmeDirectory(s *stack.Stack) string { return s.URL() + "/acme/acme/directory" }

// certbot is the command line of an order by http-01, on its own port 80.
func certbot(s *stack.Stack, more ...string) []string {
	return append([]string{
		"certbot", "certonly", "--standalone",
		"--preferred-challenges", "http", "--server", acmeDirectory(s), "--domain", stack.ClientName,
		"--non-interactive", "--agree-tos", "--register-unsafely-without-email", "--force-renewal",
	}, more...)
}

const certbotLive = "/etc/letsencrypt/live/" + stack.ClientName

func TestCertbotGetsACertificateByHTTP01(t *testing.T) {
	s := stack.Shared(t)
	client := s.Client()
	out := client.Run(append([]string{"env", "REQUESTS_CA_BUNDLE=/trust/root_ca.crt"}, certbot(s)...)...).OK(t)
	require.Contains(t, out.Output(), "Successfully received certificate")
	requireOpenSSL(t, client, certbotLive+"/fullchain.pem", stack.ClientName)
}

// serveByCaddy demands that Caddy gets itself a certificate by tls-alpn-01 and serves it.
func serveByCaddy(t *testing.T, s *stack.Stack, options string) {
	t.Helper()
	client := s.Client()
	client.Write("/tmp/Caddyfile", fmt.Sprintf(`{
	admin off
	persist_config off
	storage file_system /tmp/caddy
	acme_ca %s
	%s
}
https://%s {
	tls {
		issuer acme {
			disable_http_challenge
		}
	}
	respond "served with a certificate of our own"
}
`, acmeDirectory(s), options, stack.ClientName))
	client.Start("exec caddy run --config /tmp/Caddyfile --adapter caddyfile >/tmp/caddy.log 2>&1")
	defer func() {
		if t.Failed() {
			t.Log(client.Read("/tmp/caddy.log"))
		}
		client.Shell("kill $(pidof caddy); while pidof caddy; do sleep 0.1; done; rm -rf /tmp/caddy")
	}()
	fetch := []string{"curl", "-sS", "--cacert", "/trust/root_ca.crt", "https://" + stack.ClientName + "/"}
	require.Eventually(t, func() bool { return client.Run(fetch...).Code == 0 }, 60*time.Second, 500*time.Millisecond)
	require.Equal(t, "served with a certificate of our own", client.Run(fetch...).OK(t).Stdout)

	client.Shell("openssl s_client -connect " + stack.ClientName + ":443 -servername " + stack.ClientName +
		" -verify_hostname " + stack.ClientName + " -CAfile /trust/root_ca.crt -verify_return_error -showcerts </dev/null >/tmp/served.pem").OK(t)
	requireOpenSSL(t, client, "/tmp/served.pem", stack.ClientName)
}

func TestCaddyGetsACertificateByTLSALPN01(t *testing.T) {
	serveByCaddy(t, stack.Shared(t), "acme_ca_root /trust/root_ca.crt")
}

const zone = "zone.e2e.test"

// newZoneStack prepares a stack beside a DNS server for the zone, which takes
// updates (RFC 2136) from who has its key. Both are started by Up.
func newZoneStack(t *testing.T) *stack.Stack {
	t.Helper()
	dir := t.TempDir()
	s := stack.New(t, stack.Settings{"COMPOSE_FILE": "docker-compose.yml:tools/e2e/testdata/dns.yml", "E2E_DNS_DIRECTORY": dir})
	// Beside the subnet of the edge, which is this stack's own.
	octets := s.Gateway.As4()
	octets[1]++
	gateway := netip.AddrFrom4(octets)
	address := gateway.Next()
	s.Set(stack.Settings{
		"E2E_EGRESS_SUBNET":  netip.PrefixFrom(gateway, 24).Masked().String(),
		"E2E_EGRESS_GATEWAY": gateway.String(),
		"E2E_DNS_ADDRESS":    address.String(),
	})

	require.NoError(t, os.WriteFile(filepath.Join(dir, "zone"), []byte(`$TTL 1
@  SOA ns hostmaster 1 60 60 60 1
   NS  ns
ns A   `+address.String()+"\n"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "knot.conf"), []byte(`
include: key.conf
server:
    listen: 0.0.0.0@53
    rundir: /run/knot
database:
    storage: /run/knot
acl:
  - id: holder
    key: update
    action: update
zone:
  - domain: `+zone+`
    file: /dns/zone
    zonefile-sync: -1
    acl: holder
log:
  - target: stderr
    any: info
`), 0o600))
	s.WithDirectory(dir, "keymgr -t update hmac-sha256 >key.conf")
	return s
}

// lego runs a client of RFC 8555 that has an account for each name of a directory.
func lego(s *stack.Stack, account string, args ...string) []string {
	return append([]string{
		"lego", "--server", acmeDirectory(s), "--accept-tos",
		"--email", account + "@e2e.test", "--path", "/tmp/lego/" + account,
	}, args...)
}

func legoDNS(t *testing.T, s *stack.Stack, args ...string) []string {
	t.Helper()
	address := s.Get("E2E_DNS_ADDRESS") + ":53"
	key := contentOf(t, s.Get("E2E_DNS_DIRECTORY"), "key.conf")
	_, secret, ok := strings.Cut(key, "secret: ")
	require.True(t, ok, key)
	return append([]string{
		"env", "RFC2136_NAMESERVER=" + address, "RFC2136_TSIG_KEY=update", "RFC2136_TSIG_ALGORITHM=hmac-sha256.",
		"RFC2136_TSIG_SECRET=" + strings.TrimSpace(secret), "RFC2136_POLLING_INTERVAL=1", "RFC2136_TTL=1",
	}, lego(s, "dns", append([]string{"--dns", "rfc2136", "--dns.resolvers", address}, args...)...)...)
}

// One stack through what ACME clients meet, and the settings that decide on it.
func TestACME(t *testing.T) {
	s := newZoneStack(t)
	s.Up()
	client := s.Client()
	// All of them take the root from where the system has it.
	client.Shell("cp /trust/root_ca.crt /usr/local/share/ca-certificates/ && update-ca-certificates").OK(t)
	apply := func(t *testing.T, settings stack.Settings) {
		t.Helper()
		s.Change(t, settings)
		s.Make("init").OK(t)
	}
	byHTTP := func(account string, more ...string) []string {
		return lego(s, account, append(more, "--http", "--domains", stack.ClientName, "run")...)
	}
	requireIssued := func(t *testing.T, command []string, account, name string) {
		t.Helper()
		client.Run(command...).OK(t)
		requireOpenSSL(t, client, "/tmp/lego/"+account+"/certificates/"+strings.Replace(name, "*", "_", 1)+".crt", strings.Replace(name, "*", "any", 1))
	}
	refused := func(t *testing.T, reason string, command []string) {
		t.Helper()
		requireRefused(t, s, reason, func() stack.Result { return client.Run(command...) })
	}

	t.Run("lego gets a certificate by each challenge", func(t *testing.T) {
		requireIssued(t, byHTTP("http"), "http", stack.ClientName)
		requireIssued(t, lego(s, "tls", "--tls", "--domains", stack.ClientName, "run"), "tls", stack.ClientName)
		requireIssued(t, legoDNS(t, s, "--domains", "www."+zone, "run"), "dns", "www."+zone)
	})

	t.Run("wildcards are off", func(t *testing.T) {
		// In step-ca's log: with no other name refused it is the template that says no, at the
		// end of the order, and the client learns of an internal error only.
		refused(t, "POLICY_WILDCARDS", legoDNS(t, s, "--domains", "*."+zone, "run"))
	})

	t.Run("parallel orders of several accounts all succeed", func(t *testing.T) {
		// One account's orders must not run in parallel: step-ca then refuses some of
		// them (smallstep/certificates#341).
		const accounts, orders = 8, 5
		issued := func() int {
			n, err := strconv.Atoi(s.SQL("select count(*) from acme_certs"))
			require.NoError(t, err)
			return n
		}
		before := issued()
		failures := client.Shell(fmt.Sprintf(`
			mkdir -p /tmp/web
			caddy file-server --listen :80 --root /tmp/web >/tmp/web.log 2>&1 & web=$!
			while ! curl -so /dev/null http://%s/; do sleep 0.1; done
			accounts=()
			for a in {1..%d}; do (
				for o in {1..%d}; do
					%s >/tmp/order.$a.$o 2>&1 || { echo "order $o of account $a:"; cat /tmp/order.$a.$o; }
				done
			) & accounts+=($!); done
			wait "${accounts[@]}"; kill $web`, stack.ClientName, accounts, orders,
			strings.Join(byHTTP("parallel-$a", "--http.webroot", "/tmp/web"), " "))).OK(t)
		t.Logf("%d orders of %d accounts: %.1f s", accounts*orders, accounts, failures.Took.Seconds())
		require.Empty(t, failures.Stdout)
		require.Equal(t, before+accounts*orders, issued())
	})

	t.Run("what is revoked by ACME is not renewed, and ordered anew", func(t *testing.T) {
		renew := []string{
			"step", "ca", "renew", "--force", "--ca-url", s.URL(), "--root", "/trust/root_ca.crt", "--out", "/tmp/renewed.crt",
			certbotLive + "/fullchain.pem", certbotLive + "/privkey.pem",
		}
		client.Run(certbot(s)...).OK(t)
		client.Run(renew...).OK(t)
		client.Run("certbot", "revoke", "--server", acmeDirectory(s), "--cert-path",
			certbotLive+"/cert.pem", "--reason", "keycompromise", "--non-interactive", "--no-delete-after-revoke").OK(t)
		refused(t, "has been revoked", renew)

		client.Run(certbot(s)...).OK(t)
		client.Run(renew...).OK(t)
	})

	t.Run("a name that no policy allows is refused when it is ordered", func(t *testing.T) {
		apply(t, stack.Settings{"POLICY_DNS": stack.ClientName + ",*." + zone, "POLICY_WILDCARDS": "true"})
		for _, name := range []string{"www.elsewhere.test", "*.elsewhere.test", "a.b." + zone, zone} {
			refused(t, "urn:ietf:params:acme:error:rejectedIdentifier", legoDNS(t, s, "--domains", name, "run"))
		}
		requireIssued(t, byHTTP("http"), "http", stack.ClientName)
		requireIssued(t, legoDNS(t, s, "--domains", "www."+zone, "run"), "dns", "www."+zone)
		requireIssued(t, legoDNS(t, s, "--domains", "*."+zone, "run"), "dns", "*."+zone)
	})

	t.Run("only the challenges that are chosen are offered", func(t *testing.T) {
		apply(t, stack.Settings{"ACME_CHALLENGES": "http-01"})
		const none = "could not determine solvers"
		refused(t, none, lego(s, "tls", "--tls", "--domains", stack.ClientName, "run"))
		refused(t, none, legoDNS(t, s, "--domains", "www."+zone, "run"))
		requireIssued(t, byHTTP("http"), "http", stack.ClientName)
	})

	t.Run("an account needs a key of its own where that is required", func(t *testing.T) {
		apply(t, stack.Settings{"ACME_REQUIRE_EAB": "true"})
		eab := func(args ...string) stack.Result {
			return s.Compose(append([]string{"run", "--rm", "--no-deps", "-T", "pkictl", "acme", "eab"}, args...)...).OK(t)
		}
		add := func(reference string) (kid, hmac string) {
			out := eab("add", "--reference", reference).Stdout
			_, err := fmt.Sscanf(out, "EAB_KID=%s\nEAB_HMAC_KEY=%s\n", &kid, &hmac)
			require.NoError(t, err, out)
			return kid, hmac
		}
		withKey := func(account, kid, hmac string) []string {
			return byHTTP(account, "--eab", "--kid", kid, "--hmac", hmac)
		}

		// lego and certbot look into the directory and do not even ask.
		refused(t, "urn:ietf:params:acme:error:externalAccountRequired", []string{
			"step", "ca", "certificate", "--force", "--ca-url", s.URL(), "--root", "/trust/root_ca.crt", "--provisioner", "acme",
			stack.ClientName, "/tmp/without.crt", "/tmp/without.key",
		})
		// An account from before goes on; lego only wants to see some key.
		requireIssued(t, withKey("http", "none", "none"), "http", stack.ClientName)

		kid, hmac := add("first")
		requireIssued(t, withKey("bound", kid, hmac), "bound", stack.ClientName)
		requireIssued(t, withKey("bound", kid, hmac), "bound", stack.ClientName) // by the account that there is now
		refused(t, "does not have secret bytes", withKey("second-use", kid, hmac))

		eab("revoke", "--deactivate-account", kid)
		refused(t, "urn:ietf:params:acme:error:unauthorized", withKey("bound", kid, hmac))

		kid, hmac = add("second")
		eab("revoke", kid)
		refused(t, "urn:ietf:params:acme:error:unauthorized", withKey("revoked", kid, hmac))

		kid, hmac = add("certbot")
		client.Shell("rm -rf /etc/letsencrypt/accounts").OK(t)
		client.Run(certbot(s, "--eab-kid", kid, "--eab-hmac-key", hmac)...).OK(t)

		kid, hmac = add("caddy")
		serveByCaddy(t, s, "acme_eab {\n\t\tkey_id "+kid+"\n\t\tmac_key "+hmac+"\n\t}")
	})
}
