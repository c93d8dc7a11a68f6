package edge

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/stretchr/testify/require"
)

func TestProxyReadsItsOptions(t *testing.T) {
	for name, tc := range map[string]struct {
		line    string
		problem string
	}{
		"all of them":           {line: "edge_proxy ca:9000 {\n root /r\n server_name n\n dial_timeout 1s\n try_duration 3s\n}"},
		"no upstream":           {line: "edge_proxy", problem: "wrong argument count"},
		"two upstreams":         {line: "edge_proxy a:1 b:1", problem: "wrong argument count"},
		"an unknown option":     {line: "edge_proxy ca:9000 {\n lb_policy first\n}", problem: `unexpected "lb_policy"`},
		"a number for a time":   {line: "edge_proxy ca:9000 {\n dial_timeout 2\n}", problem: `dial_timeout "2"`},
		"a time that has ended": {line: "edge_proxy ca:9000 {\n try_duration -1s\n}", problem: `try_duration "-1s"`},
	} {
		t.Run(name, func(t *testing.T) {
			err := new(Proxy).UnmarshalCaddyfile(caddyfile.NewTestDispenser(tc.line))
			if tc.problem != "" {
				require.ErrorContains(t, err, tc.problem)
				return
			}
			require.NoError(t, err)
		})
	}
}

// cluster is an edge in front of several replicas that it finds through DNS.
type cluster struct {
	*edge
	ca       *authority
	replicas []*upstream
	zone     *zone
}

func replicaIP(i int) string { return "127.0.0." + strconv.Itoa(11+i) }

func newCluster(t *testing.T, n int) *cluster {
	t.Helper()
	c := &cluster{ca: newAuthority(t)}
	addr := replicaIP(0) + ":" + freePort(t)
	var ips []string
	for i := range n {
		up := c.ca.serveAt(t, addr)
		_, port, err := net.SplitHostPort(up.addr)
		require.NoError(t, err)
		addr = net.JoinHostPort(replicaIP(i+1), port)
		c.replicas = append(c.replicas, up)
		ips = append(ips, replicaIP(i))
	}
	c.zone = newZone(t, ips...)
	_, port, err := net.SplitHostPort(c.replicas[0].addr)
	require.NoError(t, err)
	c.edge = newEdge(t, c.ca, "step-ca.:"+port, allowList)
	c.nameserver = c.zone.addr
	return c
}

func (c *cluster) states(t *testing.T) map[string]Status {
	t.Helper()
	var all []Status
	require.NoError(t, callAdmin(t.Context(), "unix/"+c.admin, http.MethodGet, upstreamsPath, nil, &all))
	states := make(map[string]Status)
	for _, s := range all {
		if s.Upstream == "step-ca" {
			states[s.Address] = s
		}
	}
	return states
}

func (c *cluster) waitForState(t *testing.T, replica int, state string) {
	t.Helper()
	require.Eventually(t, func() bool { return c.states(t)[replicaIP(replica)].State == state }, 15*time.Second, 20*time.Millisecond,
		"waiting for replica %d to be %q", replica, state)
}

// runReady starts the edge and waits until all replicas are ready.
func (c *cluster) runReady(t *testing.T) {
	t.Helper()
	c.run(t)
	for i := range c.replicas {
		c.waitForState(t, i, ready)
	}
}

// where makes n requests, all of which have to succeed, and counts who answered.
func (c *cluster) where(t *testing.T, n int) map[string]int {
	t.Helper()
	answered := make(map[string]int)
	config := c.ca.clientConfig(t)
	for range n {
		addr, err := get(c.dial(t, insider), config, "/where")
		require.NoError(t, err)
		host, _, err := net.SplitHostPort(addr)
		require.NoError(t, err)
		answered[host]++
	}
	return answered
}

func TestReplicasShareTheWork(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.runReady(t)
	require.Equal(t, map[string]int{replicaIP(0): 10, replicaIP(1): 10, replicaIP(2): 10}, c.where(t, 30))
}

