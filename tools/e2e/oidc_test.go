package e2e_test

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

const (
	ssoName     = "sso.e2e.test"
	ssoEndpoint = "https://" + ssoName + "/.well-known/openid-configuration"
)

// Whom the provider knows. Everybody's password is their name and "'s". Tokens of the
// public client are 45 seconds past their end when they are made, as if by a slow clock:
// step-ca allows for a minute, so that they are good for a quarter of one.
const ssoConfig = `{
	"Issuer": "https://` + ssoName + `",
	"People": {
		"alice":   {"Password": "alice's",   "Email": "Alice.Adams@corp.e2e.test", "Groups": ["staff", "dba", "not a name"]},
		"bob":     {"Password": "bob's",     "Email": "bob@corp.e2e.test",         "Groups": ["guests"]},
		"carol":   {"Password": "carol's",   "Email": "carol@corp.e2e.test",       "Groups": ["staff"]},
		"eve":     {"Password": "eve's",     "Email": "carol@corp.e2e.test",       "Groups": ["staff"], "Unverified": true},
		"mallory": {"Password": "mallory's", "Email": "mallory@elsewhere.test",    "Groups": ["staff"]}
	},
	"Clients": {
		"with-secret": {"Redirect": "http://127.0.0.1:10000", "Lifetime": 300, "Secret": "told to everybody"},
		"public":      {"Redirect": "http://127.0.0.1",       "Lifetime": -45}
	}
}`

// The second client at the provider, as a file in provisioners.d.
const ssoDropIn = `{
	"type": "OIDC",
	"name": "sso-public",
	"clientID": "public",
	"clientSecret": "",
	"configurationEndpoint": "` + ssoEndpoint + `",
	"domains": ["corp.e2e.test"],
	"scopes": ["openid", "email", "groups"],
	"claims": {"enableSSHCA": true},
	"options": {"x509": {"templateFile": "tls-oidc.tpl"}, "ssh": {"templateFile": "ssh-user.tpl"}}
}`

// A person at a browser: takes the address that step prints, fills in the form, wrongly
// at first, and lets the provider lead back to where step listens.
const browse = `
who=$1 said=$(mktemp); shift
STEP_OPEN_BROWSER=0 "$@" 2>>"$said" &
url=
while [[ -z $url ]] && kill -0 $! 2>/dev/null; do
	sleep 0.1
	url=$(grep -m 1 -o 'https://` + ssoName + `/authorize?[^ ]*' "$said" || true)
done
if [[ $url ]]; then
	id=$(curl -fsSL "$url" | sed -n 's/.*name="id" value="\([^"]*\)".*/\1/p')
	for password in wrong "$who's"; do
		curl -sSL -o /dev/null -w 'the browser ends with status %{http_code}\n' --data-urlencode "id=$id" \
			--data-urlencode "username=$who" --data-urlencode "password=$password" https://` + ssoName + `/login >>"$said"
	done
fi
code=0; wait $! || code=$?
cat "$said" >&2
exit $code`

// sso is a stack, and a provider beside it that has its certificate from that stack.
type sso struct {
	s      *stack.Stack
	client *stack.Client
	ca     *ca
	dir    string // of the provider's files
}

// logIn runs a command that a person has to log in for.
func (o *sso) logIn(t *testing.T, who string, command ...string) stack.Result {
	t.Helper()
	return o.client.Run(append([]string{"bash", "-euo", "pipefail", "-c", browse, "browse", who}, command...)...)
}

// refused demands that a command fails, and because of what step-ca writes to its log.
func (o *sso) refused(t *testing.T, reason string, run func() stack.Result) {
	t.Helper()
	count := func() int { return strings.Count(o.s.Logs("step-ca"), reason) }
	before := count()
	r := run()
	require.NotZero(t, r.Code, r)
	require.True(t, within(5*time.Second, func() bool { return count() > before }), "%q is not the reason: %s", reason, r)
}

