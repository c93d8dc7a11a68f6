package e2e_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
	loadtest "github.com/infra-pki/infra-pki/tools/e2e/load"
)

const (
	steadyClients = 8
	calm          = 2 * time.Second // before a fault, and after it

	// The edge asks each replica every 2 s whether it is there, and every 10 s whether it
	// reaches the database; a replica that fails without a refused connection is found out then.
	detection         = 6 * time.Second
	databaseDetection = 15 * time.Second

	// Until what everything depends on is back by itself.
	restarted = 30 * time.Second
)

// never is for faults of which no client may notice anything.
const never = -1

// fault is one of the things that can happen to a stack under load.
type fault struct {
	name  string
	short bool // also in "make test"

	// strike does it, and ends when it is in force; one that lasts is then mended.
	strike func(t *testing.T)
	lasts  time.Duration
	mend   func(t *testing.T)

	// may is for how long after the strike requests may begin that fail. What was under
	// way at that time may fail with 0, nothing at all with never. Of an outage that
	// everything depends on, it counts from when it is mended.
	may    time.Duration
	outage bool
}

// faults are run on one stack, and their table is printed.
type faults struct {
	*stack.Stack
	clients []loadtest.Operation
	table   strings.Builder
}

// TestFaults strikes a stack under steady load, eight clients that sign and renew over
// new connections, none of which tries anything twice. With FAULTS set ("make faults") it
// does everything, else what fits into "make test". After each fault the serial of each
// certificate that a client was given is looked up in the database (invariant 6), requests
// that failed are held against what the fault may cost (invariants 7 and 8), and the
// stack has to be whole again, without a hand.
func TestFaults(t *testing.T) {
	stack.NeedRoot(t, "to signal the processes of containers")
	everything := os.Getenv("FAULTS") != ""
	rolls := 1
	if everything {
		rolls = 10
	}
	host := stack.NewHost(t)
	s := stack.New(t, nil)
	s.Set(stack.Settings{"ALLOWED_IPS": s.Gateway.String() + " " + host.Addr.String()})
	s.Up()
	f := newFaults(t, s)
	defer f.print()

	var stopped, cut stack.Container
	var crowd *connections
	all := []fault{
		{name: "kill -9 of the first step-ca", short: true, strike: func(t *testing.T) { t.Helper(); f.kill(t, "step-ca", 0) }},
		{name: "kill -9 of the second step-ca", strike: func(t *testing.T) { t.Helper(); f.kill(t, "step-ca", 1) }},
		{name: "kill -9 of postgres", short: true, may: restarted, strike: func(t *testing.T) { t.Helper(); f.kill(t, "postgres", 0) }},
		{name: "kill -9 of pgbouncer", may: restarted, strike: func(t *testing.T) { t.Helper(); f.kill(t, "pgbouncer", 0) }},
		{name: "kill -9 of caddy", may: restarted, strike: func(t *testing.T) { t.Helper(); f.kill(t, "caddy", 0) }},
		{name: "restart of postgres", may: restarted, strike: func(t *testing.T) { t.Helper(); f.restart(t, "postgres") }},
		{name: "restart of pgbouncer", may: restarted, strike: func(t *testing.T) { t.Helper(); f.restart(t, "pgbouncer") }},
		{name: "restart of caddy", may: restarted, strike: func(t *testing.T) { t.Helper(); f.restart(t, "caddy") }},
		{
			name: "SIGSTOP of a step-ca for 20 s", may: detection, lasts: 20 * time.Second,
			strike: func(t *testing.T) {
				t.Helper()
				stopped = containersOf(t, s, "step-ca")[0]
				require.NoError(t, syscall.Kill(stopped.State.Pid, syscall.SIGSTOP))
			},
			mend: func(t *testing.T) { t.Helper(); require.NoError(t, syscall.Kill(stopped.State.Pid, syscall.SIGCONT)) },
		},
		{
			name: "a step-ca cut off from the pooler for 30 s", may: databaseDetection, lasts: 30 * time.Second,
			strike: func(t *testing.T) {
				t.Helper()
				cut = containersOf(t, s, "step-ca")[0]
				stack.Docker(t, "network", "disconnect", s.Project+"_db", cut.ID).OK(t)
			},
			mend: func(t *testing.T) {
				t.Helper()
				stack.Docker(t, "network", "connect", "--alias", "step-ca", s.Project+"_db", cut.ID).OK(t)
			},
		},
		{name: "clocks of clients jump", short: true, may: never, strike: f.clocks},
		{name: fmt.Sprintf("%d × make restart", rolls), short: true, may: never, strike: func(t *testing.T) {
			t.Helper()
			for range rolls {
				s.Make("restart").OK(t)
			}
		}},
		{name: fmt.Sprintf("%d × make init with a reload", rolls), short: true, may: never, strike: func(t *testing.T) {
			t.Helper()
			for i := range rolls {
				s.Set(stack.Settings{"TLS_ORGANIZATION": fmt.Sprintf("reload %d", i)})
				require.Contains(t, s.Make("init").OK(t).Output(), "step-ca: reloaded")
			}
		}},
		{name: "4 × make init at once", may: never, strike: func(t *testing.T) {
			t.Helper()
			s.Set(stack.Settings{"TLS_ORGANIZATION": "storm"})
			var wg sync.WaitGroup
			var said [4]stack.Result
			for i := range said {
				wg.Go(func() { said[i] = s.Make("init") })
			}
			wg.Wait()
			for _, r := range said {
				r.OK(t)
			}
		}},
		{name: "30 reloads of the edge in a row", may: never, strike: func(t *testing.T) {
			t.Helper()
			for range 30 {
				s.Compose("exec", "-T", "caddy", "caddy", "reload", "--force", "--config", "/etc/caddy/Caddyfile",
					"--adapter", "caddyfile", "--address", "unix//run/edge/admin.sock").OK(t)
			}
		}},
		{name: "20 SIGHUP to a step-ca that is in the edge", may: calm, strike: func(t *testing.T) {
			t.Helper()
			replica := containersOf(t, s, "step-ca")[0]
			began := time.Now().Format(time.RFC3339Nano)
			for range 20 {
				require.NoError(t, syscall.Kill(replica.State.Pid, syscall.SIGHUP))
				time.Sleep(200 * time.Millisecond)
			}
			// It works the last ones off after they were sent, and each costs what is under way.
			require.Eventually(t, func() bool {
				said := stack.Docker(t, "logs", "--since", began, replica.ID).OK(t).Output()
				begun, ended := strings.Count(said, " reloading ..."), strings.Count(said, " Serving HTTPS on ")
				return begun > 0 && begun == ended
			}, 30*time.Second, 200*time.Millisecond, "it reloads for ever")
		}},
		{
			name: "300 clients that send a byte a second, 300 that speak no TLS, 200 that stay silent behind TLS", may: never, lasts: 15 * time.Second,
			strike: func(t *testing.T) { t.Helper(); crowd = f.slow(t) },
			mend:   func(t *testing.T) { t.Helper(); crowd.close() },
		},
		{
			name: "10,000 connections from one address", may: never, lasts: 5 * time.Second,
			strike: func(t *testing.T) {
				t.Helper()
				crowd = f.connect(t, 10_000, func(ctx context.Context) (net.Conn, error) {
					return host.Dial(ctx, "tcp4", netip.AddrPortFrom(host.Router, uint16(s.Port)).String()) //nolint:gosec // G115: a port
				})
				t.Logf("10,000 connections from one address: %d were served, %d refused", len(crowd.open), crowd.refused.Load())
				require.NotEmpty(t, crowd.open)
				require.Positive(t, crowd.refused.Load(), "one address could have all connections")
			},
			mend: func(t *testing.T) { t.Helper(); crowd.close() },
		},
	}
	for _, one := range all {
		if one.short || everything {
			t.Run(one.name, func(t *testing.T) { f.run(t, one) })
		}
	}
	if everything {
		t.Run("the edge has no descriptor left", func(t *testing.T) { noDescriptor(t, f) })
		t.Run("the disk of postgres is full", func(t *testing.T) { diskFull(t, f) })
	}
}

