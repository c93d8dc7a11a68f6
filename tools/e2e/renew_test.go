package e2e_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

const (
	edKey  = "/etc/ssh/ssh_host_ed25519_key"
	edCert = edKey + "-cert.pub"
	webKey = "/etc/web/key"
	web    = "/etc/web/crt"

	// Where Debian's node_exporter looks.
	figures = "/var/lib/prometheus/node-exporter/infra-pki.prom"
)

// member is a machine that has joined, with certificates for SSH and TLS.
type member struct {
	sshdHost

	client *stack.Client
}

func newMember(t *testing.T, s *stack.Stack, m *stack.Client) member {
	t.Helper()
	h := member{sshdHost{m, t, s}, s.Client()}
	t.Cleanup(m.Remove)
	m.Shell("useradd --create-home deploy; mkdir -p /run/sshd /etc/web " + figures[:strings.LastIndex(figures, "/")]).OK(t)
	return h
}

func (m member) join() {
	m.t.Helper()
	m.token("--ssh", "--tls")
	m.Shell("pkictl join --env-file /root/join.env --tls-cert " + web + " --tls-key " + webKey +
		" --tls-owner www-data --tls-mode 0640 --tls-reload 'echo told >>/root/told'; rm -f /root/told").OK(m.t)
}

// replace puts certificates in the place of those that the machine has, that of TLS with
// a key of its own, with a window that options of step set.
func (m member) replace(options string) {
	m.t.Helper()
	m.client.Write("/tmp/replace.pub", m.Read(edKey+".pub"))
	m.client.Shell("cd /tmp && step ca certificate " + machineName + " replace.crt replace --kty EC --force" + byAdmin + options + " && " +
		"step ssh certificate " + machineName + " replace.pub --host --sign --force --principal " + machineName + byAdmin + options).OK(m.t)
	for from, to := range map[string]string{"replace": webKey, "replace.crt": web, "replace-cert.pub": edCert} {
		m.Write("/tmp/new", m.client.Read("/tmp/"+from))
		m.Shell("cat /tmp/new >" + to).OK(m.t) // owner and mode stay
	}
}

// serials are those of both certificates.
func (m member) serials() (tls, ssh string) {
	m.t.Helper()
	return certificates(m.t, m.Read(web))[0].SerialNumber.String(), printed(m.t, m.Client, edCert, "Serial")
}

// pairs demands that each certificate is that of the key beside it.
func (m member) pairs() {
	m.t.Helper()
	m.Shell("test \"$(sed -n '/BEGIN/,/END/p;/END/q' " + web + " | openssl x509 -noout -pubkey)\" = \"$(openssl pkey -in " + webKey + " -pubout)\"").OK(m.t)
	key := strings.Fields(m.Run("ssh-keygen", "-l", "-f", edKey).OK(m.t).Stdout)[1]
	require.Contains(m.t, printed(m.t, m.Client, edCert, "Public key"), key)
}

func (m member) told() int {
	m.t.Helper()
	return strings.Count(m.Shell("cat /root/told 2>/dev/null || true").OK(m.t).Stdout, "told\n")
}

// known demands that whoever knows the CA's key knows the machine by its ed25519 key.
func (m member) known() {
	m.t.Helper()
	out := m.client.Shell("ssh -v -o HostKeyAlgorithms=" + algorithms["ed25519"] + strict + " -i /tmp/deploy deploy@" + machineName + " true").OK(m.t)
	_, ssh := m.serials()
	require.Contains(m.t, out.Stderr, "serial "+ssh+" ID")
}

type hostState struct {
	Well         bool
	Certificates []struct{ Path, State string }
	Schedule     struct {
		Kind   string
		Active bool
	}
	Renewal  struct{ Errors []string }
	Problems []struct{ What, Do string }
}

func (m member) status(code int) (st hostState) {
	m.t.Helper()
	out := m.Run("pkictl", "status", "--json").Exits(m.t, code)
	require.NoError(m.t, json.Unmarshal([]byte(out.Stdout), &st), out.Stdout)
	require.Equal(m.t, code == 0, st.Well)
	return st
}

func (st hostState) what() string {
	var all []string
	for _, p := range st.Problems {
		all = append(all, p.What)
	}
	return strings.Join(all, "\n")
}