// token is an identity token, obtained by step alone.
func (o *sso) token(t *testing.T, who, client string, scopes ...string) string {
	t.Helper()
	args := []string{"step", "oauth", "--oidc", "--bare", "--provider", ssoEndpoint, "--client-id", client}
	if client == "with-secret" {
		args = append(args, "--client-secret", "told to everybody", "--listen", "127.0.0.1:10000")
	}
	for _, scope := range scopes {
		args = append(args, "--scope", scope)
	}
	return strings.TrimSpace(o.logIn(t, who, args...).OK(t).Stdout)
}

var (
	tlsRequest = []string{"step", "ca", "certificate", "--force"}
	sshRequest = []string{"step", "ssh", "certificate", "--force", "--no-agent", "--no-password", "--insecure"}
)

// with makes a request of a certificate into the files /tmp/ID….
func with(request []string, subject, id string, more ...string) []string {
	args := append(slices.Clone(request), more...)
	if request[1] == "ca" {
		return append(args, subject, "/tmp/"+id+".crt", "/tmp/"+id+".key")
	}
	return append(args, subject, "/tmp/"+id)
}

// ssh is what an SSH certificate says, by the names that ssh-keygen gives.
func (o *sso) ssh(t *testing.T, id string) map[string][]string {
	t.Helper()
	text := o.client.Run("ssh-keygen", "-L", "-f", "/tmp/"+id+"-cert.pub").OK(t).Stdout
	found, name := map[string][]string{}, ""
	for line := range strings.Lines(text) {
		if field := strings.TrimPrefix(line, "        "); !strings.HasPrefix(field, " ") {
			var value string
			name, value, _ = strings.Cut(strings.TrimSpace(field), ":")
			if value = strings.TrimSpace(value); value != "" {
				found[name] = []string{value}
			}
			continue
		}
		found[name] = append(found[name], strings.TrimSpace(line))
	}
	return found
}

// states tells of each OIDC provisioner whether every step-ca could initialise it: each takes a
// provider up again by itself.
func (o *sso) states(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, replica := range containersOf(t, o.s, "step-ca") {
		said := stack.Docker(t, "exec", replica.ID, "curl", "-fsS", "--retry", "3", "--retry-all-errors",
			"--cacert", "/home/step/certs/root_ca.crt", "https://localhost:9000/provisioners?limit=100").OK(t)
		var list struct {
			Provisioners []struct{ Type, Name, State, StateReason string }
		}
		require.NoError(t, json.Unmarshal([]byte(said.Stdout), &list))
		for _, p := range list.Provisioners {
			if p.Type != "OIDC" {
				continue
			}
			if p.State != "" {
				require.Contains(t, p.StateReason, ssoEndpoint)
			}
			if found[p.Name] == "" {
				found[p.Name] = p.State
			}
		}
	}
	return found
}

// serve starts the provider, with a certificate of the CA that trusts it.
func (o *sso) serve(t *testing.T) {
	t.Helper()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", o.dir, "./provider")
	build.Dir = filepath.Join(stack.Repository(), "tools", "e2e")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	o.client.Write("/tmp/password", o.s.Get("PROVISIONER_PASSWORD"))
	o.client.Run(with(tlsRequest, ssoName, "sso", "--provisioner", "admin", "--provisioner-password-file", "/tmp/password")...).OK(t)
	for name, content := range map[string]string{
		"config.json": ssoConfig, "sso.crt": o.client.Read("/tmp/sso.crt"), "sso.key": o.client.Read("/tmp/sso.key"),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(o.dir, name), []byte(content), 0o600))
	}
	o.s.Compose("up", "-d", "--no-deps", "sso").OK(t)
}

