package e2e_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
	loadtest "github.com/infra-pki/infra-pki/tools/e2e/load"
)

// BenchmarkStack measures one stack from nothing and prints Markdown tables, as
// they stand in BENCHMARKS.md. Nothing is asserted: times depend on the machine.
func BenchmarkStack(b *testing.B) {
	s := stack.New(b, nil)
	first := s.Up().Took
	firstInit := inContainer(s, "provisioner-init")
	migrate := inContainer(s, "db-migrate")
	again := s.Up().Took
	secondInit := inContainer(s, "provisioner-init")
	s.Compose("stop", "--timeout", "10").OK(b)
	restart := s.Up().Took
	b.ReportMetric(first.Seconds(), "s/first-up")
	b.ReportMetric(again.Seconds(), "s/second-up")
	b.ReportMetric(0, "ns/op") // there is one round

	var out strings.Builder
	fmt.Fprintf(&out, "\n%s\n", machine(b))
	table := func(head ...string) {
		fmt.Fprintf(&out, "\n| %s |\n|%s\n", strings.Join(head, " | "), strings.Repeat("---|", len(head)))
	}
	table("time", "seconds")
	for _, row := range []struct {
		what string
		took time.Duration
	}{
		{"`docker compose up -d --wait` from nothing to healthy", first},
		{"the same on a running stack", again},
		{"the same after `docker compose stop`", restart},
		{"`db-migrate`, first run, in its container", migrate},
		{"`provisioner-init`, first run, in its container", firstInit},
		{"`provisioner-init`, second run, in its container", secondInit},
	} {
		fmt.Fprintf(&out, "| %s | %.2f |\n", row.what, row.took.Seconds())
	}

	table("container", "memory", "processes")
	for _, name := range staying {
		line := stack.Docker(b, "stats", "--no-stream", "--format", "{{.MemUsage}}|{{.PIDs}}", s.Containers()[name].ID).OK(b).Stdout
		usage, pids, _ := strings.Cut(strings.TrimSpace(line), "|")
		memory, _, _ := strings.Cut(usage, " / ")
		fmt.Fprintf(&out, "| %s | %s | %s |\n", name, memory, pids)
	}

	table("image", "MB")
	for _, image := range strings.Fields(s.Compose("config", "--images").OK(b).Stdout) {
		if row := imageRow(b, image); !strings.Contains(out.String(), row) {
			out.WriteString(row)
		}
	}
	fmt.Println(out.String())
}

func imageRow(b *testing.B, image string) string {
	b.Helper()
	size, err := strconv.ParseFloat(strings.TrimSpace(stack.Docker(b, "image", "inspect", "--format", "{{.Size}}", image).OK(b).Stdout), 64)
	require.NoError(b, err)
	note := ""
	if builtHere(b, image) {
		note = " (built by tools/airgap)"
	}
	return fmt.Sprintf("| %s%s | %.0f |\n", image, note, size/1e6)
}

// builtHere tells whether an image, or that of a container, is a look-alike.
func builtHere(tb testing.TB, object string) bool {
	tb.Helper()
	return stack.Docker(tb, "inspect", "--format", `{{index .Config.Labels "infra-pki.look-alike"}}`, object).OK(tb).Stdout == "true\n"
}

// inContainer is how long the last run of a one-shot has taken: from the start of
// its process to the end of its container.
func inContainer(s *stack.Stack, service string) time.Duration {
	state := s.Containers()[service].State
	return state.FinishedAt.Sub(state.StartedAt)
}

func machine(b *testing.B) string {
	b.Helper()
	field := func(file, name string) string {
		data, err := os.ReadFile(file)
		require.NoError(b, err)
		for line := range strings.Lines(string(data)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
				return strings.TrimSpace(value)
			}
		}
		return "unknown"
	}
	kernel, err := exec.CommandContext(b.Context(), "uname", "-sr").Output()
	require.NoError(b, err)
	memory, err := strconv.Atoi(strings.Fields(field("/proc/meminfo", "MemTotal"))[0])
	require.NoError(b, err)
	engine := stack.Docker(b, "info", "--format", "{{.ServerVersion}}, {{.Driver}}").OK(b).Stdout
	compose := stack.Docker(b, "compose", "version", "--short").OK(b).Stdout
	return fmt.Sprintf("%s: %s, %d cores, %.0f GB, %s, Docker Engine %s, Compose %s", time.Now().Format(time.DateOnly),
		field("/proc/cpuinfo", "model name"), runtime.NumCPU(), float64(memory)/1e6, strings.TrimSpace(string(kernel)),
		strings.TrimSpace(engine), strings.TrimSpace(compose))
}

