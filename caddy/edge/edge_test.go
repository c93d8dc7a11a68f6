package edge

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	_ "github.com/mholt/caddy-l4"
	"github.com/stretchr/testify/require"
)

// asCaddy makes the test binary be Caddy: the same main function and modules
// that xcaddy links, in a process of its own, without a second build.
const asCaddy = "EDGE_TEST_AS_CADDY"

// nameserverVar gives that process a name server of the test.
const nameserverVar = "EDGE_TEST_NAMESERVER"

func TestMain(m *testing.M) {
	if os.Getenv(asCaddy) != "" {
		if addr := os.Getenv(nameserverVar); addr != "" {
			net.DefaultResolver = resolverAt(addr)
		}
		caddycmd.Main()
		return
	}
	os.Exit(m.Run())
}

// The clients' addresses. All of 127.0.0.0/8 is local on Linux, so a test
// needs no privilege to come from different addresses.
const (
	insider   = "127.0.0.2"
	outsider  = "127.0.0.3"
	allowList = "remote_ip 127.0.0.2 192.0.2.0/24\n"
)

func TestCaddyfileIsValidOnlyWithAnAllowList(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		allow   string
		problem string
	}{
		"addresses and networks": {allow: "remote_ip 10.0.0.0/8 192.0.2.7 2001:db8::/32\n"},
		"no line break at the end of the file": {
			allow: "remote_ip 10.0.0.0/8",
		},
		"an empty file":            {allow: "", problem: "the allow-list is empty"},
		"a file with a blank line": {allow: "\n", problem: "the allow-list is empty"},
		"a file with a comment":    {allow: "# remote_ip 10.0.0.0/8\n", problem: "the allow-list is empty"},
		"a line without ranges":    {allow: "remote_ip\n", problem: "remote_ip without a range"},
		"a second line":            {allow: "remote_ip 10.0.0.1\nremote_ip 10.0.0.2\n", problem: "a second remote_ip line"},
		"another matcher":          {allow: "remote_ip 10.0.0.1\ntls\n", problem: `unexpected \"tls\" in the allow-list`},
		"a block that opens":       {allow: "remote_ip 10.0.0.1 {\n", problem: "unexpected EOF"},
		"a block that closes":      {allow: "remote_ip 10.0.0.1\n}\nroute {\n close\n", problem: "module not registered: layer4.matchers.route"},
		"a host name":              {allow: "remote_ip ca.example.org\n", problem: "ca.example.org"},
		"a prefix too long":        {allow: "remote_ip 10.0.0.0/33\n", problem: "10.0.0.0/33"},
		"commas":                   {allow: "remote_ip 10.0.0.0/8,10.1.0.0/16\n", problem: "10.0.0.0/8,10.1.0.0/16"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEdge(t, nil, "127.0.0.1:1", tc.allow)
			out, err := e.caddy(t, "validate", "--config", e.caddyfile, "--adapter", "caddyfile")
			if tc.problem == "" {
				require.NoError(t, err, out)
				return
			}
			require.Error(t, err, out)
			require.Contains(t, out, tc.problem)
		})
	}

	t.Run("no file", func(t *testing.T) {
		t.Parallel()
		e := newEdge(t, nil, "127.0.0.1:1", allowList)
		require.NoError(t, os.Remove(e.allowList))
		out, err := e.caddy(t, "validate", "--config", e.caddyfile, "--adapter", "caddyfile")
		require.Error(t, err, out)
		require.Contains(t, out, "File to import not found")
	})
}

func TestRunningEdgeKeepsItsAllowListWhenAReloadIsRefused(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, allowList)
	e.run(t)

	write(t, e.allowList, "")
	out, err := e.reload(t)
	require.Error(t, err, out)
	require.Equal(t, "client of the test", e.whoami(t, insider, ca), "the old list still admits")
	e.requireRefused(t, outsider, nil)

	write(t, e.allowList, "remote_ip "+outsider+"\n")
	out, err = e.reload(t)
	require.NoError(t, err, out)
	require.Equal(t, "client of the test", e.whoami(t, outsider, ca), "the new list admits")
	e.requireRefused(t, insider, nil)
}