func TestHostsRenewByThemselves(t *testing.T) {
	s := stack.New(t, stack.Settings{"SSH_HOST_MIN_LIFETIME": "5s", "TLS_MIN_LIFETIME": "5s"})
	s.Up()
	client := s.Client()
	client.Write("/tmp/admin", s.Get("PROVISIONER_PASSWORD"))
	client.Run("step", "ca", "bootstrap", "--ca-url", s.URL(), "--fingerprint", strings.TrimSpace(client.Read("/trust/fingerprint"))).OK(t)
	client.Shell("step ssh certificate deploy /tmp/deploy --no-agent --no-password --insecure" + byAdmin).OK(t)
	m := newMember(t, s, s.Machine(machineName))
	m.serve()
	m.Run("cron").OK(t)
	m.join()
	require.Empty(t, m.status(0).what())

	t.Run("past two thirds of its life and not before, over a time in which the CA is away", func(t *testing.T) {
		m := member{sshdHost{m.Client, t, s}, client}
		// step-ca dates a certificate back by a minute: 150 s of 210 are left, and 80 until it is due.
		m.replace(" --not-after 150s")
		tls, ssh := m.serials()
		out := m.Run("pkictl", "renew").OK(t)
		require.Equal(t, 4, strings.Count(out.Stderr, "msg=unchanged"), out.Stderr)

		s.Compose("stop", "caddy").OK(t)
		begin := time.Now()
		var failed stack.Result
		require.Eventually(t, func() bool {
			failed = m.Run("pkictl", "renew", "--textfile", figures)
			return failed.Code == 1
		}, 2*time.Minute, time.Second)
		t.Logf("due after %.0f s", time.Since(begin).Seconds())
		require.Greater(t, time.Since(begin), 40*time.Second, "before two thirds")
		require.Contains(t, failed.Stderr, "no answer: ")
		require.Contains(t, failed.Stderr, "pkictl: hint: nothing answers at "+s.URL())
		require.Contains(t, m.Read(figures), `pki_host_certificate_renewal_success{kind="tls",path="/etc/web/crt"} 0`)
		st := m.status(1)
		require.NotEmpty(t, st.Renewal.Errors)
		require.Contains(t, st.what(), "at the last renewal: renewing")
		shown := m.Run("pkictl", "status").Exits(t, 1).Stdout
		require.Contains(t, shown, "\ndo:    nothing answers at "+s.URL())
		require.Zero(t, m.told())

		s.Compose("up", "-d", "--wait", "caddy").OK(t)
		require.Eventually(t, func() bool { return m.Run("pkictl", "renew", "--textfile", figures).Code == 0 }, time.Minute, time.Second)
		newTLS, newSSH := m.serials()
		require.NotEqual(t, tls, newTLS)
		require.NotEqual(t, ssh, newSSH)
		m.pairs()
		m.known()
		require.Equal(t, 1, m.told())
		require.Equal(t, "640 www-data:root\n", m.Shell("stat --format '%a %U:%G' "+webKey).OK(t).Stdout)
		require.Contains(t, m.Read(figures), `pki_host_certificate_renewal_success{kind="tls",path="/etc/web/crt"} 1`)
		require.Empty(t, m.status(0).what())
	})

	t.Run("a clock that is before the certificate's beginning, and one that is past its end", func(t *testing.T) {
		// No container has a clock of its own, and a static program listens to no
		// preloaded one. A window that lies elsewhere is the same to the host.
		m := member{sshdHost{m.Client, t, s}, client}
		m.replace(" --not-before 10m --not-after 20m")
		tls, ssh := m.serials()
		out := m.Run("pkictl", "renew").OK(t)
		require.Equal(t, 2, strings.Count(out.Stderr, `msg="not valid yet: the clock of this host is behind, or was ahead"`), out.Stderr)
		sameTLS, sameSSH := m.serials()
		require.Equal(t, []string{tls, ssh}, []string{sameTLS, sameSSH})
		require.Contains(t, m.status(1).what(), "and the clock of this host says")

		m.replace(" --not-after 6s")
		expired := edCert + `\" expired on ` // in JSON
		require.Eventually(t, func() bool { return strings.Contains(m.Run("pkictl", "status", "--json").Stdout, expired) }, 15*time.Second, time.Second)
		out = m.Run("pkictl", "renew", "--force").Exits(t, 1)
		require.Contains(t, out.Stderr, `pkictl: error: renewing "`+web+`": it expired on `)
		require.Contains(t, out.Stderr, `pkictl: hint: the CA renews no certificate that has expired: "pkictl token" on the CA host`)
		m.join()
		m.Run("pkictl", "renew").OK(t) // until then the failure is the last that is known
		require.Empty(t, m.status(0).what())
		m.known()
	})

	t.Run("killed at any instant, key and certificate are a pair after the next run", func(t *testing.T) {
		m := member{sshdHost{m.Client, t, s}, client}
		const rounds = 25
		killed := 0
		for i := range rounds {
			out := m.Shell(fmt.Sprintf("pkictl renew --force --rekey >/dev/null 2>&1 & sleep 0.%03d; kill -9 $! 2>/dev/null && echo killed; wait || true", i*12)).OK(t)
			killed += strings.Count(out.Stdout, "killed")
			m.Run("pkictl", "renew").OK(t)
			m.pairs()
			require.Empty(t, m.Shell("find /etc/ssh /etc/web -name '.*' -type f").OK(t).Stdout)
		}
		t.Logf("%d of %d runs were killed", killed, rounds)
		require.Positive(t, killed)
		m.known()
		require.Empty(t, m.status(0).what())
	})

	t.Run("cron runs it", func(t *testing.T) {
		m := member{sshdHost{m.Client, t, s}, client}
		require.Equal(t, "cron", m.status(0).Schedule.Kind)
		tls, ssh := m.serials()
		told := m.told()
		m.Shell("sed -i 's,^[*]/15,*,; s,renew --quiet --jitter 10m,renew --force --quiet --jitter 1s,' /etc/cron.d/infra-pki-renew").OK(t)
		require.Eventually(t, func() bool { return m.told() > told }, 100*time.Second, time.Second)
		newTLS, newSSH := m.serials()
		require.NotEqual(t, tls, newTLS)
		require.NotEqual(t, ssh, newSSH)
		m.pairs()
	})
}