func TestTheLessBusyReplicaIsChosen(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.runReady(t)
	// Several connections stay open; the rest goes on as evenly.
	var held []*tls.Conn
	for range 6 {
		conn := tls.Client(c.dial(t, insider), c.ca.clientConfig(t))
		require.NoError(t, conn.HandshakeContext(t.Context()))
		held = append(held, conn)
	}
	s := c.states(t)
	require.Equal(t, 3, s[replicaIP(0)].Active)
	require.Equal(t, 3, s[replicaIP(1)].Active)
	for i := range held { // of the first replica or of the second, but of one
		if i%2 == 0 {
			require.NoError(t, held[i].Close())
		}
	}
	require.Eventually(t, func() bool { s = c.states(t); return s[replicaIP(0)].Active+s[replicaIP(1)].Active == 3 }, 5*time.Second, 10*time.Millisecond)
	idle := replicaIP(0)
	if s[replicaIP(1)].Active == 0 {
		idle = replicaIP(1)
	}
	require.Equal(t, map[string]int{idle: 5}, c.where(t, 5))
}

func TestFrozenReplicaIsOutWithinFourSeconds(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.runReady(t)
	thaw := c.replicas[0].listener.freeze()
	defer thaw()
	start := time.Now()
	served := make(chan error, 4)
	for range cap(served) { // before the edge knows: their ClientHello goes on to the other one
		conn, config := c.dial(t, insider), c.ca.clientConfig(t)
		go func() {
			_, err := get(conn, config, "/where")
			served <- err
		}()
	}
	c.waitForState(t, 0, out)
	require.Less(t, time.Since(start), 4*time.Second)
	for range cap(served) {
		require.NoError(t, <-served)
	}
	require.Equal(t, map[string]int{replicaIP(1): 10}, c.where(t, 10))
	thaw()
	c.waitForState(t, 0, ready)
	require.Len(t, c.where(t, 10), 2)
}

func TestBusyReplicaThatIsHeardStaysInService(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	// /health hangs; everything else goes on.
	c.replicas[0].slowHealth.Store(true)
	c.run(t)
	c.waitForState(t, 0, out)
	c.replicas[0].slowHealth.Store(false)
	c.waitForState(t, 0, ready)
	ctx, cancel := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	config := c.ca.clientConfig(t)
	clients.Go(func() {
		for ctx.Err() == nil {
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(insider)}}
			if conn, err := dialer.DialContext(ctx, "tcp", c.edge.edge); err == nil {
				_, _ = get(conn, config, "/where")
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
	c.replicas[0].slowHealth.Store(true)
	time.Sleep(checkInterval + checkTimeout + time.Second)
	require.NotEqual(t, out, c.states(t)[replicaIP(0)].State)
	cancel()
	clients.Wait()
	c.waitForState(t, 0, out)
}

func TestReplicaWithoutDatabaseIsSecondChoice(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.replicas[0].noDB.Store(true)
	c.run(t)
	c.waitForState(t, 0, alive)
	c.waitForState(t, 1, ready)
	require.Equal(t, map[string]int{replicaIP(1): 10}, c.where(t, 10))
	require.Equal(t, `database: /ssh/check-host answered "500 Internal Server Error"`, c.states(t)[replicaIP(0)].Error)

	c.replicas[1].noDB.Store(true)
	c.waitForState(t, 1, alive)
	require.Len(t, c.where(t, 10), 2, "the roots can be fetched all the same")

	c.replicas[0].noDB.Store(false)
	c.waitForState(t, 0, ready)
	require.Equal(t, map[string]int{replicaIP(0): 10}, c.where(t, 10))
}

func TestReplicaThatRefusesIsOutAtOnce(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.runReady(t)
	require.NoError(t, c.replicas[0].server.Close())
	require.Equal(t, map[string]int{replicaIP(1): 20}, c.where(t, 20), "no client notices")
	require.Equal(t, out, c.states(t)[replicaIP(0)].State)
}

func TestReplicaThatDiesWithTheClientHelloIsReplaced(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.runReady(t)
	addr := c.replicas[0].addr
	require.NoError(t, c.replicas[0].server.Close())
	ln, err := new(net.ListenConfig).Listen(t.Context(), "tcp", addr)
	require.NoError(t, err)
	defer func() { _ = ln.Close() }()
	closed := new(atomic.Int64)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 10)) // what remains unread makes it a reset
			_ = conn.Close()
			closed.Add(1)
		}
	}()
	require.Equal(t, map[string]int{replicaIP(1): 20}, c.where(t, 20), "no client notices")
	require.Positive(t, closed.Load())
}