const (
	warmUp = time.Second
	cell   = 7 * time.Second

	// Ours, and stock parts beside it.
	loadFile = "docker-compose.yml:tools/e2e/load/stock.yml"
)

// Clients of a benchmark are one address, and as many as they are.
var unlimited = stack.Settings{"EDGE_MAX_PER_ADDRESS": "7000", "EDGE_RATE_PER_ADDRESS": "1000000"}

// BenchmarkIssuance holds the stack against stock parts, plainly wired, and prints
// what each of them does for 1 to 1000 clients. All have the same two cores, shared with
// the clients; only one wiring runs at a time. Clients connect to the address of a
// container, as those of another machine do in the end: what the Docker daemon's proxy
// costs, which stands in for connections of this machine alone, is not measured.
func BenchmarkIssuance(b *testing.B) {
	stack.NeedRoot(b, "to answer challenges on port 80")
	s := stack.New(b, merge(unlimited, stack.Settings{"COMPOSE_FILE": loadFile}))
	s.Up()
	own := strings.Fields(s.Compose("ps", "--services", "--status", "running").OK(b).Stdout)
	responder := respond(b, s)
	base := openCA(b, s)
	b.ReportMetric(0, "ns/op") // there is one round

	wirings := []struct {
		name, front, network string
		services             []string
	}{
		{"this stack, through its edge", "caddy", "edge", own},
		{"step-ca on PostgreSQL", "stock-postgresql", "ca", []string{"stock-postgresql", "stock-postgres"}},
		{"step-ca on Badger", "stock-badger", "ca", []string{"stock-badger"}},
	}
	kinds := []struct {
		name    string
		clients []int
		prepare func(ctx context.Context, ca *loadtest.CA, i int) (loadtest.Operation, error)
	}{
		{"JWK sign", []int{1, 32, 200, 1000}, func(_ context.Context, ca *loadtest.CA, i int) (loadtest.Operation, error) {
			return ca.Signing(fmt.Sprintf("sign-%d.e2e.test", i), time.Now)
		}},
		{"mTLS renew", []int{1, 32, 200, 1000}, func(ctx context.Context, ca *loadtest.CA, i int) (loadtest.Operation, error) {
			return ca.Renewing(ctx, fmt.Sprintf("renew-%d.e2e.test", i))
		}},
		{"ACME order, http-01", []int{1, 32, 200, 1000}, func(ctx context.Context, ca *loadtest.CA, _ int) (loadtest.Operation, error) {
			return ca.Ordering(ctx, responder)
		}},
	}
	rows := map[string][]string{}
	running := own
	for _, w := range wirings {
		for _, kind := range kinds {
			// Each kind finds its wiring fresh: what a thousand clients have left behind
			// takes minutes in some.
			s.Compose(append([]string{"stop", "--timeout", "10"}, running...)...).OK(b)
			s.Compose(append([]string{"up", "-d", "--wait"}, w.services...)...).OK(b)
			running = w.services
			ca := base.At(onNetwork(b, s, containersOf(b, s, w.front)[0], w.network))
			answers := func() bool {
				_, err := ca.Asking("/health")(b.Context())
				return err == nil
			}
			var pids []int
			for _, service := range w.services {
				for _, c := range containersOf(b, s, service) {
					pids = append(pids, c.State.Pid)
				}
			}
			for _, clients := range kind.clients {
				require.Eventually(b, answers, 30*time.Second, 100*time.Millisecond, "%s does not answer", w.name)
				operations, err := prepareAll(b.Context(), clients, func(ctx context.Context, i int) (loadtest.Operation, error) {
					return kind.prepare(ctx, ca, i)
				})
				require.NoError(b, err, "%s, %s, %d clients", w.name, kind.name, clients)
				rows[kind.name] = append(rows[kind.name], fmt.Sprintf("| %d | %s %s", clients, w.name, measure(b, operations, pids)))
				b.Log(kind.name, rows[kind.name][len(rows[kind.name])-1])
			}
		}
	}
	fmt.Printf("\n%s\n", machine(b))
	for _, kind := range kinds {
		fmt.Printf("\n| %s: clients | wiring | per second | p50 | p99 | failed | CPU each |\n|---|---|---|---|---|---|---|\n", kind.name)
		for i := range kind.clients { // by number of clients, so that what compares stands together
			for w := range wirings {
				fmt.Println(rows[kind.name][w*len(kind.clients)+i])
			}
		}
	}
}