func TestOutsiderGetsNoByteAndALineInTheLog(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, allowList)
	e.run(t)

	hello := recordHello(t)
	for name, tc := range map[string]struct {
		from string
		send []byte
	}{
		"silent":               {from: outsider},
		"with a ClientHello":   {from: "127.0.0.4", send: hello},
		"with a GET in plain":  {from: "127.0.0.5", send: []byte("GET /health HTTP/1.1\r\n\r\n")},
		"with 64 KiB of noise": {from: "127.0.0.6", send: bytes.Repeat([]byte{0x16}, 1<<16)},
		"over IPv6":            {from: "::1", send: hello},
	} {
		t.Run(name, func(t *testing.T) {
			local := e.requireRefused(t, tc.from, tc.send)
			e.waitForLog(t, `"decision":"denied","remote":"`+local+`"`)
		})
	}
	up.requireNotDialled(t)
}

func TestClientThatIsNotTLSGetsNoByteAndALineInTheLog(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, allowList)
	e.run(t)

	local := e.requireRefused(t, insider, []byte("GET /health HTTP/1.1\r\n\r\n"))
	e.waitForLog(t, `"decision":"not-tls","remote":"`+local+`"`)
	up.requireNotDialled(t)
}

func TestAdmittedClientMayBeSlowWithItsClientHello(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, allowList)
	e.run(t)

	// In small pieces, so that neither route behind the allow-list may decide
	// on the first one.
	conn := e.dial(t, insider)
	hello := recordHello(t)
	for i, piece := range [][]byte{hello[:1], hello[1:5], hello[5:40], hello[40:]} {
		if i > 0 {
			time.Sleep(50 * time.Millisecond)
		}
		_, err := conn.Write(piece)
		require.NoError(t, err)
	}
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(5*time.Second)))
	answer := make([]byte, 1)
	_, err := io.ReadFull(conn, answer)
	require.NoError(t, err)
	require.Equal(t, byte(0x16), answer[0], "the first byte of a ServerHello")
}

func TestAdmittedClientHasMutualTLSWithTheCA(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, allowList)
	e.run(t)
	require.Equal(t, "client of the test", e.whoami(t, insider, ca))
	e.waitForLog(t, `"decision":"admitted","remote":"`+insider+":")
}