func TestWhereReplicaSwallowsPacketsTheNextIsTried(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.runReady(t)
	// A full backlog drops further SYN packets, as a network that is cut does.
	addr := c.replicas[0].addr
	require.NoError(t, c.replicas[0].server.Close())
	blackhole(t, addr)
	start := time.Now()
	require.Equal(t, map[string]int{replicaIP(1): 10}, c.where(t, 10))
	require.Less(t, time.Since(start), 4*time.Second, "dial_timeout, once")
}

func TestPanicInOneDirectionEndsOnlyThatConnection(t *testing.T) {
	readErr, writeErr := transfer(nil, strings.NewReader("x"), func() {})
	require.ErrorContains(t, readErr, "panic: ")
	require.NoError(t, writeErr)
}

// blackhole listens at addr so that connecting hangs.
func blackhole(t *testing.T, addr string) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = syscall.Close(fd) })
	require.NoError(t, syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1))
	ap := netip.MustParseAddrPort(addr)
	require.NoError(t, syscall.Bind(fd, &syscall.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}))
	require.NoError(t, syscall.Listen(fd, 0))
	for range 8 {
		conn, err := (&net.Dialer{Timeout: 200 * time.Millisecond}).DialContext(t.Context(), "tcp", addr)
		if err != nil {
			return
		}
		t.Cleanup(func() { _ = conn.Close() })
	}
	t.Fatal("the backlog takes more than it should")
}

func TestClientIsClosedWhenNoReplicaServes(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	e := newEdge(t, ca, "127.0.0.1:"+freePort(t), allowList)
	e.run(t)
	start := time.Now()
	conn := e.dial(t, insider)
	_, err := get(conn, ca.clientConfig(t), "/whoami")
	require.Error(t, err)
	require.InDelta(t, 5, time.Since(start).Seconds(), 1, "try_duration")
	e.waitForLog(t, `"decision":"no-upstream","remote":"`+conn.LocalAddr().String()+`"`)
	require.Contains(t, e.log(), `"error":"no replica is in service"`)
}

func TestReplicaOfAnotherAuthorityGetsNobody(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	write(t, c.root, string(newAuthority(t).rootPEM()))
	c.run(t)
	c.waitForState(t, 0, out)
	require.Contains(t, c.states(t)[replicaIP(0)].Error, "x509: certificate signed by unknown authority")
	write(t, c.root, string(c.ca.rootPEM()))
	c.waitForState(t, 0, ready)
}

