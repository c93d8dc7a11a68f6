package e2e_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

const desktopName = "desktop.e2e.test"

// trustState is all that a root could be in, a line a thing. NSS and Java write the same
// entries in other bytes, so of theirs it is what certutil and keytool list.
const trustState = `
find /etc/ssl /etc/ca-certificates* /usr/local/share/ca-certificates -printf '%p %y %m %u:%g %l\n'
find /etc/ssl /etc/ca-certificates* /usr/local/share/ca-certificates -type f ! -path '*/java/cacerts' -exec sha256sum {} +
for db in .pki/nssdb .mozilla/firefox/a.default; do
  runuser -u person -- find /home/person/$db -printf '%p %y %m %u:%g\n'
  runuser -u person -- certutil -L -d sql:/home/person/$db
done
keytool -list -cacerts -storepass changeit`

// A person's machine: what sudo installs is good for curl, the person's browsers and
// Java, and what it takes away is gone from each. The parts are in the order in which
// each leaves the machine.
func TestTrust(t *testing.T) {
	s := stack.Shared(t)
	client, desktop := s.Client(), s.Desktop(desktopName)
	t.Cleanup(desktop.Remove)
	fingerprint := strings.TrimSpace(client.Read("/trust/fingerprint"))

	// A page with a certificate of this CA, and the browsers' databases.
	client.Write("/tmp/password", s.Get("PROVISIONER_PASSWORD"))
	client.Run("step", "ca", "certificate", desktopName, "/tmp/page.crt", "/tmp/page.key", "--force",
		"--provisioner", "admin", "--provisioner-password-file", "/tmp/password", "--ca-url", s.URL(), "--root", "/trust/root_ca.crt").OK(t)
	desktop.Shell("mkdir /srv/page; echo '<p>served by our CA</p>' > /srv/page/page.html").OK(t)
	for _, file := range []string{"page.crt", "page.key"} {
		desktop.Write("/srv/"+file, client.Read("/tmp/"+file))
	}
	desktop.Start("cd /srv/page; exec openssl s_server -quiet -WWW -accept 8443 -cert ../page.crt -cert_chain ../page.crt -key ../page.key </dev/null")
	desktop.Shell(`useradd --create-home person; echo 'person ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/person
		for db in .pki/nssdb .mozilla/firefox/a.default; do
			runuser -u person -- mkdir -p /home/person/$db; runuser -u person -- certutil -N --empty-password -d sql:/home/person/$db
		done`).OK(t)

	curl := func() stack.Result { return desktop.Run("curl", "-sS", s.URL()+"/health") }
	browse := func() stack.Result {
		return desktop.Shell("runuser -l person -c 'timeout 120 chromium --headless --no-sandbox --disable-gpu" +
			" --disable-dev-shm-usage --dump-dom https://" + desktopName + ":8443/page.html'")
	}
	const untrusted = "net_error -202" // ERR_CERT_AUTHORITY_INVALID
	requireUntrusted := func(t *testing.T) {
		t.Helper()
		require.Contains(t, curl().Exits(t, 60).Stderr, "unable to get local issuer certificate")
		page := browse()
		require.NotContains(t, page.Stdout, "served by our CA")
		require.Contains(t, page.Stderr, untrusted)
	}
	pkictl := func(args string) stack.Result {
		return desktop.Shell("runuser -l person -c 'sudo pkictl trust " + args + "'")
	}
	install := "install --ca-url " + s.URL() + " --fingerprint "
	state := func() string { return desktop.Shell(trustState).OK(t).Stdout }
	times := func() string {
		return desktop.Shell(`find /etc/ssl /etc/ca-certificates* /usr/local/share/ca-certificates /home/person/.pki /home/person/.mozilla -printf '%p %T@\n'`).OK(t).Stdout
	}
	before := state()

	t.Run("before, neither curl nor a browser trusts the CA", requireUntrusted)
	t.Run("with a wrong fingerprint nothing is installed", func(t *testing.T) {
		refused := pkictl(install+strings.Repeat("0", 64)).Exits(t, 1)
		require.Contains(t, refused.Stderr, "pkictl: hint: nothing was installed.")
		require.Equal(t, before, state())
	})
	t.Run("a dry run shows the root and changes nothing", func(t *testing.T) {
		planned := pkictl(install + fingerprint + " --dry-run").OK(t)
		require.Contains(t, planned.Stdout, "fingerprint:  "+fingerprint)
		require.Equal(t, 4, strings.Count(planned.Stderr, `msg="would install"`), planned)
		require.Equal(t, before, state())
	})
	t.Run("installed, curl, browser and Java trust it", func(t *testing.T) {
		done := pkictl(install + fingerprint).OK(t)
		t.Logf("installing: %.1f s", done.Took.Seconds())
		require.Contains(t, done.Stdout, "fingerprint:  "+fingerprint)
		require.NotContains(t, done.Stderr, "skipped")
		require.JSONEq(t, `{"status":"ok"}`, curl().OK(t).Stdout)
		page := browse().OK(t)
		require.Contains(t, page.Stdout, "served by our CA", page)
		require.NotContains(t, page.Stderr, untrusted)
		pkictl("status --fingerprint " + fingerprint).OK(t)
		listed := state()
		require.Equal(t, 2, strings.Count(listed, "C,, "), "in both databases of NSS")
		require.Contains(t, strings.ToLower(strings.ReplaceAll(listed, ":", "")), fingerprint, "in Java's")
	})
	t.Run("again, it says so and touches nothing", func(t *testing.T) {
		earlier := times()
		again := pkictl(install + fingerprint).OK(t)
		require.Equal(t, 4, strings.Count(again.Stderr, "msg=unchanged"), again)
		require.Equal(t, earlier, times())
	})
	t.Run("uninstalled, everything is as it was", func(t *testing.T) {
		done := pkictl("uninstall --fingerprint " + fingerprint).OK(t)
		t.Logf("uninstalling: %.1f s", done.Took.Seconds())
		requireUntrusted(t)
		require.Equal(t, before, state())
		pkictl("status --fingerprint "+fingerprint).Exits(t, 1)
		again := pkictl("uninstall --fingerprint " + fingerprint).OK(t)
		require.Equal(t, 4, strings.Count(again.Stderr, "msg=unchanged"), again)
	})
}