// The units, with all that they take away from the program, on a systemd that runs.
func TestSystemdRenewsHosts(t *testing.T) {
	s := stack.New(t, nil)
	s.Up()
	m := newMember(t, s, s.SystemdMachine(machineName))
	m.Run("systemctl", "start", "ssh").OK(t)
	m.join()
	const units = "/etc/systemd/system/"
	require.Equal(t, "systemd", m.status(0).Schedule.Kind)
	require.Contains(t, m.Run("systemctl", "list-timers", "infra-pki-renew.timer").OK(t).Stdout, "infra-pki-renew.service")
	stat := func() string {
		return m.Shell("stat --format '%n %Y %s' " + units + "infra-pki*; systemctl show --property ActiveEnterTimestamp infra-pki-renew.timer").OK(t).Stdout
	}
	before := stat()
	m.Run("pkictl", "join").OK(t)
	require.Equal(t, before, stat())

	start := func() stack.Result { return m.Run("systemctl", "start", "infra-pki-renew.service") }
	start().OK(t)
	tls, ssh := m.serials()
	m.Shell("mkdir " + units + "infra-pki-renew.service.d && " +
		"printf '[Service]\\nExecStart=\\nExecStart=/usr/local/bin/pkictl renew --force --rekey\\n' >" + units + "infra-pki-renew.service.d/force.conf && " +
		"systemctl daemon-reload").OK(t)
	start().OK(t)
	newTLS, newSSH := m.serials()
	require.NotEqual(t, tls, newTLS)
	require.NotEqual(t, ssh, newSSH)
	m.pairs()
	require.Equal(t, 1, m.told())
	require.Empty(t, m.status(0).what())

	s.Compose("stop", "caddy").OK(t)
	require.NotZero(t, start().Code)
	require.Eventually(t, func() bool {
		journal := m.Run("journalctl", "--priority", "err", "--identifier", "infra-pki-renew", "--output", "cat").OK(t).Stdout
		return strings.Contains(journal, "wrong: at the last renewal: renewing") && strings.Contains(journal, "do:    ")
	}, 30*time.Second, time.Second)
	require.Contains(t, m.Run("systemctl", "is-failed", "infra-pki-renew.service").OK(t).Stdout, "failed")

	m.Run("pkictl", "leave").OK(t)
	require.Contains(t, m.Run("systemctl", "list-unit-files", "infra-pki*").Stdout, "0 unit files listed")
}