func TestReplicasAreThoseInDNS(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.zone.set(replicaIP(0))
	c.run(t)
	c.waitForState(t, 0, ready)
	require.Equal(t, map[string]int{replicaIP(0): 5}, c.where(t, 5))

	held := tls.Client(c.dial(t, insider), c.ca.clientConfig(t))
	require.NoError(t, held.HandshakeContext(t.Context()))
	c.zone.set(replicaIP(1), replicaIP(2))
	c.waitForState(t, 1, ready)
	c.waitForState(t, 2, ready)
	require.NotContains(t, c.states(t), replicaIP(0), "forgotten")
	require.Equal(t, map[string]int{replicaIP(1): 5, replicaIP(2): 5}, c.where(t, 10))
	_, err := io.WriteString(held, "GET /where HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
	require.NoError(t, err)
	answer, err := io.ReadAll(held)
	require.NoError(t, err)
	require.Contains(t, string(answer), c.replicas[0].addr, "what was open goes on")

	c.zone.fail(true)
	time.Sleep(2 * resolveInterval)
	require.Len(t, c.where(t, 10), 2, "a name server that fails is no reason")

	c.zone.fail(false)
	c.zone.set()
	require.Eventually(t, func() bool { return len(c.states(t)) == 0 }, 5*time.Second, 50*time.Millisecond)
	c.zone.set(replicaIP(2))
	start := time.Now()
	require.Equal(t, map[string]int{replicaIP(2): 1}, c.where(t, 1))
	require.Less(t, time.Since(start), 3*time.Second, "who waits for a replica has DNS asked at once")
}

func TestHalfCloseReachesTheOtherSide(t *testing.T) {
	t.Parallel()
	// Behind TLS, by a protocol of its own, the replica does as a test wants.
	for name, tc := range map[string]struct {
		client, server func(raw *net.TCPConn, conn *tls.Conn) error
	}{
		"the client ends first": {
			client: func(raw *net.TCPConn, conn *tls.Conn) error {
				_, err := conn.Write(bytes.Repeat([]byte("x"), 100_000))
				err = errors.Join(err, conn.CloseWrite(), raw.CloseWrite())
				answer, readErr := io.ReadAll(conn)
				if string(answer) != "got 100000 bytes" {
					return fmt.Errorf("answer %q: %w", answer, errors.Join(err, readErr))
				}
				return errors.Join(err, readErr)
			},
			server: func(_ *net.TCPConn, conn *tls.Conn) error {
				all, err := io.ReadAll(conn)
				_, writeErr := fmt.Fprintf(conn, "got %d bytes", len(all))
				return errors.Join(err, writeErr, conn.Close())
			},
		},
		"the server ends first": {
			client: func(_ *net.TCPConn, conn *tls.Conn) error {
				answer, err := io.ReadAll(conn)
				if len(answer) != 100_000 {
					return fmt.Errorf("%d bytes: %w", len(answer), err)
				}
				_, writeErr := io.WriteString(conn, "thanks")
				return errors.Join(err, writeErr, conn.Close())
			},
			server: func(raw *net.TCPConn, conn *tls.Conn) error {
				_, err := conn.Write(bytes.Repeat([]byte("x"), 100_000))
				err = errors.Join(err, conn.CloseWrite(), raw.CloseWrite())
				thanks, readErr := io.ReadAll(conn)
				if string(thanks) != "thanks" {
					return fmt.Errorf("%q after the half-close: %w", thanks, errors.Join(err, readErr))
				}
				return errors.Join(err, readErr)
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ca := newAuthority(t)
			served := make(chan error, 1)
			config := ca.serverConfig(t)
			config.NextProtos = []string{"test", "http/1.1"}
			server := ca.server(t, new(upstream))
			server.TLSConfig = config
			server.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){
				"test": func(_ *http.Server, conn *tls.Conn, _ http.Handler) {
					served <- tc.server(conn.NetConn().(*net.TCPConn), conn)
				},
			}
			ln := listen(t)
			go func() { _ = server.ServeTLS(ln, "", "") }()
			e := newEdge(t, ca, ln.Addr().String(), allowList)
			e.run(t)

			raw := e.dial(t, insider)
			require.NoError(t, raw.SetDeadline(time.Now().Add(5*time.Second)))
			clientConfig := ca.clientConfig(t)
			clientConfig.NextProtos = []string{"test"}
			require.NoError(t, tc.client(raw, tls.Client(raw, clientConfig)))
			require.NoError(t, <-served)
			e.waitForLog(t, `"decision":"admitted","remote":"`+raw.LocalAddr().String()+`"`)
		})
	}
}

