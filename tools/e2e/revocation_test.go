package e2e_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

const revocationFile = "docker-compose.yml:step-ca/revocation.yml"

// Revocations that come to another step-ca than the service crl are on the CRL when
// that one renews it, once a minute, and are published in the next round of ten seconds.
const onTheList = 90 * time.Second

func withRevocation(t *testing.T) *types.Project {
	t.Helper()
	return load(t, filepath.Join(stack.Repository(), "docker-compose.yml"), filepath.Join(stack.Repository(), "step-ca", "revocation.yml"))
}

func TestContractOfRevocation(t *testing.T) {
	without, with := compose(t), withRevocation(t)
	ca, crl, export := with.Services["step-ca"], with.Services["crl"], with.Services["revocation-export"]

	rules := map[string]struct{ want, got any }{
		"step-ca is as it is without":             {without.Services["step-ca"], ca},
		"the CRL's step-ca has the same image":    {ca.Image, crl.Image},
		"the same secrets":                        {ca.Secrets, crl.Secrets},
		"the same volumes":                        {ca.Volumes, crl.Volumes},
		"the same networks":                       {ca.Networks, crl.Networks},
		"the same capabilities":                   {[][]string{ca.CapAdd, ca.CapDrop, ca.SecurityOpt}, [][]string{crl.CapAdd, crl.CapDrop, crl.SecurityOpt}},
		"the same limits":                         {[]int64{int64(ca.MemLimit), ca.PidsLimit}, []int64{int64(crl.MemLimit), crl.PidsLimit}},
		"the same health check":                   {ca.HealthCheck, crl.HealthCheck},
		"the same end":                            {ca.StopSignal, crl.StopSignal},
		"and waits for the same":                  {ca.DependsOn, crl.DependsOn},
		"but for its own configuration":           {append(ca.Command[:len(ca.Command)-1:len(ca.Command)-1], "/home/step/config/crl.json"), crl.Command},
		"the exporter is confined":                {[][]string{{"ALL"}, {"no-new-privileges:true"}, nil}, [][]string{export.CapDrop, export.SecurityOpt, export.CapAdd}},
		"it runs as step-ca does":                 {ca.User, export.User},
		"it gets one secret":                      {"[{step_ca_db_password /run/secrets/step_ca_db_password}]", secretsOf(export)},
		"it is bounded":                           {true, export.MemLimit > 0 && export.PidsLimit > 0 && export.Logging != nil},
		"it comes back":                           {types.RestartPolicyAlways, export.Restart},
		"both publish nothing":                    {0, len(crl.Ports) + len(export.Ports)},
		"caddy publishes one port more":           {[]string{"0.0.0.0:9000->9000", "0.0.0.0:9080->9080"}, portsOf(with.Services["caddy"])},
		"and without this file the one port":      {[]string{"0.0.0.0:9000->9000"}, portsOf(without.Services["caddy"])},
		"without this file there is no such port": {false, strings.Contains(fmt.Sprint(without.Services["provisioner-init"].Environment), "REVOCATION_PORT")},
	}
	for rule, r := range rules {
		t.Run(rule, func(t *testing.T) { require.Equal(t, r.want, r.got) })
	}
	for _, v := range with.Services["caddy"].Volumes {
		require.True(t, v.ReadOnly, "the edge writes to %s", v.Target)
	}
}

func secretsOf(s types.ServiceConfig) string {
	var found []string
	for _, secret := range s.Secrets {
		found = append(found, fmt.Sprintf("{%s %s}", secret.Source, secret.Target))
	}
	return "[" + strings.Join(found, " ") + "]"
}

func portsOf(s types.ServiceConfig) (found []string) {
	for _, p := range s.Ports {
		found = append(found, fmt.Sprintf("%s:%s->%d", p.HostIP, p.Published, p.Target))
	}
	return found
}

// revocationStack is a stack that publishes CRL and KRL.
type revocationStack struct {
	*stack.Stack
	client *stack.Client
	plain  string // http://NAME:PORT
	port   string
}