func newFaults(t *testing.T, s *stack.Stack) *faults {
	t.Helper()
	f := &faults{Stack: s}
	ca := openCA(t, s)
	var err error
	f.clients, err = prepareAll(t.Context(), steadyClients, func(ctx context.Context, i int) (loadtest.Operation, error) {
		name := fmt.Sprintf("steady-%d.e2e.test", i)
		if i%3 == 2 {
			return ca.Renewing(ctx, name)
		}
		return ca.Signing(name, time.Now)
	})
	require.NoError(t, err)
	f.table.WriteString("\n| fault | requests | failed | how | longest gap | acknowledged and lost | last failure after | whole after |\n|---|---|---|---|---|---|---|---|\n")
	return f
}

func (f *faults) print() { fmt.Println(f.table.String()) }

// run strikes under load and judges.
func (f *faults) run(t *testing.T, one fault) {
	t.Helper()
	f.requireWhole(t, time.Minute)
	ctx, stop := context.WithCancel(t.Context())
	outcome := make(chan loadtest.Outcome, 1)
	go func() { outcome <- loadtest.Run(ctx, f.clients) }()
	ended := false
	defer func() {
		stop()
		if !ended {
			<-outcome
		}
	}()

	time.Sleep(calm)
	one.strike(t)
	struck := time.Now()
	if one.mend != nil {
		time.Sleep(one.lasts)
		one.mend(t)
	}
	mended := time.Now()
	f.requireWhole(t, 2*time.Minute)
	whole := time.Since(mended)
	time.Sleep(calm)
	stop()
	o := <-outcome
	ended = true

	from := struck
	if one.outage {
		from = mended
	}
	failed := o.Failed()
	late, last := 0, time.Duration(0)
	for _, sample := range failed {
		last = max(last, sample.Began.Add(sample.Took).Sub(from))
		if one.may == never || sample.Began.After(from.Add(one.may)) {
			late++
			if late <= 3 {
				t.Errorf("%.1f s after the fault: %v", sample.Began.Sub(from).Seconds(), sample.Err)
			}
		}
	}
	lost := f.lost(t, o.Acknowledged())
	fmt.Fprintf(&f.table, "| %s | %d | %d | %s | %.1f s | %d | %.1f s | %.1f s |\n", one.name, len(o.Samples), len(failed),
		loadtest.Reasons(failed), o.Gap().Seconds(), len(lost), last.Seconds(), whole.Seconds())
	require.NotEmpty(t, o.Acknowledged())
	require.Empty(t, lost, "certificates that clients have and the database does not know")
	require.Zero(t, late, "requests failed that the fault does not excuse")
}