func TestEdgeBridgesARestartOfTheCA(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	addr := "127.0.0.1:" + freePort(t)
	e := newEdge(t, ca, addr, allowList)
	e.run(t)

	server := ca.server(t, new(upstream))
	server.Addr = addr
	time.AfterFunc(time.Second, func() { _ = server.ListenAndServeTLS("", "") })
	require.Equal(t, "client of the test", e.whoami(t, insider, ca))
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	up := ca.serve(t)
	root, otherRoot := ca.rootFile(t), other.rootFile(t)
	healthy := newEdge(t, ca, up.addr, allowList)
	healthy.run(t)
	withoutDB := ca.serve(t)
	withoutDB.noDB.Store(true)
	noDatabase := newEdge(t, ca, withoutDB.addr, allowList)
	noDatabase.run(t)
	noDatabase.waitForLog(t, `"state":"alive"`)
	loopbackAdmitted := newEdge(t, ca, up.addr, "remote_ip 127.0.0.0/8\n")
	loopbackAdmitted.run(t)
	caDown := newEdge(t, ca, "127.0.0.1:"+freePort(t), "remote_ip 127.0.0.0/8\n")
	caDown.run(t)
	healthy.waitForLog(t, `"state":"ready"`)
	loopbackAdmitted.waitForLog(t, `"state":"ready"`)
	deaf := deafListener(t)
	notOK := ca.serveHTTP(t, http.NotFoundHandler())

	notPEM := filepath.Join(t.TempDir(), "root_ca.crt")
	require.NoError(t, os.WriteFile(notPEM, []byte("nothing\n"), 0o600))
	absent := filepath.Join(t.TempDir(), "root_ca.crt")
	free := "127.0.0.1:" + freePort(t)

	for name, tc := range map[string]struct {
		args []string
		want string // all that it prints, with * for what the kernel may word in two ways; nothing when healthy
	}{
		"all is well": {
			args: []string{"--edge", healthy.edge, "--probe", healthy.probe, "--root", root},
		},
		"all is well and the list admits loopback": {
			args: []string{"--edge", loopbackAdmitted.edge, "--probe", loopbackAdmitted.probe, "--root", root},
		},
		"the CA is down": {
			args: []string{"--edge", caDown.edge, "--probe", caDown.probe, "--root", root},
			want: "caddy healthcheck: error: reaching step-ca through " + caDown.probe + `: *` + "\n" +
				"caddy healthcheck: hint: step-ca is down or out of reach; see its log with: docker compose logs step-ca\n",
		},
		"the database is down": {
			args: []string{"--edge", noDatabase.edge, "--probe", noDatabase.probe, "--root", root, "--admin", "unix/" + noDatabase.admin},
			want: `caddy healthcheck: error: step-ca at 127.0.0.1 serves, but not from its database: database: /ssh/check-host answered "500 Internal Server Error"` + "\n" +
				"caddy healthcheck: hint: see whether the database runs, with: docker compose ps postgres pgbouncer\n",
		},
		"the edge knows no CA that serves": {
			args: []string{"--edge", caDown.edge, "--probe", healthy.probe, "--root", root, "--admin", "unix/" + caDown.admin},
			want: "caddy healthcheck: error: no step-ca is in service\n" +
				"caddy healthcheck: hint: caddy upstreams says why: docker compose exec caddy caddy upstreams\n",
		},
		"the CA hangs": {
			args: []string{"--edge", healthy.edge, "--probe", deaf, "--root", root, "--timeout", "300ms"},
			want: "caddy healthcheck: error: reaching step-ca through " + deaf + `: context deadline exceeded` + "\n" +
				"caddy healthcheck: hint: step-ca hangs, or the edge no longer accepts; see step-ca's log, then restart caddy\n",
		},
		"the CA is not ok": {
			args: []string{"--edge", healthy.edge, "--probe", notOK, "--root", root},
			want: "caddy healthcheck: error: reaching step-ca through " + notOK + `: /health answered "404 Not Found"` + "\n" +
				"caddy healthcheck: hint: see step-ca's log with: docker compose logs step-ca\n",
		},
		"the root is that of another CA": {
			args: []string{"--edge", healthy.edge, "--probe", healthy.probe, "--root", otherRoot},
			want: "caddy healthcheck: error: reaching step-ca through " + healthy.probe + `: tls: failed to verify certificate: x509: certificate signed by unknown authority` + "\n" +
				"caddy healthcheck: hint: the root certificate does not vouch for what step-ca presents; see: docker compose logs trust-export step-ca\n",
		},
		"the certificate has another name": {
			args: []string{"--edge", healthy.edge, "--probe", healthy.probe, "--root", root, "--server-name", "ca.example.org"},
			want: "caddy healthcheck: error: reaching step-ca through " + healthy.probe + `: tls: failed to verify certificate: x509: certificate is valid for localhost, not ca.example.org` + "\n" +
				"caddy healthcheck: hint: the root certificate does not vouch for what step-ca presents; see: docker compose logs trust-export step-ca\n",
		},
		"the root is missing": {
			args: []string{"--edge", healthy.edge, "--probe", healthy.probe, "--root", absent},
			want: "caddy healthcheck: error: reading root certificate: open " + absent + ": no such file or directory\n" +
				"caddy healthcheck: hint: trust-export writes this file; see its log with: docker compose logs trust-export\n",
		},
		"the root is no certificate": {
			args: []string{"--edge", healthy.edge, "--probe", healthy.probe, "--root", notPEM},
			want: "caddy healthcheck: error: reading root certificate: no certificate in " + strconv.Quote(notPEM) + "\n" +
				"caddy healthcheck: hint: trust-export writes this file; see its log with: docker compose logs trust-export\n",
		},
		"the accept loop of the edge is dead": {
			args: []string{"--edge", deaf, "--probe", healthy.probe, "--root", root, "--timeout", "1s"},
			want: "caddy healthcheck: error: waiting for an answer from the edge at " + deaf + ": context deadline exceeded\n" +
				"caddy healthcheck: hint: the edge accepts connections and serves none; if its log speaks of open files, raise its nofile limit or lower EDGE_MAX_CONNECTIONS\n",
		},
		"nothing listens at the probe": {
			args: []string{"--edge", healthy.edge, "--probe", free, "--root", root},
			want: "caddy healthcheck: error: reaching step-ca through " + free + ": dial tcp " + free + ": connect: connection refused\n" +
				"caddy healthcheck: hint: nothing listens there; see caddy's log with: docker compose logs caddy\n",
		},
		"the edge does not listen": {
			args: []string{"--edge", free, "--probe", healthy.probe, "--root", root},
			want: "caddy healthcheck: error: connecting to the edge: dial tcp " + free + ": connect: connection refused\n" +
				"caddy healthcheck: hint: nothing listens there; see caddy's log with: docker compose logs caddy\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, err := healthy.caddy(t, append([]string{"healthcheck", "--admin", "unix/" + healthy.admin}, tc.args...)...)
			before, after, _ := strings.Cut(tc.want, "*")
			require.True(t, strings.HasPrefix(out, before) && strings.HasSuffix(out, after), "want %q\ngot %q", tc.want, out)
			if before == tc.want {
				require.Equal(t, tc.want, out)
			}
			if tc.want == "" {
				require.NoError(t, err)
				return
			}
			require.Error(t, err)
			exit := new(exec.ExitError)
			require.ErrorAs(t, err, &exit)
			require.Equal(t, 1, exit.ExitCode(), "Docker reserves 2")
		})
	}

	t.Run("it leaves no line in the log", func(t *testing.T) {
		require.NotContains(t, healthy.log(), "denied")
	})

	t.Run("its help has an example", func(t *testing.T) {
		out, err := healthy.caddy(t, "healthcheck", "--help")
		require.NoError(t, err)
		require.Contains(t, out, "Examples:\n  caddy healthcheck --root /trust/root_ca.crt")
	})
}

