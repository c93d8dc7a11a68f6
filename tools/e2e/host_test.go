package e2e_test

import (
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// A host with Debian's sshd and nothing of ours but pkictl.
const (
	machineName    = "web.e2e.test"
	dropIn         = "/etc/ssh/sshd_config.d/infra-pki.conf"
	maxPkictl      = 30_000_000
	maxHelpSeconds = 0.15
)

var keyKinds = []string{"ed25519", "ecdsa", "rsa"}

// algorithms are those of the certificates of each kind of key.
var algorithms = map[string]string{
	"ed25519": "ssh-ed25519-cert-v01@openssh.com",
	"ecdsa":   "ecdsa-sha2-nistp256-cert-v01@openssh.com",
	"rsa":     "rsa-sha2-512-cert-v01@openssh.com",
}

type sshdHost struct {
	*stack.Client
	t     *testing.T
	stack *stack.Stack
}

// sshdMachine starts a machine with an account and an sshd of the given configuration,
// which is added to Debian's.
func sshdMachine(t *testing.T, s *stack.Stack, more string) sshdHost {
	t.Helper()
	m := sshdHost{s.Machine(machineName), t, s}
	t.Cleanup(m.Remove)
	m.Shell("rm /etc/ssh/ssh_host_*; ssh-keygen -A; useradd --create-home deploy; mkdir -p /run/sshd /etc/web").OK(t)
	m.Shell("cat >>/etc/ssh/sshd_config <<'end'\n" + more + "\nend").OK(t)
	return m
}

// serve starts sshd and waits until it listens.
func (m sshdHost) serve() {
	m.t.Helper()
	m.Shell(`/usr/sbin/sshd; for _ in {1..100}; do (exec 3<>/dev/tcp/127.0.0.1/22) 2>/dev/null && exit 0; sleep 0.1; done; exit 1`).OK(m.t)
}

// token makes /root/join.env for the machine.
func (m sshdHost) token(args ...string) {
	m.t.Helper()
	args = append([]string{"run", "--rm", "--no-deps", "-T", "pkictl", "token", "--name", machineName, "--env-file", "-"}, args...)
	m.Write("/root/join.env", m.stack.Compose(args...).OK(m.t).Stdout)
}

// files is all that a person or a program could have changed, a line a file. With
// times, the lines have the time of the last change, but for directories: fuse-overlayfs
// goes on telling an older one for a while.
func (m sshdHost) files(times bool) []string {
	m.t.Helper()
	format := `-printf '%p %y %m %u:%g %l\n'`
	if times {
		format = `\( -type d ` + format + ` -o -printf '%p %y %m %u:%g %l %T@\n' \)`
	}
	const skipped = `-path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /root -o -path /var/log -o -path /home`
	listing := m.Shell(`find / -mindepth 1 \( ` + skipped + ` \) -prune -o ` + format + `; ` +
		`find / -mindepth 1 \( ` + skipped + ` \) -prune -o -type f -print0 | xargs -0 sha256sum`).OK(m.t).Stdout
	lines := strings.Split(strings.TrimSpace(listing), "\n")
	slices.Sort(lines)
	return lines
}

// joined demands that the host is a member, and that joining again changes nothing.
func (m sshdHost) joined(flags ...string) {
	m.t.Helper()
	for _, kind := range keyKinds {
		m.Run("ssh-keygen", "-L", "-f", "/etc/ssh/ssh_host_"+kind+"_key-cert.pub").OK(m.t)
	}
	out := m.Run(append([]string{"pkictl", "join"}, flags...)...).OK(m.t)
	require.True(m.t, strings.HasPrefix(out.Stdout, "unchanged "), out.Output())
}

func TestHosts(t *testing.T) {
	s := stack.New(t, nil)
	s.Up()
	client := s.Client()
	client.Write("/tmp/admin", s.Get("PROVISIONER_PASSWORD"))
	client.Run("step", "ca", "bootstrap", "--ca-url", s.URL(), "--fingerprint", strings.TrimSpace(client.Read("/trust/fingerprint"))).OK(t)
	client.Shell("step ssh certificate deploy /tmp/deploy --no-agent --no-password --insecure" + byAdmin).OK(t)

	t.Run("the program is static, small and quick on a host that never saw Docker", func(t *testing.T) {
		m := sshdMachine(t, s, "")
		require.Contains(t, m.Shell("ldd /usr/local/bin/pkictl 2>&1 || true").OK(t).Stdout, "not a dynamic executable")
		size, err := strconv.Atoi(strings.TrimSpace(m.Run("stat", "--format", "%s", "/usr/local/bin/pkictl").OK(t).Stdout))
		require.NoError(t, err)
		require.Less(t, size, maxPkictl)
		// In time of the processor: other tests are at work on this machine.
		took := m.Shell("TIMEFORMAT='%U %S'; time for _ in {1..20}; do pkictl --help >/dev/null; done").OK(t).Stderr
		var user, system float64
		_, err = fmt.Sscan(took, &user, &system)
		require.NoError(t, err, took)
		t.Logf("pkictl: %d bytes, --help in %.0f ms of the processor's", size, (user+system)/20*1000)
		require.Less(t, (user+system)/20, maxHelpSeconds)
	})

	t.Run("the printed line makes a host a member, whose sshd_config ends in a Match block", func(t *testing.T) {
		m := sshdMachine(t, s, "Match User nobody\n\tX11Forwarding no")
		m.serve()
		before := m.files(false)
		config := m.Shell("cd /etc/ssh && sha256sum sshd_config; stat --format %y sshd_config").OK(t).Stdout

		line := s.Compose("run", "--rm", "--no-deps", "-T", "pkictl", "token", "--name", machineName, "--name", "www.e2e.test").OK(t).Stdout
		require.Contains(t, line, "sudo pkictl join --ca-url "+s.URL()+" ")
		out := m.Shell("sudo() { \"$@\"; }\n" + line).OK(t)
		require.Contains(t, out.Stdout, "joined "+s.URL()+"\n  ssh  "+machineName+", www.e2e.test until ")
		require.Equal(t, config, m.Shell("cd /etc/ssh && sha256sum sshd_config; stat --format %y sshd_config").OK(t).Stdout)

		// ssh with nothing but the CA's key, for each key; and a person's certificate lets in.
		for kind, algorithm := range algorithms {
			out := client.Shell("ssh -v -o HostKeyAlgorithms=" + algorithm + strict + " -i /tmp/deploy deploy@" + machineName + " id -un").OK(t)
			require.Equal(t, "deploy\n", out.Stdout, kind)
			require.Contains(t, out.Stderr, "kex: host key algorithm: "+algorithm)
		}
		client.Shell("ssh -o HostKeyAlias=www.e2e.test" + strict + " -i /tmp/deploy deploy@" + machineName + " true").OK(t)
		refused := client.Shell("ssh -o HostKeyAlias=db.e2e.test"+strict+" -i /tmp/deploy deploy@"+machineName+" true").Exits(t, 255)
		require.Contains(t, refused.Stderr, "Certificate invalid: name is not a listed principal")
		// Whoever has noted a key finds it unchanged: no HostKey line took the others away.
		require.Len(t, strings.Split(strings.TrimSpace(client.Shell("ssh-keyscan -t ed25519,ecdsa,rsa "+machineName+" 2>/dev/null").OK(t).Stdout), "\n"), 3)

		joined := m.files(true)
		m.joined()
		require.Equal(t, joined, m.files(true), "the second run changed something")
		m.Run("pkictl", "renew", "--force", "--rekey", "--dry-run").OK(t)
		m.Run("pkictl", "renew", "--force").OK(t)
		client.Shell("ssh -o HostKeyAlgorithms=" + algorithms["rsa"] + strict + " -i /tmp/deploy deploy@" + machineName + " true").OK(t)

		require.Contains(t, m.Run("pkictl", "leave").OK(t).Stdout, "left "+s.URL())
		require.Equal(t, before, m.files(false))
		require.Contains(t, m.Run("pkictl", "leave").OK(t).Stdout, "unchanged: this host has not joined a CA")
		refused = client.Shell("ssh"+strict+" -i /tmp/deploy deploy@"+machineName+" true").Exits(t, 255)
		require.Contains(t, refused.Stderr, "Host key verification failed")
	})

	t.Run("TLS: a key and a certificate where they are wanted, and the hook", func(t *testing.T) {
		m := sshdMachine(t, s, "")
		before := m.files(false)
		m.token("--tls")
		join := "pkictl join --env-file /root/join.env --tls-cert /etc/web/crt --tls-key /etc/web/key --tls-owner www-data:www-data " +
			"--tls-mode 0640 --tls-reload 'echo reloaded >>/root/hook'"
		m.Shell(join).OK(t)
		m.Shell(join).OK(t)
		require.Equal(t, "reloaded\n", m.Read("/root/hook"))
		require.Equal(t, "640 www-data:www-data\n644 www-data:www-data\n", m.Shell("stat --format '%a %U:%G' /etc/web/key /etc/web/crt").OK(t).Stdout)
		client.Write("/tmp/chain", m.Read("/etc/web/crt"))
		client.Shell("openssl verify -CAfile /trust/root_ca.crt -untrusted /tmp/chain -verify_hostname " + machineName + " /tmp/chain").OK(t)
		m.Run("pkictl", "leave").OK(t)
		require.Equal(t, before, m.files(false))
	})

	t.Run("a broken sshd_config: nothing is changed, and sshd's own words", func(t *testing.T) {
		m := sshdMachine(t, s, "Nonsense yes")
		m.token()
		before := m.files(true)
		out := m.Run("pkictl", "join", "--env-file", "/root/join.env").Exits(t, 1)
		require.Contains(t, out.Stderr, "/etc/ssh/sshd_config: line ")
		require.Contains(t, out.Stderr, "Bad configuration option: Nonsense")
		require.Equal(t, before, m.files(true))
	})

	t.Run("a configuration that does not read drop-ins: all is taken back, and the token stays good", func(t *testing.T) {
		m := sshdMachine(t, s, "")
		m.serve()
		m.token()
		m.Shell("sed -i 's/^Include/#Include/' /etc/ssh/sshd_config").OK(t)
		before := m.files(false)
		out := m.Run("pkictl", "join", "--env-file", "/root/join.env").Exits(t, 1)
		require.Contains(t, out.Stderr, "pkictl: hint: put this line at the top of sshd_config, above everything else: Include /etc/ssh/sshd_config.d/*.conf")
		require.Equal(t, before, m.files(false))
		m.Shell("sed -i 's/^#Include/Include/' /etc/ssh/sshd_config").OK(t)
		m.Run("pkictl", "join", "--env-file", "/root/join.env").OK(t)
		m.joined()
	})

	t.Run("killed at any moment, the next run goes on, and leave takes all of it away", func(t *testing.T) {
		m := sshdMachine(t, s, "")
		m.serve()
		before := m.files(false)
		moments := map[string]string{
			"the directory":      "[ -d /etc/infra-pki ]",
			"the record":         "[ -e /etc/infra-pki/host.json ]",
			"the drop-in":        "[ -e " + dropIn + " ]",
			"the trust store":    "ls /usr/local/share/ca-certificates | grep -q .",
			"the first key":      "ls /etc/ssh | grep -q cert.pub",
			"the last key":       "[ $(ls /etc/ssh | grep -c cert.pub) = 3 ]",
			"the TLS key":        "[ -e /etc/web/key ]",
			"the TLS pair":       "[ -e /etc/web/crt ]",
			"the schedule":       "[ -e /etc/cron.d/infra-pki-renew ]",
			"a moment by chance": "sleep 0." + fmt.Sprint(100+int(randomByte(t))*2),
		}
		for _, moment := range slices.Sorted(maps.Keys(moments)) {
			t.Run("after "+moment, func(t *testing.T) {
				m := sshdHost{m.Client, t, s}
				m.token("--ssh", "--tls")
				// The tools of the trust store take many times as long as all the rest.
				var flags []string
				if moment != "the trust store" {
					flags = append(flags, "--no-trust")
				}
				join := "pkictl join --env-file /root/join.env --tls-cert /etc/web/crt --tls-key /etc/web/key " + strings.Join(flags, " ")
				m.Shell(join + " >/dev/null 2>&1 & pid=$!\nwhile kill -0 $pid && ! (" + moments[moment] + "); do :; done 2>/dev/null\nkill -9 $pid 2>/dev/null || echo too late; wait $pid || true").OK(t)
				again := m.Shell(join)
				if again.Code != 0 {
					// Killed between the CA's answer and the file.
					require.Contains(t, again.Stderr, "a token is good once")
					m.token("--ssh", "--tls")
					m.Shell(join).OK(t)
				}
				m.joined(flags...)
				client.Shell("ssh" + strict + " -i /tmp/deploy deploy@" + machineName + " true").OK(t)
				m.Run("pkictl", "leave").OK(t)
				require.Equal(t, before, m.files(false))
			})
		}
		t.Run("and leave after a killed join", func(t *testing.T) {
			m := sshdHost{m.Client, t, s}
			m.token("--ssh", "--tls")
			m.Shell("pkictl join --env-file /root/join.env >/dev/null 2>&1 & pid=$!\nuntil [ -e " + dropIn + " ]; do :; done; kill -9 $pid; wait $pid || true").OK(t)
			m.Run("pkictl", "leave").OK(t)
			require.Equal(t, before, m.files(false))
		})
	})
}

func randomByte(t *testing.T) byte {
	t.Helper()
	b := make([]byte, 1)
	_, err := rand.Read(b)
	require.NoError(t, err)
	return b[0]
}