// prepareAll makes clients, a few at a time: some have to ask for something first.
func prepareAll(ctx context.Context, n int, prepare func(ctx context.Context, i int) (loadtest.Operation, error)) ([]loadtest.Operation, error) {
	all := make([]loadtest.Operation, n)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range all {
		g.Go(func() (err error) {
			all[i], err = prepare(ctx, i)
			return err
		})
	}
	return all, g.Wait()
}

// measure is a row: rate, times, failures, and the processor time that the containers
// with these first processes took for each success.
func measure(b *testing.B, operations []loadtest.Operation, pids []int) string {
	b.Helper()
	lasting := func(d time.Duration) loadtest.Outcome {
		ctx, cancel := context.WithTimeout(b.Context(), d)
		defer cancel()
		return loadtest.Run(ctx, operations)
	}
	lasting(warmUp)
	before, err := loadtest.CPU(pids...)
	require.NoError(b, err)
	o := lasting(cell)
	after, err := loadtest.CPU(pids...)
	require.NoError(b, err)
	failed := o.Failed()
	reasons := "0"
	if len(failed) > 0 {
		reasons = fmt.Sprintf("%.0f %%: %s", 100*float64(len(failed))/float64(len(o.Samples)), loadtest.Reasons(failed))
	}
	each := "-"
	if ok := len(o.Samples) - len(failed); ok > 0 {
		each = fmt.Sprintf("%.2f ms", float64((after-before).Microseconds())/1000/float64(ok))
	}
	return fmt.Sprintf("| %.0f | %s | %s | %s | %s |", o.Rate(), readable(o.Quantile(0.5)), readable(o.Quantile(0.99)), reasons, each)
}

func readable(d time.Duration) string {
	if d >= time.Second {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
}

// respond answers challenges at an address of this machine that step-ca reaches.
func respond(tb testing.TB, s *stack.Stack) *loadtest.Responder {
	tb.Helper()
	gateway := stack.Docker(tb, "network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", s.Project+"_egress").OK(tb)
	address, err := netip.ParseAddr(strings.TrimSpace(gateway.Stdout))
	require.NoError(tb, err)
	r, err := loadtest.Respond(tb.Context(), address)
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, r.Close()) })
	return r
}