func TestDrain(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.runReady(t)
	command := func(args ...string) (string, int) {
		out, err := c.caddy(t, append(args, "--admin", "unix/"+c.admin)...)
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			return out, exit.ExitCode()
		}
		require.NoError(t, err)
		return out, 0
	}
	first, second := replicaIP(0), replicaIP(1)

	printed, code := command("drain", first)
	require.Equal(t, first+": draining, 0 active\n", printed)
	require.Zero(t, code)
	require.Equal(t, map[string]int{second: 6}, c.where(t, 6))

	printed, code = command("drain", second)
	require.Equal(t, 3, code)
	require.Equal(t, "caddy drain: error: "+second+": it is the only one in service\n"+
		"caddy drain: hint: caddy upstreams says what the others lack\n", printed)
	require.Equal(t, map[string]int{second: 6}, c.where(t, 6))

	out, err := c.reload(t)
	require.NoError(t, err, out)
	require.Equal(t, map[string]int{second: 6}, c.where(t, 6), "a reload forgets no drain")

	printed, code = command("upstreams")
	require.Zero(t, code)
	require.Regexp(t, `(?m)^step-ca +`+regexp.QuoteMeta(first)+` +draining +0 *$`, printed)
	require.Regexp(t, `(?m)^step-ca +`+regexp.QuoteMeta(second)+` +ready +0 *$`, printed)
	printed, code = command("upstreams", "--json")
	require.Zero(t, code)
	require.Contains(t, printed, `{"upstream":"step-ca","address":"`+first+`","state":"draining","active":0}`)

	printed, code = command("undrain", first)
	require.Equal(t, first+": ready\n", printed)
	require.Zero(t, code)
	require.Len(t, c.where(t, 6), 2)

	t.Run("what is active is waited for, and no longer than said", func(t *testing.T) {
		var held []*tls.Conn
		for range 2 { // one on each
			conn := tls.Client(c.dial(t, insider), c.ca.clientConfig(t))
			require.NoError(t, conn.HandshakeContext(t.Context()))
			held = append(held, conn)
		}
		printed, code := command("drain", first, "--wait", "300ms")
		require.Equal(t, first+": draining, 1 active\n", printed)
		require.Zero(t, code)
		time.AfterFunc(500*time.Millisecond, func() {
			for _, conn := range held {
				_ = conn.Close()
			}
		})
		printed, _ = command("drain", first, "--wait", "5s")
		require.Equal(t, first+": draining, 0 active\n", printed)
	})

	t.Run("a drain ends by itself", func(t *testing.T) {
		_, code := command("drain", first, "--for", "1s")
		require.Zero(t, code)
		require.Eventually(t, func() bool { return c.states(t)[first].State == ready }, 3*time.Second, 50*time.Millisecond)
	})

	t.Run("a replica that is restarted stays drained", func(t *testing.T) {
		_, code := command("drain", first)
		require.Zero(t, code)
		c.zone.set(second)
		require.Eventually(t, func() bool { return len(c.states(t)) == 1 }, 5*time.Second, 50*time.Millisecond)
		printed, code := command("undrain", first, "--wait", "200ms")
		require.Equal(t, 1, code, printed)
		require.Equal(t, "caddy undrain: error: "+first+": no such replica\ncaddy undrain: hint: caddy upstreams lists them\n", printed)
		c.zone.set(first, second)
		c.waitForState(t, 0, ready)
		_, code = command("drain", first)
		require.Zero(t, code)
		require.NoError(t, c.replicas[0].server.Close())
		printed, code = command("undrain", first, "--wait", "2500ms")
		require.Equal(t, 1, code)
		require.Contains(t, printed, "caddy undrain: error: "+first+" is out: ")
	})

	for name, tc := range map[string]struct {
		args []string
		code int
		want string
	}{
		"no address":         {[]string{"drain"}, 2, "caddy drain: error: want one address\n"},
		"a name":             {[]string{"drain", "step-ca"}, 2, `caddy drain: error: address "step-ca": want one such as 172.20.0.5` + "\n"},
		"two addresses":      {[]string{"undrain", first, second}, 2, "caddy undrain: error: want one address\n"},
		"an unknown address": {[]string{"drain", "192.0.2.1"}, 1, "caddy drain: error: 192.0.2.1: no such replica\n"},
	} {
		t.Run(name, func(t *testing.T) {
			printed, code := command(tc.args...)
			require.Equal(t, tc.code, code)
			require.Equal(t, tc.want+"caddy "+tc.args[0]+": hint: caddy upstreams lists them\n", printed)
		})
	}

	t.Run("caddy is not there", func(t *testing.T) {
		out, err := c.caddy(t, "upstreams", "--admin", "unix/"+filepath.Join(t.TempDir(), "none.sock"))
		require.Error(t, err)
		require.Contains(t, out, "caddy upstreams: error: ")
		require.Contains(t, out, "caddy upstreams: hint: caddy has to run with this admin API; see: docker compose ps caddy\n")
	})
}

