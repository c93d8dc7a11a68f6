package e2e_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// requireOpenSSL demands that openssl agrees that a chain file is good for a name.
func requireOpenSSL(t *testing.T, client *stack.Client, file, name string) {
	t.Helper()
	out := client.Run("openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", name,
		"-CAfile", "/trust/root_ca.crt", "-untrusted", file, file).OK(t)
	require.Contains(t, out.Stdout, file+": OK")
}

// requireRefused demands that a client failed, and that it or step-ca's log gives the reason.
func requireRefused(t *testing.T, s *stack.Stack, reason string, run func() stack.Result) {
	t.Helper()
	begin := time.Now()
	out := run()
	require.NotZero(t, out.Code, "was not refused: %s", out)
	log := s.Compose("logs", "--no-log-prefix", "--since", begin.Format(time.RFC3339Nano), "step-ca").OK(t)
	require.Contains(t, out.Output()+log.Output(), reason)
}

func TestTheStepCLIGetsACertificateAndRenewsIt(t *testing.T) {
	s := stack.Shared(t)
	client := s.Client()
	client.Write("/tmp/password", s.Get("PROVISIONER_PASSWORD"))
	ca := []string{"--ca-url", s.URL(), "--root", "/trust/root_ca.crt"}
	step := func(args ...string) {
		t.Helper()
		client.Run(append(append([]string{"step", "ca"}, args...), ca...)...).OK(t)
	}

	step("certificate", "jwk.e2e.test", "/tmp/jwk.crt", "/tmp/jwk.key", "--force",
		"--provisioner", "admin", "--provisioner-password-file", "/tmp/password")
	requireOpenSSL(t, client, "/tmp/jwk.crt", "jwk.e2e.test")
	first := certificates(t, client.Read("/tmp/jwk.crt"))
	require.Len(t, first, 2, "leaf and intermediate")

	// Over mTLS: Caddy has to pass the client's certificate through to step-ca.
	step("renew", "/tmp/jwk.crt", "/tmp/jwk.key", "--force")
	requireOpenSSL(t, client, "/tmp/jwk.crt", "jwk.e2e.test")
	second := certificates(t, client.Read("/tmp/jwk.crt"))
	require.NotEqual(t, serials(first)[0], serials(second)[0])
	require.Equal(t, first[0].PublicKey, second[0].PublicKey)

	wrong := client.Shell("step ca certificate no.e2e.test /tmp/no.crt /tmp/no.key --provisioner admin" +
		" --provisioner-password-file <(echo wrong) " + strings.Join(ca, " "))
	require.NotZero(t, wrong.Code, "a wrong password got a certificate")
}

func TestTheTrustBundleIsWhatTheCAServes(t *testing.T) {
	s := stack.Shared(t)
	client := s.Client()
	client.Shell("cd /trust && sha256sum --check --strict --quiet SHA256SUMS").OK(t)
	listed := strings.Fields(client.Shell("cd /trust && ls").OK(t).Stdout)
	require.ElementsMatch(t, []string{
		"SHA256SUMS", "fingerprint", "known_hosts", "root_ca.crt", "root_ca.der", "roots.pem",
		"ssh_host_ca.pub", "ssh_user_ca.pub", "truststore.p12",
	}, listed)

	fingerprint := strings.TrimSpace(client.Read("/trust/fingerprint"))
	require.Equal(t, fingerprint, strings.TrimSpace(client.Run("step", "certificate", "fingerprint", "/trust/root_ca.crt").OK(t).Stdout))
	// A new client trusts on the strength of the fingerprint alone.
	client.Run("step", "ca", "bootstrap", "--force", "--ca-url", s.URL(), "--fingerprint", fingerprint).OK(t)
	client.Run("step", "ca", "health").OK(t)
	served := client.Run("curl", "-fsS", "--cacert", "/trust/root_ca.crt", s.URL()+"/roots.pem").OK(t)
	require.Equal(t, strings.TrimSpace(client.Read("/trust/roots.pem")), strings.TrimSpace(served.Stdout))

	client.Shell("openssl x509 -inform der -in /trust/root_ca.der | diff - <(openssl x509 -in /trust/root_ca.crt)").OK(t)
	for _, file := range []string{"ssh_host_ca.pub", "ssh_user_ca.pub"} {
		client.Run("ssh-keygen", "-l", "-f", "/trust/"+file).OK(t)
	}
	known := client.Read("/trust/known_hosts")
	require.True(t, strings.HasPrefix(known, "@cert-authority "), known)
	require.Contains(t, known, strings.Fields(client.Read("/trust/ssh_host_ca.pub"))[1])
}