// BenchmarkEdge holds the edge against haproxy and nginx, before the same replicas,
// with the same allow-list, a look at the ClientHello and a log line for each connection.
// The three take turns, so that what else this machine does meets all of them.
func BenchmarkEdge(b *testing.B) {
	const turns = 5
	dir := b.TempDir()
	require.NoError(b, os.Chmod(dir, 0o755)) //nolint:gosec // G302: read by another user
	s := stack.New(b, merge(unlimited, stack.Settings{"COMPOSE_FILE": loadFile, "E2E_EDGES": dir}))
	s.Up()
	base := openCA(b, s)
	b.ReportMetric(0, "ns/op") // there is one round

	var haproxy, nginx strings.Builder
	for i, c := range containersOf(b, s, "step-ca") {
		at := onNetwork(b, s, c, "ca")
		fmt.Fprintf(&haproxy, "  server ca%d %s check\n", i, at)
		fmt.Fprintf(&nginx, "    server %s;\n", at)
	}
	for name, content := range map[string]string{
		"haproxy.cfg": `global
  log stdout format raw local0
  maxconn 7000
defaults
  mode tcp
  log global
  option tcplog
  timeout connect 5s
  timeout client 5m
  timeout server 5m
frontend ca
  bind :9000
  tcp-request connection reject unless { src ` + s.Gateway.String() + ` }
  tcp-request inspect-delay 3s
  tcp-request content accept if { req.ssl_hello_type 1 }
  tcp-request content reject
  default_backend replicas
backend replicas
  balance roundrobin
` + haproxy.String(),
		"nginx.conf": `load_module /usr/lib/nginx/modules/ngx_stream_module.so;
worker_processes auto;
pid /run/nginx.pid;
error_log stderr;
events {
  worker_connections 16384;
}
stream {
  log_format connection '$time_iso8601 $remote_addr $status $bytes_sent $bytes_received $session_time $upstream_addr';
  access_log /dev/stdout connection;
  upstream replicas {
` + nginx.String() + `  }
  server {
    listen 9000;
    allow ` + s.Gateway.String() + `;
    deny all;
    ssl_preread on;
    preread_timeout 3s;
    proxy_connect_timeout 5s;
    proxy_pass replicas;
  }
}
`,
	} {
		require.NoError(b, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644)) //nolint:gosec // G306: read by another user
	}
	edges := []string{"caddy", "haproxy", "nginx"}
	s.Compose("up", "-d", "--no-deps", "haproxy", "nginx").OK(b)

	fmt.Printf("\n%s\n\n| 32 clients | edge | per second | p50 | p99 | failed | CPU each, of the edge | rate, haproxy = 1 |\n|---|---|---|---|---|---|---|---|\n", machine(b))
	for _, kind := range []struct {
		name    string
		prepare func(ca *loadtest.CA, i int) (loadtest.Operation, error)
	}{
		{"`GET /health`", func(ca *loadtest.CA, _ int) (loadtest.Operation, error) { return ca.Asking("/health"), nil }},
		{"JWK sign", func(ca *loadtest.CA, i int) (loadtest.Operation, error) {
			return ca.Signing(fmt.Sprintf("edge-%d.e2e.test", i), time.Now)
		}},
	} {
		type result struct {
			outcome loadtest.Outcome
			took    time.Duration
			cpu     time.Duration
		}
		results := map[string]*result{}
		for turn := range turns {
			for i := range edges {
				edge := edges[(turn+i)%len(edges)]
				c := containersOf(b, s, edge)[0]
				ca := base.At(onNetwork(b, s, c, "edge"))
				operations, err := prepareAll(b.Context(), 32, func(_ context.Context, i int) (loadtest.Operation, error) { return kind.prepare(ca, i) })
				require.NoError(b, err)
				if results[edge] == nil {
					results[edge] = &result{}
				}
				r := results[edge]
				before, err := loadtest.CPU(c.State.Pid)
				require.NoError(b, err)
				ctx, cancel := context.WithTimeout(b.Context(), 4*time.Second)
				o := loadtest.Run(ctx, operations)
				cancel()
				after, err := loadtest.CPU(c.State.Pid)
				require.NoError(b, err)
				r.outcome.Samples = append(r.outcome.Samples, o.Samples...)
				r.took += o.Ended.Sub(o.Began)
				r.cpu += after - before
			}
		}
		rate := func(edge string) float64 {
			r := results[edge]
			return float64(len(r.outcome.Samples)-len(r.outcome.Failed())) / r.took.Seconds()
		}
		for _, edge := range edges {
			r := results[edge]
			fmt.Printf("| %s | %s | %.0f | %s | %s | %d %s | %.2f ms | %.3f |\n", kind.name, edge, rate(edge),
				readable(r.outcome.Quantile(0.5)), readable(r.outcome.Quantile(0.99)), len(r.outcome.Failed()), loadtest.Reasons(r.outcome.Failed()),
				float64(r.cpu.Microseconds())/1000/float64(len(r.outcome.Samples)), rate(edge)/rate("haproxy"))
		}
	}
}