func newRevocationStack(t *testing.T) *revocationStack {
	t.Helper()
	port := freeTCPPort(t)
	s := stack.New(t, stack.Settings{"COMPOSE_FILE": revocationFile, "REVOCATION_PORT": port})
	s.Up()
	return &revocationStack{Stack: s, client: s.Client(), plain: "http://" + net.JoinHostPort(stack.Domain, port), port: port}
}

func freeTCPPort(t *testing.T) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp4", "0.0.0.0:0")
	require.NoError(t, err)
	defer l.Close() //nolint:errcheck // nobody connected
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

func TestWhatIsRevokedIsOnTheLists(t *testing.T) {
	s := newRevocationStack(t)
	// No subtests: a failure of the stack belongs to the test that it was made for.
	part := func(what string, do func()) {
		t.Log(what)
		do()
	}
	s.client.Write("/tmp/password", s.Get("PROVISIONER_PASSWORD"))

	s.issue(t, "one")
	s.issue(t, "two")
	one, two := certificates(t, s.client.Read("/tmp/one.crt"))[0], certificates(t, s.client.Read("/tmp/two.crt"))[0]

	part("a leaf says where the CRL is, and the list says the same of itself", func() {
		require.Equal(t, []string{s.plain + "/crl"}, one.CRLDistributionPoints)
		s.takeCRL(t)
		text := s.client.Run("openssl", "crl", "-in", "/tmp/crl.pem", "-noout", "-text").OK(t).Stdout
		require.Contains(t, text, "X509v3 Issuing Distribution Point: critical")
		require.Contains(t, text, "URI:"+s.plain+"/crl")
	})

	part("pkictl shows first, and revokes with --apply", func() {
		revoke := []string{"run", "--rm", "-T", "pkictl", "revoke", "--reason", "keyCompromise", "--serial", one.SerialNumber.String()}
		s.Compose(revoke...).OK(t)
		require.Empty(t, s.SQL("select nkey from revoked_x509_certs"), "a dry run changes nothing")
		s.Compose(append(revoke, "--apply")...).OK(t)
		require.Equal(t, "1", s.SQL("select count(*) from revoked_x509_certs"))
		s.eventually(t, onTheList, func() bool { return s.listed(t, one) })
		require.False(t, s.listed(t, two))
	})

	part("openssl refuses the one and takes the other", func() {
		s.takeCRL(t)
		verify := func(file string) stack.Result {
			return s.client.Run("openssl", "verify", "-crl_check", "-CAfile", "/trust/root_ca.crt",
				"-untrusted", file, "-CRLfile", "/tmp/crl.pem", file)
		}
		verify("/tmp/two.crt").OK(t)
		refused := verify("/tmp/one.crt")
		require.NotZero(t, refused.Code)
		require.Contains(t, refused.Output(), "certificate revoked")
	})

	part("it is renewed no more", func() {
		requireRefused(t, s.Stack, "certificate has been revoked", func() stack.Result {
			return s.client.Run("step", "ca", "renew", "--force", "--ca-url", s.URL(), "--root", "/trust/root_ca.crt", "/tmp/one.crt", "/tmp/one.key")
		})
	})

	part("a certificate that its owner revokes by ACME", func() {
		certbot := "REQUESTS_CA_BUNDLE=/trust/root_ca.crt certbot --server " + s.URL() + "/acme/acme/directory --non-interactive "
		s.client.Shell(certbot + "certonly --standalone --agree-tos --register-unsafely-without-email -d " + stack.ClientName).OK(t)
		dir := "/etc/letsencrypt/live/" + stack.ClientName
		acme := certificates(t, s.client.Read(dir+"/fullchain.pem"))[0]
		require.Equal(t, []string{s.plain + "/crl"}, acme.CRLDistributionPoints)
		s.client.Shell(certbot + "revoke --no-delete-after-revoke --reason superseded --cert-path " + dir + "/fullchain.pem").OK(t)
		s.eventually(t, onTheList, func() bool { return s.listed(t, acme) })
	})

	part("an SSH certificate, which OpenSSH then refuses", func() {
		for _, name := range []string{"alice", "bob"} {
			s.client.Run("step", "ssh", "certificate", name, "/tmp/"+name, "--no-password", "--insecure", "--force", "--no-agent",
				"--provisioner", "admin", "--provisioner-password-file", "/tmp/password",
				"--ca-url", s.URL(), "--root", "/trust/root_ca.crt").OK(t)
		}
		query := func(name string) stack.Result {
			s.client.Run("curl", "-fsS", "-o", "/tmp/krl", s.plain+"/krl").OK(t)
			return s.client.Run("ssh-keygen", "-Q", "-f", "/tmp/krl", "/tmp/"+name+"-cert.pub")
		}
		query("alice").OK(t)
		text := s.client.Run("ssh-keygen", "-L", "-f", "/tmp/alice-cert.pub").OK(t).Stdout
		_, serial, ok := strings.Cut(text, "Serial: ")
		require.True(t, ok, text)
		serial, _, _ = strings.Cut(serial, "\n")
		s.Compose("run", "--rm", "-T", "pkictl", "revoke", "--serial", serial, "--apply").OK(t)
		s.eventually(t, time.Minute, func() bool { return query("alice").Code != 0 })
		require.Contains(t, query("alice").Output(), "REVOKED")
		query("bob").OK(t)
	})

	part("the service crl is a CA of its own name, the others have no CRL", func() {
		get := func(name, path string) stack.Result {
			return s.client.Run("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", "/trust/root_ca.crt",
				"--connect-to", "::"+net.JoinHostPort(stack.Domain, strconv.Itoa(s.Port)), "https://"+name+path).OK(t)
		}
		require.Equal(t, "200", get("crl."+stack.Domain, "/1.0/crl").Stdout)
		require.Equal(t, "404", get(stack.Domain, "/1.0/crl").Stdout)
		require.Equal(t, "404", get(stack.Domain, "/crl").Stdout)
		require.Equal(t, "200", get(stack.Domain, "/health").Stdout)
	})

	part("an address that is not admitted gets no byte", func() {
		host := stack.NewHost(t)
		conn, err := host.Dial(t.Context(), "tcp", net.JoinHostPort(host.Router.String(), s.port))
		require.NoError(t, err)
		defer conn.Close() //nolint:errcheck // closed by the edge
		require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		_, _ = io.WriteString(conn, "GET /crl HTTP/1.1\r\nHost: ca\r\n\r\n") // may meet the closed connection
		n, err := conn.Read(make([]byte, 1))
		require.Zero(t, n)
		require.Error(t, err)
		require.NotErrorIs(t, err, context.DeadlineExceeded)
		requireDenials(t, s.Stack, conn.LocalAddr().String())
		require.Equal(t, http.StatusOK, s.status(t, "/crl"), "this machine is admitted")
	})

	part("a reload keeps the CRL's step-ca, its listeners and its list", func() {
		before, containers := s.takeCRL(t), s.Containers()
		s.Change(t, stack.Settings{"TLS_DEFAULT_LIFETIME": "23h"})
		t.Cleanup(func() { s.Make("init").OK(t) })
		said := s.Make("init").OK(t)
		require.Contains(t, said.Output(), "crl: reloaded")
		requireSameProcesses(t, containers, s.Containers())
		s.eventually(t, onTheList, func() bool { return s.takeCRL(t).Number.Cmp(before.Number) > 0 })
		require.Len(t, s.takeCRL(t).RevokedCertificateEntries, len(before.RevokedCertificateEntries))
	})

	part("the lists are served while the CA that makes them is down", func() {
		s.Compose("kill", "crl").OK(t)
		before := s.takeCRL(t)
		time.Sleep(12 * time.Second) // longer than a round
		require.Equal(t, before.Raw, s.takeCRL(t).Raw)
		require.Equal(t, http.StatusOK, s.status(t, "/krl"))
		requireServed(t, s.Stack, locally(s.Address()))

		requireNoCRLService(t, s.Stack)

		s.Compose("up", "-d", "--wait").OK(t)
		s.eventually(t, onTheList, func() bool { return s.takeCRL(t).Number.Cmp(before.Number) > 0 })
	})

	part("nobody but the edge is reached from outside", func() {
		for name, c := range s.Containers() {
			if name != "caddy" {
				require.Empty(t, stack.Docker(t, "port", c.ID).OK(t).Stdout, name)
			}
		}
	})

	part("it ends when it is told to", func() {
		s.Compose("stop", "revocation-export").OK(t)
		require.Zero(t, s.Containers()["revocation-export"].State.ExitCode)
	})
}