// metric reads one value off the metrics.
func (e *edge) metric(t *testing.T, name string) float64 {
	t.Helper()
	text, _ := e.metricsPage(t, "/metrics")
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			require.NoError(t, err)
			return n
		}
	}
	t.Fatalf("no %s in the metrics:\n%s", name, text)
	return 0
}

func (e *edge) metricsPage(t *testing.T, path string) (body string, status int) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:"+e.metricsPort+path, http.NoBody)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer func() { _ = resp.Body.Close() }()
	all, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(all), resp.StatusCode
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.replicas[1].noDB.Store(true)
	c.run(t)
	c.waitForState(t, 0, ready)
	c.waitForState(t, 1, alive)
	c.where(t, 3)
	c.requireRefused(t, outsider, nil)
	c.requireRefused(t, insider, []byte("GET / HTTP/1.0\r\n\r\n"))
	held := tls.Client(c.dial(t, insider), c.ca.clientConfig(t))
	require.NoError(t, held.HandshakeContext(t.Context()))
	// The lines are written after the counting.
	require.Eventually(t, func() bool { return strings.Count(c.log(), `"decision":`) == 5 }, 5*time.Second, 10*time.Millisecond)

	check := func() {
		for name, want := range map[string]float64{
			`edge_connections_total{decision="admitted"}`:         3,
			`edge_connections_total{decision="denied"}`:           1,
			`edge_connections_total{decision="limited"}`:          0,
			`edge_connections_total{decision="not-tls"}`:          1,
			`edge_connections_total{decision="no-upstream"}`:      0,
			`edge_active_connections`:                             1,
			`edge_dial_failures_total`:                            0,
			`edge_upstreams{state="ready",upstream="step-ca"}`:    1,
			`edge_upstreams{state="alive",upstream="step-ca"}`:    1,
			`edge_upstreams{state="out",upstream="step-ca"}`:      0,
			`edge_upstreams{state="draining",upstream="step-ca"}`: 0,
		} {
			require.InDelta(t, want, c.metric(t, name), 0, name)
		}
	}
	check()
	received, sent := 0, 0
	for _, line := range regexp.MustCompile(`"received":(\d+),"sent":(\d+)`).FindAllStringSubmatch(c.log(), -1) {
		r, err := strconv.Atoi(line[1])
		require.NoError(t, err)
		s, err := strconv.Atoi(line[2])
		require.NoError(t, err)
		received, sent = received+r, sent+s
	}
	require.Greater(t, received, 3*200, "a ClientHello and a request")
	require.Greater(t, sent, 3*500, "a certificate and an answer")
	require.InDelta(t, received, c.metric(t, `edge_bytes_total{direction="received"}`), 0)
	require.InDelta(t, sent, c.metric(t, `edge_bytes_total{direction="sent"}`), 0)
	require.Positive(t, c.metric(t, "go_goroutines"), "Caddy's own beside them")

	out, err := c.reload(t)
	require.NoError(t, err, out)
	check()

	for _, path := range []string{"/", "/metrics/", "/config/", "/debug/pprof/", "/metricsx"} {
		_, status := c.metricsPage(t, path)
		require.Equal(t, http.StatusNotFound, status, path)
	}
}