// TestEdgeRecoversFromALackOfDescriptors is about what ends the accept loop of
// caddy-l4 for good.
func TestEdgeRecoversFromALackOfDescriptors(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, allowList)
	ctx := context.WithoutCancel(t.Context())
	cmd := e.command(ctx, "run", "--config", e.caddyfile, "--adapter", "caddyfile")
	shell := exec.CommandContext(ctx, "sh", append([]string{"-c", `ulimit -n 64 && exec "$0" "$@"`}, cmd.Args...)...)
	shell.Env = cmd.Env
	e.start(t, shell)

	for range 80 { // each is held while the edge waits for its ClientHello
		e.dial(t, insider)
	}
	e.waitForLog(t, "accepting connections; trying again")
	out, err := e.caddy(t, "healthcheck", "--edge", e.edge, "--probe", e.probe, "--admin", "unix/"+e.admin, "--root", e.root, "--timeout", "1s")
	require.Error(t, err, out)
	require.Eventually(t, func() bool {
		_, err := get(e.dial(t, insider), ca.clientConfig(t), "/whoami")
		return err == nil
	}, 10*time.Second, 100*time.Millisecond, "descriptors are free again")
}

// TestStockNegationAdmitsEverybody is the reason for edge_outside. Once it
// fails, caddy-l4 has learned to refuse an empty matcher set.
func TestStockNegationAdmitsEverybody(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, "")
	config, err := os.ReadFile(e.caddyfile)
	require.NoError(t, err)
	config = bytes.ReplaceAll(config, []byte("edge_outside {"), []byte("not {"))
	require.NoError(t, os.WriteFile(e.caddyfile, config, 0o600))
	e.run(t)
	require.Equal(t, "client of the test", e.whoami(t, outsider, ca))
}

// edge is one Caddy with the shipped Caddyfile.
type edge struct {
	caddyfile, allowList, limits, balancers, root, admin string // paths
	revocation                                           string // the directory of CRL and KRL, which is not there
	edge, probe                                          string // addresses as seen from 127.0.0.1
	port, plainPort, metricsPort                         string
	crl                                                  string // address of the step-ca that keeps the CRL
	nameserver                                           string // in place of the machine's own, where a test has one
	process                                              *os.Process
	stderr                                               lockedBuffer
}