func TestWithoutTheRevocationFileItsNamesLeadNowhere(t *testing.T) {
	s := stack.Shared(t)
	requireNoCRLService(t, s)
	require.NotContains(t, s.Containers(), "crl")
}

// requireNoCRLService demands that a connection to the service's name ends soon, and
// holds up nobody else.
func requireNoCRLService(t *testing.T, s *stack.Stack) {
	t.Helper()
	conn, err := locally(s.Address())(t.Context())
	require.NoError(t, err)
	defer conn.Close() //nolint:errcheck // closed by the edge
	require.NoError(t, conn.SetDeadline(time.Now().Add(30*time.Second)))
	begin := time.Now()
	closed := make(chan error, 1)
	go func() {
		closed <- tls.Client(conn, &tls.Config{ServerName: "crl." + stack.Domain, MinVersion: tls.VersionTLS12}).
			HandshakeContext(context.WithoutCancel(t.Context()))
	}()
	requireServed(t, s, locally(s.Address()))
	err = <-closed
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
	t.Logf("closed after %s", time.Since(begin).Round(time.Second))
}

// issue gets a TLS certificate for NAME.e2e.test into /tmp/NAME.crt of the client.
func (s *revocationStack) issue(t *testing.T, name string) {
	t.Helper()
	s.client.Run("step", "ca", "certificate", name+".e2e.test", "/tmp/"+name+".crt", "/tmp/"+name+".key", "--force",
		"--provisioner", "admin", "--provisioner-password-file", "/tmp/password",
		"--ca-url", s.URL(), "--root", "/trust/root_ca.crt").OK(t)
}