// The layouts of other distributions, on p11-kit as theirs are. Their own packages
// cannot be had from Debian, so the command that they add to it is a line here.
func TestTrustOfOtherDistributions(t *testing.T) {
	const extract = "exec trust extract --format=pem-bundle --filter=ca-anchors --purpose=server-auth --overwrite "
	tests := map[string]struct{ anchors, command, bundle string }{
		"RHEL and Fedora": {"/etc/pki/ca-trust/source/anchors", "/usr/sbin/update-ca-trust", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"},
		"SUSE":            {"/usr/share/pki/trust/anchors", "/usr/sbin/update-ca-certificates", "/var/lib/ca-certificates/ca-bundle.pem"},
		"Arch":            {"/etc/ca-certificates/trust-source/anchors", "/usr/libexec/p11-kit/trust-extract-compat", "/etc/ssl/certs/ca-certificates.crt"},
	}
	s := stack.Shared(t)
	s.Client()
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			host := s.Desktop(desktopName)
			t.Cleanup(host.Remove)
			host.Copy(s.Trust(), "/trust")
			host.Shell("rm -r /usr/local/share/ca-certificates /etc/ssl/certs; mkdir -p /etc/pkcs11/modules " +
				tc.anchors + " $(dirname " + tc.command + ") $(dirname " + tc.bundle + ")").OK(t)
			host.Write(tc.command, "#!/bin/sh\n"+extract+tc.bundle+"\n")
			host.Write("/etc/pkcs11/modules/p11-kit-trust.module",
				"module: p11-kit-trust.so\npriority: 1\ntrust-policy: yes\nx-init-reserved: paths="+strings.TrimSuffix(tc.anchors, "/anchors")+"\n")
			host.Shell("chmod 755 " + tc.command + "; chmod 644 /etc/pkcs11/modules/*; " + tc.command).OK(t)
			files := func() string {
				return host.Shell("find " + tc.anchors + " -printf '%p %m\n'; sha256sum " + tc.bundle).OK(t).Stdout
			}
			curl := func() stack.Result {
				return host.Run("curl", "-sS", "--cacert", tc.bundle, s.URL()+"/health")
			}
			before := files()
			require.NotZero(t, curl().Code)

			const flags = " --root /trust/root_ca.crt --stores system"
			require.Contains(t, host.Shell("pkictl trust install"+flags).OK(t).Stderr, "msg=installed")
			curl().OK(t)
			require.Contains(t, host.Shell("pkictl trust install"+flags).OK(t).Stderr, "msg=unchanged")
			require.Contains(t, host.Shell("pkictl trust uninstall"+flags).OK(t).Stderr, "msg=uninstalled")
			require.NotZero(t, curl().Code)
			require.Equal(t, before, files())
		})
	}
}