// newEdge copies the shipped Caddyfile, with the paths, ports and the upstream
// of the container replaced by ones that a test may use. The root is that of ca,
// or missing.
func newEdge(t *testing.T, ca *authority, upstream, allow string) *edge {
	t.Helper()
	dir := t.TempDir()
	e := &edge{
		caddyfile:   filepath.Join(dir, "Caddyfile"),
		allowList:   filepath.Join(dir, "allow.caddy"),
		limits:      filepath.Join(dir, "limits.caddy"),
		balancers:   filepath.Join(dir, "balancers.caddy"),
		root:        filepath.Join(dir, "root_ca.crt"),
		admin:       filepath.Join(dir, "admin.sock"),
		revocation:  filepath.Join(dir, "revocation"),
		port:        freePort(t),
		plainPort:   freePort(t),
		metricsPort: freePort(t),
		crl:         "127.0.0.1:" + freePort(t),
	}
	files := freePort(t)
	e.edge, e.probe = "127.0.0.1:"+e.port, "127.0.0.1:"+freePort(t)

	shipped, err := os.ReadFile(filepath.Join("..", "Caddyfile"))
	require.NoError(t, err)
	config := string(shipped)
	for _, r := range []struct {
		old, with string
		times     int
	}{
		{"/etc/caddy/allow/allow.caddy", e.allowList, 3},
		{"/etc/caddy/allow/limits.caddy", e.limits, 2},
		{"/etc/caddy/allow/balancers.caddy", e.balancers, 1},
		{"/trust/root_ca.crt", e.root, 3},
		{"/run/edge/admin.sock", e.admin, 1},
		{"\tedge/:9000 {", "\tedge/:" + e.port + " {", 1},
		{"127.0.0.1:9001 {", e.probe + " {", 1},
		{"edge_proxy step-ca.:9000 {", "edge_proxy " + upstream + " {", 2},
		{"edge_proxy crl.:9000 {", "edge_proxy " + e.crl + " {", 1},
		{"\tedge/:9080 {", "\tedge/:" + e.plainPort + " {", 1},
		{"127.0.0.1:9081", "127.0.0.1:" + files, 2},
		{"http://:9081 {", "http://:" + files + " {", 1},
		{"http://:9180 {", "http://:" + e.metricsPort + " {", 1},
		{"servers :9180 {", "servers :" + e.metricsPort + " {", 1},
		{"root /revocation", "root " + e.revocation, 1},
	} {
		require.Equal(t, r.times, strings.Count(config, r.old), "%q in the shipped Caddyfile", r.old)
		config = strings.ReplaceAll(config, r.old, r.with)
	}
	write(t, e.caddyfile, config)
	write(t, e.allowList, allow)
	write(t, e.limits, limits)
	write(t, e.balancers, "none\n")
	if ca != nil {
		write(t, e.root, string(ca.rootPEM()))
	}
	return e
}

// limits are those of the shipped .env.example.
const limits = "max_connections 7000\nmax_per_source 5000\nrate_per_source 2000\n"

func write(t *testing.T, path, content string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
}

func (e *edge) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...) //nolint:gosec // G702: the test's own binary
	home := filepath.Dir(e.caddyfile)
	cmd.Env = append(os.Environ(), asCaddy+"=1", "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_DATA_HOME="+home, nameserverVar+"="+e.nameserver)
	return cmd
}

// caddy runs a subcommand to its end and returns all that it printed.
func (e *edge) caddy(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, err := e.command(t.Context(), args...).CombinedOutput()
	return string(out), err
}

// run starts the edge and waits until it listens.
func (e *edge) run(t *testing.T) {
	t.Helper()
	// Not t.Context: it would kill the process before the cleanup can end it.
	e.start(t, e.command(context.WithoutCancel(t.Context()), "run", "--config", e.caddyfile, "--adapter", "caddyfile"))
}

func (e *edge) start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	cmd.Stderr = &e.stderr
	require.NoError(t, cmd.Start())
	e.process = cmd.Process
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("caddy's log:\n%s", e.log())
		}
	})
	e.waitForLog(t, `"msg":"serving initial configuration"`)
}

func (e *edge) reload(t *testing.T) (string, error) {
	t.Helper()
	return e.caddy(t, "reload", "--force", "--config", e.caddyfile, "--adapter", "caddyfile", "--address", "unix/"+e.admin)
}

func (e *edge) log() string { return e.stderr.String() }

func (e *edge) waitForLog(t *testing.T, want string) {
	t.Helper()
	require.Eventually(t, func() bool { return strings.Contains(e.log(), want) }, 30*time.Second, 10*time.Millisecond,
		"waiting for %s in the log", want)
}

// dial connects to the port for TLS from a given source address.
func (e *edge) dial(t *testing.T, from string) *net.TCPConn {
	t.Helper()
	return dial(t, from, e.port)
}

func dial(t *testing.T, from, port string) *net.TCPConn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 5 * time.Second}
	host := "127.0.0.1"
	if strings.Contains(from, ":") {
		host = "::1"
	}
	conn, err := dialer.DialContext(t.Context(), "tcp", net.JoinHostPort(host, port))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.TCPConn)
}

