// Package stack runs the compose file of this repository as its users do, under a
// project name, a port and a subnet of its own, and takes all of it away again.
package stack

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
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
)

// Domain is the name of the CA in every stack.
const Domain = "ca.e2e.test"

// Stack is one compose project.
type Stack struct {
	Project string
	Port    int
	Gateway netip.Addr // of the edge network: what connections from this machine come from

	t        testing.TB
	env      *env
	trustDir string
	client   *Client
}

// Repository is the top directory of the checkout.
func Repository() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..", "..", "..")
}

// New prepares a stack with its .env and starts nothing. settings come on top of
// .env.example, the name, the port and passwords with every troublesome character.
// Whatever becomes of it is removed at the end of the test.
func New(tb testing.TB, settings Settings) *Stack {
	tb.Helper()
	Need(tb)
	s, err := prepare(settings)
	require.NoError(tb, err)
	tb.Cleanup(func() {
		if err := removeProject(s.Project); err != nil {
			tb.Errorf("removing stack %s: %v", s.Project, err)
		}
	})
	s.use(tb)
	return s
}

func prepare(settings Settings) (*Stack, error) {
	subnet, err := freeSubnet()
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	s := &Stack{
		Project: fmt.Sprintf("%s%d-%04x", prefix, os.Getpid(), rand.Uint32N(1<<16)), //nolint:gosec // a name, not a secret
		Port:    port, Gateway: subnet.Addr().Next(),
	}
	dir := directory(s.Project)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	s.env, err = newEnv(dir, Settings{
		"DOMAIN_CA":     Domain,
		"CA_PORT":       strconv.Itoa(port),
		"EDGE_SUBNET":   subnet.String(),
		"ALLOWED_IPS":   s.Gateway.String(),
		"PKI_DNS_NAMES": "",
	}, settings)
	return s, err
}

// use makes t the test that failures of the stack belong to. If it fails, it shows
// what the services have said meanwhile.
func (s *Stack) use(tb testing.TB) {
	tb.Helper()
	s.t = tb
	begin := time.Now()
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("the services of %s say:\n%s", s.Project, s.Redact(s.logs(begin)))
		}
	})
}

// directory is where the .env of a project lies.
func directory(project string) string { return filepath.Join(os.TempDir(), project) }

// Set changes settings in .env. Nothing is applied by it.
func (s *Stack) Set(settings Settings) {
	s.t.Helper()
	require.NoError(s.t, s.env.set(settings))
}

// Change is Set until the end of the test, and then as before.
func (s *Stack) Change(tb testing.TB, settings Settings) {
	tb.Helper()
	before := Settings{}
	for name := range settings {
		before[name] = s.Get(name)
	}
	s.Set(settings)
	tb.Cleanup(func() { s.Set(before) })
}

// Get is the value of a setting.
func (s *Stack) Get(name string) string { return s.env.values[name] }

// EnvFile is the stack's .env.
func (s *Stack) EnvFile() string { return s.env.file }

// compose is the command line of "docker compose" for this stack.
func (s *Stack) compose() []string {
	file := filepath.Join(Repository(), "docker-compose.yml")
	args := []string{"docker", "compose", "-f", file}
	for _, more := range strings.Split(s.env.values["COMPOSE_FILE"], ":") {
		if more != "" && more != "docker-compose.yml" {
			args = append(args, "-f", filepath.Join(Repository(), more))
		}
	}
	return append(args, "--project-directory", Repository(), "--env-file", s.env.file, "-p", s.Project)
}

// Compose runs "docker compose …".
func (s *Stack) Compose(args ...string) Result {
	s.t.Helper()
	full := append(s.compose(), args...)
	r, err := run(working, command{args: full, env: s.env.process()})
	require.NoError(s.t, err)
	r.redact = s.Redact
	return r
}

// Make runs a target of the Makefile on this stack, with variables if there are any.
func (s *Stack) Make(target string, variables ...string) Result {
	s.t.Helper()
	r, err := run(working, command{
		args: append([]string{"make", "--no-print-directory", "-C", Repository(), target, "COMPOSE=" + strings.Join(s.compose(), " ")}, variables...),
		env:  s.env.process(),
	})
	require.NoError(s.t, err)
	r.redact = s.Redact
	return r
}

// Up starts the stack as README says, and expects all of it to become healthy.
func (s *Stack) Up() Result {
	s.t.Helper()
	return s.Compose("up", "-d", "--wait").OK(s.t)
}