// lost are the serials that are not in the database.
func (f *faults) lost(t *testing.T, acknowledged []string) []string {
	t.Helper()
	known := map[string]bool{}
	for serial := range strings.Lines(f.SQL("select convert_from(nkey, 'UTF8') from public.x509_certs")) {
		known[strings.TrimSpace(serial)] = true
	}
	var lost []string
	for _, serial := range acknowledged {
		if !known[serial] {
			lost = append(lost, serial)
		}
	}
	return lost
}

// requireWhole waits until each service is healthy again and each replica in the edge.
func (f *faults) requireWhole(t *testing.T, patience time.Duration) {
	t.Helper()
	var lacks string
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		if lacks = f.lacks(t); lacks == "" {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	require.Fail(t, "the stack is not whole", "after %s: %s", patience, lacks)
}

func (f *faults) lacks(t *testing.T) string {
	t.Helper()
	var all []stack.Container
	require.NoError(t, json.Unmarshal([]byte(f.Inspect()), &all))
	replicas := 0
	for _, c := range all {
		if c.State.Health == nil {
			continue // a one-shot
		}
		if c.State.Status != "running" || c.State.Health.Status != "healthy" {
			return fmt.Sprintf("%s is %s, %s", c.Name, c.State.Status, c.State.Health.Status)
		}
		if serviceOf(c) == "step-ca" {
			replicas++
		}
	}
	said := f.Compose("exec", "-T", "caddy", "caddy", "upstreams", "--json")
	if said.Code != 0 {
		return said.String()
	}
	var upstreams []struct{ Upstream, Address, State, Error string }
	if err := json.Unmarshal([]byte(said.Stdout), &upstreams); err != nil {
		return err.Error()
	}
	ready := 0
	for _, u := range upstreams {
		if !strings.HasPrefix(u.Upstream, "step-ca") {
			continue
		}
		if u.State != "ready" {
			return fmt.Sprintf("%s is %s: %s", u.Address, u.State, u.Error)
		}
		ready++
	}
	if ready != replicas {
		return fmt.Sprintf("%d of %d replicas are in the edge", ready, replicas)
	}
	return ""
}

func (f *faults) kill(t *testing.T, service string, i int) {
	t.Helper()
	killed(t, containersOf(t, f.Stack, service)[i])
}

// killed kills the first process of a container from outside: "docker kill" would count as
// a stop by hand, which no restart follows. It ends when the process is gone.
func killed(t *testing.T, c stack.Container) {
	t.Helper()
	require.NoError(t, syscall.Kill(c.State.Pid, syscall.SIGKILL))
	require.Eventually(t, func() bool { return errors.Is(syscall.Kill(c.State.Pid, 0), syscall.ESRCH) }, 10*time.Second, time.Millisecond)
}

// restart stops a container in good order and starts it again.
func (f *faults) restart(t *testing.T, service string) {
	t.Helper()
	f.Compose("restart", "--no-deps", service).OK(t)
}

// clocks asks with tokens of clients whose clocks are wrong.
func (f *faults) clocks(t *testing.T) {
	t.Helper()
	ca := openCA(t, f.Stack)
	for name, c := range map[string]struct {
		off    time.Duration
		served bool
	}{
		"a day behind":     {-24 * time.Hour, false},
		"an hour behind":   {-time.Hour, false},
		"a minute behind":  {-time.Minute, true}, // the token is good for five
		"half a minute on": {30 * time.Second, true},
		"an hour on":       {time.Hour, false},
		"a day on":         {24 * time.Hour, false},
	} {
		operation, err := ca.Signing("clock.e2e.test", func() time.Time { return time.Now().Add(c.off) })
		require.NoError(t, err)
		serial, err := operation(t.Context())
		if c.served {
			require.NoError(t, err, name)
			require.NotEmpty(t, serial, name)
			continue
		}
		refused := new(loadtest.StatusError)
		require.ErrorAs(t, err, &refused, name)
		require.Equal(t, 401, refused.Code, name)
	}
}

// connections are those that are held open.
type connections struct {
	mu      sync.Mutex
	open    []net.Conn
	refused atomic.Int64
	ended   context.CancelFunc
}

func (c *connections) keep(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open = append(c.open, conn)
}

func (c *connections) close() {
	if c.ended != nil {
		c.ended()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.open {
		_ = conn.Close() // the other side may have been faster
	}
	c.open = nil
}

func (f *faults) dial(ctx context.Context) (net.Conn, error) {
	return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp4", f.Address())
}

// connect opens connections up to the end of the handshake with step-ca, and holds those
// that get there.
func (f *faults) connect(t *testing.T, n int, dial func(context.Context) (net.Conn, error)) *connections {
	t.Helper()
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM([]byte(contentOf(t, f.Trust(), "root_ca.crt"))))
	config := &tls.Config{RootCAs: pool, ServerName: stack.Domain, MinVersion: tls.VersionTLS13}
	c := new(connections)
	var g errgroup.Group
	g.SetLimit(64)
	for range n {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			conn, err := dial(ctx)
			if err != nil {
				c.refused.Add(1)
				return nil // counted
			}
			if err := tls.Client(conn, config).HandshakeContext(ctx); err != nil {
				c.refused.Add(1)
				_ = conn.Close() // at the end of its time the handshake has done so
				return nil
			}
			c.keep(conn)
			return nil
		})
	}
	require.NoError(t, g.Wait())
	return c
}

