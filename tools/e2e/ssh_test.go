package e2e_test

import (
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

const (
	// The key that rekeying makes is ECDSA too, whatever the file's name says.
	hostKey  = "/etc/ssh/ssh_host_ecdsa_key"
	hostCert = hostKey + "-cert.pub"

	byAdmin   = " --provisioner admin --provisioner-password-file /tmp/admin"
	byHostJWK = " --provisioner ssh-host-jwk --provisioner-password-file /tmp/ssh-host-jwk"
	hostToken = "step ca token " + stack.ClientName + " --ssh --host" + byHostJWK

	// Nothing is known about hosts but the key of the CA, and nobody is asked.
	strict = " -F none -o BatchMode=yes -o StrictHostKeyChecking=yes -o GlobalKnownHostsFile=/dev/null -o UpdateHostKeys=no" +
		" -o UserKnownHostsFile=/trust/known_hosts"
)

// printed is a line of "ssh-keygen -L" about a certificate on the client.
func printed(t *testing.T, client *stack.Client, file, line string) string {
	t.Helper()
	text := client.Run("ssh-keygen", "-L", "-f", file).OK(t).Stdout
	match := regexp.MustCompile(`(?m)^\s*` + line + `:\s*(\S.*)$`).FindStringSubmatch(text)
	require.NotNil(t, match, text)
	return match[1]
}

// One machine is the person's and the host, with real OpenSSH on both sides. The
// parts are in the order in which each leaves it.
func TestSSH(t *testing.T) {
	port := freeTCPPort(t)
	s := stack.New(t, stack.Settings{"COMPOSE_FILE": revocationFile, "REVOCATION_PORT": port, "SSH_HOST_MIN_LIFETIME": "5s"})
	s.Up()
	client := s.Client()
	client.Write("/tmp/admin", s.Get("PROVISIONER_PASSWORD"))
	client.Write("/tmp/ssh-host-jwk", s.Get("SSH_HOST_PROVISIONER_PASSWORD"))
	client.Shell("useradd --create-home deploy; mkdir -p /run/sshd").OK(t)
	client.Run("step", "ca", "bootstrap", "--ca-url", s.URL(), "--fingerprint", strings.TrimSpace(client.Read("/trust/fingerprint"))).OK(t)

	// Of an option that is given twice, ssh takes the first.
	login := func(options, user string) stack.Result {
		return client.Shell("ssh " + options + strict + " -i /tmp/deploy " + user + "@" + stack.ClientName + " id -un")
	}
	requireLogin := func(t *testing.T) {
		t.Helper()
		require.Equal(t, "deploy\n", login("", "deploy").OK(t).Stdout)
	}
	certificate := func(name string) string {
		return "step ssh certificate deploy /tmp/" + name + " --force --no-agent --no-password --insecure"
	}
	// start starts sshd, or makes it start anew, and waits until it listens.
	start := func(t *testing.T, how string) {
		t.Helper()
		client.Shell(`count() { grep -cs 'Server listening on 0.0.0.0' /tmp/sshd.log || true; }
			before=$(count); ` + how + `
			for _ in {1..100}; do (( $(count) > ${before:-0} )) && exit 0; sleep 0.1; done; exit 1`).OK(t)
	}
	const reload = "kill -HUP $(cat /run/sshd.pid)"

	t.Run("a host gets its certificate with a one-time token, and everybody knows it", func(t *testing.T) {
		// Whose certificate it becomes is for the token to say, not for the request.
		enrol := "step ssh certificate --host --sign --force --principal another.e2e.test --token $(cat /tmp/token) " +
			stack.ClientName + " " + hostKey + ".pub"
		client.Shell(hostToken + " >/tmp/token && " + enrol).OK(t)
		require.Contains(t, printed(t, client, hostCert, "Type"), "host certificate")
		require.Equal(t, stack.ClientName, printed(t, client, hostCert, "Principals"))
		require.Equal(t, 720*time.Hour+time.Minute, validity(t, client, hostCert))
		requireRefused(t, s, "token already used", func() stack.Result { return client.Shell(enrol) })

		client.Run("step", "ssh", "config", "--host", "--set", "Key=ssh_host_ecdsa_key", "--set", "Certificate=ssh_host_ecdsa_key-cert.pub").OK(t)
		start(t, "/usr/sbin/sshd -E /tmp/sshd.log")
		client.Shell(certificate("deploy") + byAdmin).OK(t)
		require.Contains(t, printed(t, client, "/tmp/deploy-cert.pub", "Type"), "user certificate")
		requireLogin(t)

		unknown := login("-o UserKnownHostsFile=/dev/null", "deploy").Exits(t, 255)
		require.Contains(t, unknown.Stderr, "Host key verification failed", "without the CA's key the host was known too")
		other := login("-o HostKeyAlias=another.e2e.test", "deploy").Exits(t, 255)
		require.Contains(t, other.Stderr, "Certificate invalid: name is not a listed principal")
	})

	t.Run("what step ssh config installs does the same", func(t *testing.T) {
		out := client.Run("ssh-agent", "bash", "-euc", "step ssh login deploy"+byAdmin+" && step ssh config && "+
			"ssh -o BatchMode=yes -o StrictHostKeyChecking=yes "+stack.ClientName+" id -un").OK(t)
		require.Regexp(t, `(?m)^deploy$`, out.Stdout)
		require.NotContains(t, client.Shell("ls ~/.ssh").OK(t).Stdout, "known_hosts", "a host key was noted")
	})

	t.Run("a person is who the certificate says", func(t *testing.T) {
		refused := login("", "root").Exits(t, 255)
		require.Contains(t, refused.Stderr, "Permission denied")
		require.Contains(t, client.Read("/tmp/sshd.log"), "Certificate invalid: name is not a listed principal")
	})

	t.Run("the key of ssh-host-jwk signs first certificates of hosts and does nothing else", func(t *testing.T) {
		client.Shell("step ca certificate tls.e2e.test /tmp/tls.crt /tmp/tls.key --force" + byAdmin).OK(t)
		tls := certificates(t, client.Read("/tmp/tls.crt"))[0].SerialNumber.String()
		user, host := printed(t, client, "/tmp/deploy-cert.pub", "Serial"), printed(t, client, hostCert, "Serial")
		sshRevoke := func(serial string) string {
			return "step ssh revoke " + serial + " --token $(step ca token " + serial + " --ssh --revoke" + byHostJWK + ")"
		}
		const only, never = "ssh-host-jwk gives SSH host certificates only", "ssh-host-jwk may not revoke"
		for name, tc := range map[string]struct{ command, reason string }{
			"a user certificate":              {certificate("no") + byHostJWK, only},
			"a TLS certificate":               {"step ca certificate no.e2e.test /tmp/no.crt /tmp/no.key --force" + byHostJWK, only},
			"revoking a person's certificate": {sshRevoke(user), never},
			"revoking a host's":               {sshRevoke(host), never},
			"revoking a TLS certificate":      {"step ca revoke " + tls + " --token $(step ca token " + tls + " --revoke" + byHostJWK + ")", never},
		} {
			t.Run(name, func(t *testing.T) {
				requireRefused(t, s, tc.reason, func() stack.Result { return client.Shell(tc.command) })
			})
		}
		client.Run("step", "ca", "renew", "--force", "/tmp/tls.crt", "/tmp/tls.key").OK(t)
		require.Equal(t, "0", s.SQL("select count(*) from revoked_ssh_certs"))
	})

	serve := func(t *testing.T) {
		t.Helper()
		start(t, reload)
		require.Contains(t, login("-v", "deploy").OK(t).Stderr, "serial "+printed(t, client, hostCert, "Serial")+" ID")
	}
	const renew, rekey = "step ssh renew --force ", "step ssh rekey --force --no-password --insecure "

	t.Run("a host renews its certificate and changes its key by itself", func(t *testing.T) {
		// Exit code 1: nothing to do before two thirds of its life are over.
		client.Run("step", "ssh", "needs-renewal", hostCert).Exits(t, 1)
		serial, key := printed(t, client, hostCert, "Serial"), printed(t, client, hostCert, "Public key")

		client.Shell(renew + hostCert + " " + hostKey).OK(t)
		require.NotEqual(t, serial, printed(t, client, hostCert, "Serial"))
		require.Equal(t, key, printed(t, client, hostCert, "Public key"))
		serve(t)

		client.Shell(rekey + hostCert + " " + hostKey).OK(t)
		require.NotEqual(t, key, printed(t, client, hostCert, "Public key"))
		require.Equal(t, stack.ClientName, printed(t, client, hostCert, "Principals"))
		serve(t)
	})

	t.Run("a person logs in anew instead", func(t *testing.T) {
		for _, command := range []string{renew, rekey} {
			requireRefused(t, s, "sshpop certificate must be a host ssh certificate", func() stack.Result {
				return client.Shell(command + "/tmp/deploy-cert.pub /tmp/deploy")
			})
		}
		requireLogin(t)
	})

	t.Run("with an expired certificate a host is unknown until it is enrolled again", func(t *testing.T) {
		// With a second name: the request has to repeat what the token says.
		const names = " --principal " + stack.ClientName + " --principal alias.e2e.test"
		enrol := "step ssh certificate " + stack.ClientName + " " + hostKey + ".pub --host --sign --force" + names +
			" --token $(" + hostToken + names + ")"
		client.Shell(enrol + " --not-after 6s").OK(t)
		serve(t)
		// Of its 66 seconds 60 are those that step-ca allows for clocks that are behind.
		client.Run("step", "ssh", "needs-renewal", hostCert).OK(t)

		require.Eventually(t, func() bool {
			return strings.Contains(login("", "deploy").Stderr, "Certificate invalid: expired")
		}, 15*time.Second, time.Second)
		for command, reason := range map[string]string{renew: "certificate has expired", rekey: "validBefore is in the past"} {
			requireRefused(t, s, reason, func() stack.Result { return client.Shell(command + hostCert + " " + hostKey) })
		}

		client.Shell(enrol).OK(t)
		serve(t)
		login("-o HostKeyAlias=alias.e2e.test", "deploy").OK(t)
	})

	t.Run("who is on the KRL is refused, person or host", func(t *testing.T) {
		// As a timer does it: whole or not at all, since sshd lets nobody in without the list.
		script := regexp.MustCompile("(?s)```sh\n(#!/bin/sh -e\n# /usr/local/sbin/fetch-krl\n.*?)```").FindStringSubmatch(checkedIn(t, "README.md"))
		require.NotNil(t, script)
		client.Write("/usr/local/sbin/fetch-krl", strings.ReplaceAll(script[1], "ca.internal:9080", net.JoinHostPort(stack.Domain, port)))
		const fetch = "sh -e /usr/local/sbin/fetch-krl"
		client.Shell(fetch + " && echo RevokedKeys /etc/ssh/revoked.krl >/etc/ssh/sshd_config.d/krl.conf").OK(t)
		start(t, reload)
		requireLogin(t)
		const hosts = "-o RevokedHostKeys=/etc/ssh/revoked.krl"
		login(hosts, "deploy").OK(t)

		client.Shell(certificate("other") + byAdmin).OK(t)
		for _, file := range []string{"/tmp/deploy-cert.pub", hostCert} {
			s.Compose("run", "--rm", "--no-deps", "-T", "pkictl", "revoke", "--serial", printed(t, client, file, "Serial"), "--apply").OK(t)
		}
		requireRefused(t, s, "certificate has been revoked", func() stack.Result { return client.Shell(renew + hostCert + " " + hostKey) })

		var person, host stack.Result
		require.Eventually(t, func() bool {
			fetched := client.Shell(fetch)
			person, host = login("", "deploy"), login(hosts, "deploy")
			return fetched.Code == 0 && person.Code != 0 && strings.Contains(host.Stderr, "revoked")
		}, time.Minute, time.Second)
		require.Contains(t, person.Stderr, "Permission denied")
		require.Contains(t, client.Read("/tmp/sshd.log"), "revoked")
		require.Contains(t, host.Stderr, "Host key verification failed")

		// The account is not what was revoked.
		client.Shell("mv /tmp/other /tmp/deploy; mv /tmp/other-cert.pub /tmp/deploy-cert.pub").OK(t)
		requireLogin(t)
	})
}

// validity is for how long an SSH certificate is good, backdating included.
func validity(t *testing.T, client *stack.Client, file string) time.Duration {
	t.Helper()
	var from, to string
	_, err := fmt.Sscanf(printed(t, client, file, "Valid"), "from %s to %s", &from, &to)
	require.NoError(t, err)
	begin, err := time.Parse("2006-01-02T15:04:05", from)
	require.NoError(t, err)
	end, err := time.Parse("2006-01-02T15:04:05", to)
	require.NoError(t, err)
	return end.Sub(begin)
}