// Down stops the stack. Its volumes stay.
func (s *Stack) Down() {
	s.t.Helper()
	if s.client != nil { // is on a network of the stack
		Docker(s.t, "rm", "-f", s.client.id).OK(s.t)
		s.client = nil
	}
	s.Compose("down", "--timeout", "10").OK(s.t)
	s.trustDir = ""
}

// Kill starts a one-shot, kills it some time after it has started, and tells whether
// that was before its end.
func (s *Stack) Kill(service string, after time.Duration) bool {
	s.t.Helper()
	begin := strconv.FormatInt(time.Now().Unix(), 10)
	s.Compose("up", "--no-start", "--no-deps", service).OK(s.t)
	id := s.Containers()[service].ID

	// Docker's event comes at once; Compose returns later than the one-shot does.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	events := exec.CommandContext(ctx, "docker", "events", "--since", begin,
		"--filter", "container="+id, "--filter", "event=start", "--format", "started")
	lines, err := events.StdoutPipe()
	require.NoError(s.t, err)
	require.NoError(s.t, events.Start())
	killed := make(chan error, 1)
	go func() {
		if _, err := lines.Read(make([]byte, 1)); err != nil {
			killed <- err
			return
		}
		time.Sleep(after)
		_, _ = docker("kill", "--signal", "KILL", id) // it may have ended
		killed <- nil
	}()
	s.Compose("up", "-d", "--no-deps", service).OK(s.t)
	require.NoError(s.t, <-killed)
	cancel()
	_ = events.Wait() // was cancelled
	code := strings.TrimSpace(Docker(s.t, "wait", id).OK(s.t).Stdout)
	if code != "0" {
		require.Equal(s.t, "137", code, "exit code of %s", service)
	}
	return code != "0"
}

// Logs is what services have said, all of them if none is named.
func (s *Stack) Logs(services ...string) string {
	s.t.Helper()
	return s.Compose(append([]string{"logs", "--no-color", "--no-log-prefix"}, services...)...).OK(s.t).Stdout
}

func (s *Stack) logs(since time.Time) string {
	r, err := run(working, command{
		args: append(s.compose(), "logs", "--no-color", "--since", since.Format(time.RFC3339)), env: s.env.process(),
	})
	if err != nil {
		return err.Error()
	}
	return r.Stdout + r.Stderr
}

// SQL runs a statement as the database's owner and returns the unadorned rows.
func (s *Stack) SQL(statement string) string {
	s.t.Helper()
	return strings.TrimSpace(s.Compose("exec", "-T", "postgres", "psql", "-v", "ON_ERROR_STOP=1", "-qtAX",
		"-U", s.Get("POSTGRES_USER"), "-d", s.Get("POSTGRES_DB"), "-c", statement).OK(s.t).Stdout)
}

// Address is where the port is published on this machine.
func (s *Stack) Address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Port)) }

// URL is the CA's, as its clients call it.
func (s *Stack) URL() string { return "https://" + net.JoinHostPort(Domain, strconv.Itoa(s.Port)) }

// Gateway6 is what Gateway is, for the subnet in EDGE_SUBNET6.
func (s *Stack) Gateway6() netip.Addr {
	s.t.Helper()
	p, err := netip.ParsePrefix(s.Get("EDGE_SUBNET6"))
	require.NoError(s.t, err)
	return p.Addr().Next()
}

// FreeSubnet6 is a /64 of nobody.
func FreeSubnet6() string {
	return fmt.Sprintf("fd0e:2e:%x:%x::/64", rand.Uint32N(1<<16), rand.Uint32N(1<<16)) //nolint:gosec // any will do
}

func freePort() (int, error) {
	l, err := net.Listen("tcp4", "0.0.0.0:0") //nolint:noctx,gosec // on all addresses, as Docker will
	if err != nil {
		return 0, err
	}
	defer l.Close() //nolint:errcheck // nobody connected
	return l.Addr().(*net.TCPAddr).Port, nil
}

// freeSubnet is a /24 that no interface of this machine is in. The range is not one
// of those that Docker itself takes from.
func freeSubnet() (netip.Prefix, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Prefix{}, err
	}
	for range 100 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 204, byte(rand.UintN(256)), 0}), 24) //nolint:gosec // any will do
		if !taken(p, addrs) {
			return p, nil
		}
	}
	return netip.Prefix{}, errors.New("looking for a free subnet: none in 10.204.0.0/16")
}

func taken(p netip.Prefix, addrs []net.Addr) bool {
	for _, a := range addrs {
		if used, err := netip.ParsePrefix(a.String()); err == nil && used.Overlaps(p) {
			return true
		}
	}
	return false
}