// slow opens connections that use as much of the CA's patience as they can.
func (f *faults) slow(t *testing.T) *connections {
	t.Helper()
	c := f.connect(t, 200, f.dial) // which then say nothing
	ctx, cancel := context.WithCancel(t.Context())
	c.ended = cancel
	hold := func(say func(conn net.Conn)) {
		conn, err := f.dial(ctx)
		require.NoError(t, err)
		c.keep(conn)
		go say(conn)
	}
	for range 300 {
		hold(func(conn net.Conn) {
			// The beginning of a record that holds a ClientHello (RFC 8446 section 5.1).
			for _, b := range []byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, 0, 0, 0, 0, 0, 0, 0} {
				if _, err := conn.Write([]byte{b}); err != nil {
					return
				}
				select {
				case <-ctx.Done():
					return
				case <-time.After(time.Second):
				}
			}
		})
		hold(func(conn net.Conn) {
			_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: ca\r\n\r\n") // it is closed, sooner or later
		})
	}
	return c
}

// elsewhere runs a fault on a stack of its own.
func (f *faults) elsewhere(t *testing.T, settings stack.Settings, prepare func(*faults) fault) {
	t.Helper()
	s := stack.New(t, settings)
	s.Up()
	other := newFaults(t, s)
	other.table.Reset()
	other.run(t, prepare(other))
	f.table.WriteString(other.table.String())
}