// takeCRL takes the CRL as a relying party does, and leaves it in /tmp/crl.pem of the client.
func (s *revocationStack) takeCRL(t *testing.T) *x509.RevocationList {
	t.Helper()
	s.client.Shell("curl -fsS -o /tmp/crl.der " + s.plain + "/crl && openssl crl -inform DER -in /tmp/crl.der -out /tmp/crl.pem").OK(t)
	block, _ := pem.Decode([]byte(s.client.Read("/tmp/crl.pem")))
	require.NotNil(t, block)
	list, err := x509.ParseRevocationList(block.Bytes)
	require.NoError(t, err)
	return list
}

func (s *revocationStack) listed(t *testing.T, cert *x509.Certificate) bool {
	t.Helper()
	for _, e := range s.takeCRL(t).RevokedCertificateEntries {
		if e.SerialNumber.Cmp(cert.SerialNumber) == 0 {
			return true
		}
	}
	return false
}

func (s *revocationStack) status(t *testing.T, path string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+net.JoinHostPort("127.0.0.1", s.port)+path, http.NoBody)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	return resp.StatusCode
}

func (s *revocationStack) eventually(t *testing.T, within time.Duration, done func() bool) {
	t.Helper()
	begin := time.Now()
	for !done() {
		require.Less(t, time.Since(begin), within, "not in time")
		time.Sleep(time.Second)
	}
	t.Logf("after %s", time.Since(begin).Round(time.Second))
}