// requireRefused connects, sends, and wants the connection closed without a
// byte. It returns the source address and port.
func (e *edge) requireRefused(t *testing.T, from string, send []byte) string {
	t.Helper()
	return requireClosed(t, e.dial(t, from), send)
}

func requireClosed(t *testing.T, conn *net.TCPConn, send []byte) string {
	t.Helper()
	start := time.Now()
	_, _ = conn.Write(send) // may meet the closed connection
	require.NoError(t, conn.SetReadDeadline(start.Add(5*time.Second)))
	got, err := io.ReadAll(conn)
	require.Empty(t, got)
	if err != nil { // unread data at close makes the kernel reset
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	require.Less(t, time.Since(start), 2*time.Second, "closed at once and not after matching_timeout")
	return conn.LocalAddr().String()
}

// whoami asks the CA through the edge whose client certificate it sees, and
// wants the CA's own certificate in return.
func (e *edge) whoami(t *testing.T, from string, ca *authority) string {
	t.Helper()
	body, err := get(e.dial(t, from), ca.clientConfig(t), "/whoami")
	require.NoError(t, err)
	return body
}

// get makes one request on a connection and closes it.
func get(raw net.Conn, config *tls.Config, path string) (string, error) {
	conn := tls.Client(raw, config)
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(8 * time.Second)); err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "https://localhost"+path, http.NoBody)
	if err != nil {
		return "", err
	}
	client := http.Client{Transport: &http.Transport{
		DialTLSContext:    func(context.Context, string, string) (net.Conn, error) { return conn, nil },
		DisableKeepAlives: true,
	}}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("answered %q", resp.Status)
	}
	if v := conn.ConnectionState().Version; v != tls.VersionTLS13 {
		return "", fmt.Errorf("TLS version %x", v)
	}
	return string(body), err
}

// authority is a CA in step-ca's place: its own root, one server certificate
// for localhost, one client certificate.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: rand.Text()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &authority{key: key, cert: cert}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func (ca *authority) issue(t *testing.T, name string, usage x509.ExtKeyUsage) tls.Certificate {
	t.Helper()
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, ca.cert, key.Public(), ca.key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (ca *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// serverConfig asks for a client certificate without insisting, as step-ca does.
func (ca *authority) serverConfig(t *testing.T) *tls.Config {
	t.Helper()
	return &tls.Config{
		Certificates: []tls.Certificate{ca.issue(t, "step-ca", x509.ExtKeyUsageServerAuth)},
		ClientAuth:   tls.VerifyClientCertIfGiven, ClientCAs: ca.pool(), MinVersion: tls.VersionTLS12,
	}
}

func (ca *authority) clientConfig(t *testing.T) *tls.Config {
	t.Helper()
	return &tls.Config{
		Certificates: []tls.Certificate{ca.issue(t, "client of the test", x509.ExtKeyUsageClientAuth)},
		RootCAs:      ca.pool(), ServerName: "localhost", MinVersion: tls.VersionTLS12,
	}
}

func (ca *authority) rootFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "root_ca.crt")
	write(t, path, string(ca.rootPEM()))
	return path
}

func (ca *authority) rootPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
}

// upstream is a running stand-in for step-ca.
type upstream struct {
	addr     string
	listener *gatedListener
	server   *http.Server
	checks   atomic.Int64 // answered questions of the edge, each on a connection of its own
	noDB     atomic.Bool  // as when the database is down

	slowHealth atomic.Bool // as on a machine that is busy
}

func (ca *authority) serve(t *testing.T) *upstream {
	t.Helper()
	return ca.serveAt(t, "127.0.0.1:0")
}

func (ca *authority) serveAt(t *testing.T, addr string) *upstream {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	up := &upstream{addr: ln.Addr().String(), listener: &gatedListener{Listener: ln}}
	up.server = ca.server(t, up)
	go func() { _ = up.server.ServeTLS(up.listener, "", "") }()
	return up
}