// within tells whether something comes true in time.
func within(patience time.Duration, so func() bool) bool {
	for end := time.Now().Add(patience); !so(); time.Sleep(time.Second) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// requireTakenUp demands that step-ca makes use of the provider without being told.
func (o *sso) requireTakenUp(t *testing.T, names ...string) {
	t.Helper()
	begin := time.Now()
	want := map[string]string{}
	for _, name := range names {
		want[name] = ""
	}
	require.True(t, within(90*time.Second, func() bool { return maps.Equal(want, o.states(t)) }), "it stays %q", o.states(t))
	t.Logf("taken up after %.0f s", time.Since(begin).Seconds())
}

// One stack through the life of its OpenID provider, each part with what the one before left.
func TestPeopleLogInWithOpenIDConnect(t *testing.T) {
	dir, dropins := t.TempDir(), t.TempDir()
	dropin := filepath.Join(dropins, "sso-public.json")
	require.NoError(t, os.WriteFile(dropin, []byte(ssoDropIn), 0o644)) //nolint:gosec // read by another user in a container
	s := stack.New(t, stack.Settings{
		"OIDC_CLIENT_ID": "with-secret", "OIDC_CLIENT_SECRET": "told to everybody", "OIDC_ENDPOINT": "https://" + ssoName,
		"OIDC_DOMAIN": "corp.e2e.test", "OIDC_GROUPS": "staff, ops", "OIDC_ADMINS": "carol@corp.e2e.test",
		"OIDC_SCOPES": "openid email groups", "OIDC_LISTEN_ADDRESS": "127.0.0.1:10000",
		"PROVISIONERS_DIR": dropins, "COMPOSE_FILE": "docker-compose.yml:tools/e2e/testdata/sso.yml", "E2E_SSO_DIRECTORY": dir,
	})
	s.Up()
	o := &sso{s: s, client: s.Client(), ca: newCA(t, s), dir: dir}

	t.Run("a provider that cannot be reached stops nothing and is told of", func(t *testing.T) {
		requireHealthy(t, s)
		require.Equal(t, map[string]string{"sso": "Uninitialized", "sso-public": "Uninitialized"}, o.states(t))
		said := s.Logs("provisioner-init")
		for _, name := range []string{"sso", "sso-public"} {
			require.Regexp(t, `does not answer.*provisioner=`+name+` .*`+ssoName, said)
		}
		o.ca.issue(t, "other.e2e.test")
	})

	t.Run("the CA takes it up by itself as soon as it answers", func(t *testing.T) {
		// All that a person is told about the CA. Its root goes to the other roots of the
		// machine, because the provider has its certificate from there too.
		fingerprint := strings.TrimSpace(contentOf(t, s.Trust(), "fingerprint"))
		o.client.Run("step", "ca", "bootstrap", "--ca-url", s.URL(), "--fingerprint", fingerprint, "--install").OK(t)
		o.serve(t)
		o.requireTakenUp(t, "sso", "sso-public")
	})
	require.False(t, t.Failed(), "the rest needs the provider")

	kept := o.token(t, "alice", "public", "openid", "email", "groups")
	expired := time.Now().Add(16 * time.Second)
	alice := []string{"group-staff", "group-dba", "aliceadams", "Alice.Adams", "Alice.Adams@corp.e2e.test"}

	t.Run("a person gets a TLS certificate for their e-mail address, whatever they ask for", func(t *testing.T) {
		r := o.logIn(t, "alice", with(tlsRequest, "www.corp.e2e.test", "alice", "--san", "www.corp.e2e.test", "--provisioner", "sso")...).OK(t)
		require.Regexp(t, `ends with status 401\n.*ends with status 200\n`, r.Stderr, "the provider asks for the password")
		leaf := certificates(t, o.client.Read("/tmp/alice.crt"))[0]
		require.Equal(t, "Alice.Adams@corp.e2e.test", leaf.Subject.CommonName)
		require.Equal(t, []string{"Alice.Adams@corp.e2e.test"}, leaf.EmailAddresses)
		require.Empty(t, leaf.DNSNames)
		o.client.Run("openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-verify_email", "Alice.Adams@corp.e2e.test",
			"-CAfile", "/trust/root_ca.crt", "-untrusted", "/tmp/alice.crt", "/tmp/alice.crt").OK(t)
	})

	t.Run("an SSH certificate has the principals of the e-mail address and of the groups, whatever is asked for", func(t *testing.T) {
		o.logIn(t, "alice", with(sshRequest, "root", "alice", "--principal", "root", "--provisioner", "sso")...).OK(t)
		cert := o.ssh(t, "alice")
		require.ElementsMatch(t, alice, cert["Principals"])
		require.Equal(t, []string{`"Alice.Adams@corp.e2e.test"`}, cert["Key ID"])
		require.Contains(t, cert["Type"][0], "user certificate")
		require.Contains(t, cert["Extensions"], "permit-pty")
	})

	t.Run("a public client does it with PKCE and any port, by a file in provisioners.d", func(t *testing.T) {
		o.logIn(t, "alice", with(sshRequest, "alice", "public", "--provisioner", "sso-public")...).OK(t)
		require.ElementsMatch(t, alice, o.ssh(t, "public")["Principals"])
	})

	t.Run("a person who has the CA's address and fingerprint alone gets to a server", func(t *testing.T) {
		o.reachServer(t)
	})

	t.Run("only an admin gets certificates of other principals, hosts and servers", func(t *testing.T) {
		host := with(sshRequest, "host.corp.e2e.test", "host", "--host", "--provisioner", "sso")
		o.refused(t, "ssh certificate type does not match", func() stack.Result { return o.logIn(t, "alice", host...) })
		o.logIn(t, "carol", host...).OK(t)
		require.Contains(t, o.ssh(t, "host")["Type"][0], "host certificate")
		require.Equal(t, []string{"host.corp.e2e.test"}, o.ssh(t, "host")["Principals"])

		o.logIn(t, "carol", with(sshRequest, "root", "carol", "--principal", "root", "--provisioner", "sso")...).OK(t)
		require.ElementsMatch(t, []string{"root", "group-staff"}, o.ssh(t, "carol")["Principals"])
		o.logIn(t, "carol", with(tlsRequest, "www.corp.e2e.test", "carol", "--san", "www.corp.e2e.test", "--provisioner", "sso")...).OK(t)
		require.Equal(t, []string{"www.corp.e2e.test"}, certificates(t, o.client.Read("/tmp/carol.crt"))[0].DNSNames)
	})

	for name, tc := range map[string]struct{ who, reason string }{
		"an address of another domain":        {"mallory", "is not allowed"},
		"a person in none of the groups":      {"bob", "invalid group"},
		"an address that nobody has verified": {"eve", "does not say that this e-mail address is verified"},
	} {
		t.Run(name+" is refused", func(t *testing.T) {
			for _, request := range [][]string{tlsRequest, sshRequest} {
				o.refused(t, tc.reason, func() stack.Result {
					return o.logIn(t, tc.who, with(request, tc.who, tc.who, "--provisioner", "sso")...)
				})
			}
		})
	}

	// What is asked for is the person's decision, not the CA's.
	t.Run("a person who keeps their address to themselves is refused, for it may be of another domain", func(t *testing.T) {
		for _, request := range [][]string{tlsRequest, sshRequest} {
			token := o.token(t, "mallory", "with-secret", "openid", "groups")
			o.refused(t, "no e-mail address", func() stack.Result {
				return o.client.Run(with(request, "mallory", "mallory", "--token", token)...)
			})
		}
	})

	t.Run("everybody whom the edge admits is told the client secret", func(t *testing.T) {
		told := o.client.Run("curl", "-fsS", "--cacert", "/trust/root_ca.crt", s.URL()+"/provisioners").OK(t)
		require.Contains(t, told.Stdout, "told to everybody")
	})

	t.Run("an expired token is refused", func(t *testing.T) {
		time.Sleep(time.Until(expired))
		o.refused(t, "token is expired", func() stack.Result {
			return o.client.Run(with(tlsRequest, "alice", "expired", "--token", kept)...)
		})
	})

	renew := []string{"step", "ca", "renew", "--force", "/tmp/alice.crt", "/tmp/alice.key"}
	t.Run("a provider that is away at a reload comes back too, and a certificate under its former name renews", func(t *testing.T) {
		s.Compose("stop", "--timeout", "1", "sso").OK(t)
		s.Set(stack.Settings{"OIDC_NAME": "login"})
		require.Regexp(t, `does not answer.*provisioner=login `, s.Make("init").OK(t).Output())
		require.Equal(t, map[string]string{"login": "Uninitialized", "sso-public": "Uninitialized"}, o.states(t))
		o.client.Run(renew...).OK(t)

		s.Compose("start", "sso").OK(t)
		o.requireTakenUp(t, "login", "sso-public")
		o.logIn(t, "alice", with(sshRequest, "alice", "login", "--provisioner", "login")...).OK(t)
		o.client.Run(renew...).OK(t)
	})

	t.Run("without it in the settings it is gone, and its certificates do not renew", func(t *testing.T) {
		require.NoError(t, os.Remove(dropin))
		s.Set(stack.Settings{"OIDC_CLIENT_ID": "", "OIDC_ENDPOINT": ""})
		s.Make("init").OK(t)
		require.Empty(t, o.states(t))
		o.refused(t, "provisioner not found", func() stack.Result { return o.client.Run(renew...) })
	})
}

// reachServer logs in on a server as README tells people, and its operator, to do.
func (o *sso) reachServer(t *testing.T) {
	t.Helper()
	host := []string{"--host", "--provisioner", "admin", "--provisioner-password-file", "/tmp/password"}
	o.client.Run(with(sshRequest, stack.ClientName, "server", host...)...).OK(t)
	o.client.Shell(`
useradd --create-home --password '*' deploy
mkdir -p /run/sshd /etc/ssh/principals
printf 'group-dba\n' >/etc/ssh/principals/deploy
step ssh config --roots >/etc/ssh/ssh_user_ca.pub
cat >/tmp/sshd_config <<'end'
Port 2222
HostKey /tmp/server
HostCertificate /tmp/server-cert.pub
TrustedUserCAKeys /etc/ssh/ssh_user_ca.pub
AuthorizedPrincipalsFile /etc/ssh/principals/%u
AuthenticationMethods publickey
end
/usr/sbin/sshd -f /tmp/sshd_config -E /tmp/sshd.log
ssh-agent -a /tmp/agent >/dev/null`).OK(t)

	agent := []string{"env", "SSH_AUTH_SOCK=/tmp/agent"}
	o.logIn(t, "alice", append(agent, "step", "ssh", "login", "--provisioner", "sso")...).OK(t)
	listed := o.client.Run(append(agent, "ssh-add", "-L")...).OK(t)
	require.Equal(t, 1, strings.Count(listed.Stdout, "\n"), "the agent has one certificate")
	o.client.Run(append(agent, "step", "ssh", "config", "--set", "Provisioner=sso")...).OK(t)

	ssh := append(agent, "ssh", "-o", "BatchMode=yes", "-p", "2222")
	whoami := append(ssh, "deploy@"+stack.ClientName, "id", "-un")
	require.Equal(t, "deploy\n", o.client.Run(whoami...).OK(t).Stdout)
	denied := o.client.Run(append(ssh, "root@"+stack.ClientName, "true")...)
	require.Contains(t, denied.Exits(t, 255).Stderr, "Permission denied")

	// Without a certificate, ssh has the person log in.
	o.client.Run(append(agent, "ssh-add", "-D")...).OK(t)
	require.Equal(t, "deploy\n", o.logIn(t, "alice", whoami...).OK(t).Stdout)
}