// noDescriptor takes all descriptors of an edge that has few.
func noDescriptor(t *testing.T, f *faults) {
	t.Helper()
	f.elsewhere(t, stack.Settings{"COMPOSE_FILE": "docker-compose.yml:tools/e2e/load/descriptors.yml"}, func(f *faults) fault {
		var crowd *connections
		return fault{
			name: "no descriptor left at the edge for 10 s", may: restarted, outage: true, lasts: 10 * time.Second,
			strike: func(t *testing.T) {
				t.Helper()
				crowd = f.connect(t, 400, f.dial)
				require.Positive(t, crowd.refused.Load(), "there were descriptors enough")
			},
			mend: func(t *testing.T) { t.Helper(); crowd.close() },
		}
	})
}

// diskFull fills the disk of a database, which is a small one, and makes room again.
func diskFull(t *testing.T, f *faults) {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.Mkdir(disk, 0o700))
	require.NoError(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "size=400m,mode=0700,uid=999,gid=999"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(disk, 0)) }) // after the stack has left it
	fill := filepath.Join(disk, "somebody else's file")
	f.elsewhere(t, stack.Settings{"COMPOSE_FILE": "docker-compose.yml:tools/e2e/load/disk.yml", "E2E_DISK": disk}, func(f *faults) fault {
		return fault{
			name: "the disk of postgres is full for 15 s", may: restarted, outage: true, lasts: 15 * time.Second,
			strike: func(t *testing.T) {
				t.Helper()
				file, err := os.Create(fill)
				require.NoError(t, err)
				_, err = io.Copy(file, zeros{})
				require.ErrorIs(t, err, syscall.ENOSPC)
				require.NoError(t, file.Close())
			},
			mend: func(t *testing.T) {
				t.Helper()
				require.Contains(t, f.Logs("postgres"), "No space left on device")
				require.NoError(t, os.Remove(fill))
			},
		}
	})
}

// zeros never end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