// ServeHTTP answers /health and /ssh/check-host as step-ca does, and /whoami with
// the name in the client's certificate.
func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.Method + " " + r.URL.Path {
	case "GET /health":
		u.checks.Add(1)
		if u.slowHealth.Load() {
			<-r.Context().Done()
			return
		}
		_, _ = io.WriteString(w, `{"status":"ok"}`)
	case "POST /ssh/check-host":
		u.checks.Add(1)
		var body struct{ Type, Principal string }
		if json.NewDecoder(r.Body).Decode(&body) != nil || body.Type != "host" || body.Principal == "" {
			http.Error(w, "", http.StatusBadRequest)
			return
		}
		if u.noDB.Load() {
			http.Error(w, "", http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, `{"exists":false}`)
	case "GET /whoami":
		if len(r.TLS.PeerCertificates) > 0 {
			_, _ = io.WriteString(w, r.TLS.PeerCertificates[0].Subject.CommonName) //nolint:gosec // G705: no browser reads this
		}
	case "GET /where":
		_, _ = io.WriteString(w, u.addr)
	default:
		http.NotFound(w, r)
	}
}

// dialled is how many connections there were besides those of the checks.
func (u *upstream) dialled() int { return u.listener.count() - int(u.checks.Load()) }

func (u *upstream) requireNotDialled(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool { return u.dialled() == 0 }, 5*time.Second, 10*time.Millisecond,
		"step-ca must not even be dialled")
}

func (ca *authority) serveHTTP(t *testing.T, handler http.Handler) string {
	t.Helper()
	ln := listen(t)
	server := ca.server(t, handler)
	go func() { _ = server.ServeTLS(ln, "", "") }()
	return ln.Addr().String()
}

func (ca *authority) server(t *testing.T, handler http.Handler) *http.Server {
	t.Helper()
	server := &http.Server{
		Handler: handler, TLSConfig: ca.serverConfig(t), ReadHeaderTimeout: 5 * time.Second,
		ErrorLog: log.New(io.Discard, "", 0), // handshakes that a test fails on purpose
	}
	t.Cleanup(func() { _ = server.Close() })
	return server
}

// gatedListener counts connections, and makes all of them stand still, as those
// of a process that is stopped.
type gatedListener struct {
	net.Listener
	accepted atomic.Int64
	gate     sync.RWMutex
}

func (l *gatedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	l.gate.RLock()
	defer l.gate.RUnlock()
	if err != nil {
		return nil, err
	}
	l.accepted.Add(1)
	return &gatedConn{conn.(*net.TCPConn), &l.gate}, nil
}

func (l *gatedListener) count() int { return int(l.accepted.Load()) }

// freeze stops everything until the returned function is called.
func (l *gatedListener) freeze() func() {
	l.gate.Lock()
	return sync.OnceFunc(l.gate.Unlock)
}

type gatedConn struct {
	*net.TCPConn
	gate *sync.RWMutex
}

func (c *gatedConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	c.gate.RLock()
	defer c.gate.RUnlock()
	return n, err
}

func (c *gatedConn) Write(b []byte) (int, error) {
	c.gate.RLock()
	defer c.gate.RUnlock()
	return c.TCPConn.Write(b)
}

// deafListener is what a dead accept loop looks like from outside: the kernel
// completes the connection and nobody ever answers.
func deafListener(t *testing.T) string {
	t.Helper()
	return listen(t).Addr().String()
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// freePort returns a port that is nobody's, and not among those that the kernel
// gives to clients, of which the tests have thousands.
func freePort(t *testing.T) string {
	t.Helper()
	usedPorts.Lock()
	defer usedPorts.Unlock()
	for {
		port := strconv.Itoa(10_000 + mathrand.IntN(22_000)) //nolint:gosec // G404: not a secret
		ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", ":"+port)
		if err != nil {
			continue
		}
		require.NoError(t, ln.Close())
		if usedPorts.ports[port] {
			continue
		}
		usedPorts.ports[port] = true
		return port
	}
}

var usedPorts = struct {
	sync.Mutex
	ports map[string]bool
}{ports: make(map[string]bool)}

// recordHello returns the ClientHello of Go's own client.
func recordHello(t *testing.T) []byte {
	t.Helper()
	client, server := net.Pipe()
	go func() {
		_ = tls.Client(client, &tls.Config{ServerName: "localhost", MinVersion: tls.VersionTLS12}).HandshakeContext(t.Context())
	}()
	defer func() { _ = server.Close() }()
	record := make([]byte, 16<<10)
	n, err := server.Read(record)
	require.NoError(t, err)
	return record[:n]
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