func TestNothingIsLeftBehind(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.runReady(t)
	descriptors := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.process.Pid))
		require.NoError(t, err)
		return len(entries)
	}
	round := func() {
		c.where(t, 40)
		c.requireRefused(t, outsider, nil)
		for range 20 { // broken off at various points
			_ = c.dial(t, insider).Close()
			conn := tls.Client(c.dial(t, insider), c.ca.clientConfig(t))
			require.NoError(t, conn.HandshakeContext(t.Context()))
			raw := conn.NetConn().(*net.TCPConn)
			require.NoError(t, raw.SetLinger(0))
			require.NoError(t, raw.Close())
		}
		for range 3 {
			out, err := c.reload(t)
			require.NoError(t, err, out)
		}
	}
	round() // what is made once
	settled := func() (goroutines float64, fds int) {
		time.Sleep(300 * time.Millisecond)
		return c.metric(t, "go_goroutines"), descriptors()
	}
	goroutines, fds := settled()
	round()
	round()
	require.Eventually(t, func() bool {
		g, f := settled()
		return g <= goroutines+3 && f <= fds+3 // checks in progress
	}, 10*time.Second, 100*time.Millisecond, "before: %v goroutines, %v descriptors", goroutines, fds)
	require.Zero(t, c.metric(t, "edge_active_connections"))
	for _, s := range c.states(t) {
		require.Zero(t, s.Active)
	}
}

func TestReloadUnderLoadFailsNobody(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 2)
	c.runReady(t)
	ctx, cancel := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var mu sync.Mutex
	served, failures := 0, []error{}
	config := c.ca.clientConfig(t)
	for range 8 {
		clients.Go(func() {
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(insider)}}
			for ctx.Err() == nil {
				conn, err := dialer.DialContext(context.WithoutCancel(ctx), "tcp", c.edge.edge)
				if err == nil {
					_, err = get(conn, config, "/where")
				}
				mu.Lock()
				if err != nil {
					failures = append(failures, err)
				} else {
					served++
				}
				mu.Unlock()
			}
		})
	}
	for range 10 {
		out, err := c.reload(t)
		require.NoError(t, err, out)
	}
	cancel()
	clients.Wait()
	require.Empty(t, failures)
	require.Greater(t, served, 100)
	t.Logf("%d requests over 10 reloads", served)
}

func TestSilentClientIsClosedAndCounted(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, allowList)
	e.run(t)
	hello := recordHello(t)
	for name, send := range map[string][]byte{
		"not a byte":                nil,
		"half a ClientHello":        hello[:len(hello)/2],
		"a record that never comes": {0x16, 3, 1, 0x3f, 0xff},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := e.dial(t, insider)
			start := time.Now()
			_, err := conn.Write(send)
			require.NoError(t, err)
			require.NoError(t, conn.SetReadDeadline(start.Add(15*time.Second)))
			got, err := io.ReadAll(conn)
			require.NoError(t, err)
			require.Empty(t, got)
			require.InDelta(t, 10, time.Since(start).Seconds(), 1, "matching_timeout")
			e.waitForLog(t, `"decision":"not-tls","remote":"`+conn.LocalAddr().String()+`"`)
		})
	}
	t.Cleanup(func() {
		up.requireNotDialled(t)
		require.NotContains(t, e.log(), "aborted matching", "caddy-l4's own line, which has no bounds")
	})
}
