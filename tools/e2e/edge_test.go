package e2e_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// dial is how somebody reaches the published port.
type dial func(ctx context.Context) (net.Conn, error)

// from is a machine's way to an address of this one.
func from(h *stack.Host, to netip.Addr, s *stack.Stack) dial {
	return func(ctx context.Context) (net.Conn, error) {
		return h.Dial(ctx, "tcp", net.JoinHostPort(to.String(), strconv.Itoa(s.Port)))
	}
}

func locally(address string) dial {
	return func(ctx context.Context) (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, "tcp", address) }
}

// counted counts what a connection brings.
type counted struct {
	net.Conn
	read int
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.read += n
	return n, err
}

// requireServed demands an answer of the CA that verifies against the root.
func requireServed(t *testing.T, s *stack.Stack, how dial) {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots(t, s), MinVersion: tls.VersionTLS12},
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return how(ctx) },
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL()+"/health", http.NoBody)
	require.NoError(t, err)
	resp, err := client.Do(req)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusOK, resp.StatusCode)
}

// requireNoByte demands that a client that says hello and one that is silent get
// their connections closed, or none at all, and not a single byte. It returns the
// clients' own addresses.
func requireNoByte(t *testing.T, how dial) []string {
	t.Helper()
	var locals []string
	for _, hello := range []bool{true, false} {
		conn, err := how(t.Context())
		if errors.Is(err, syscall.ECONNREFUSED) {
			continue
		}
		require.NoError(t, err)
		locals = append(locals, conn.LocalAddr().String())
		c := &counted{Conn: conn}
		require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		if hello {
			err = tls.Client(c, &tls.Config{ServerName: stack.Domain, MinVersion: tls.VersionTLS12}).HandshakeContext(t.Context())
		} else {
			_, err = c.Read(make([]byte, 1))
		}
		require.Error(t, err)
		require.NotErrorIs(t, err, context.DeadlineExceeded)
		var timeout net.Error
		require.False(t, errors.As(err, &timeout) && timeout.Timeout(), "the connection stays open: %v", err)
		require.Zero(t, c.read, "bytes came")
		require.NoError(t, c.Close())
	}
	return locals
}

// requireDenials demands that Caddy logs a refusal with each of the addresses.
func requireDenials(t *testing.T, s *stack.Stack, remotes ...string) {
	t.Helper()
	require.NotEmpty(t, remotes, "nobody was refused by Caddy")
	var log string
	require.Eventually(t, func() bool {
		log = s.Logs("caddy")
		for _, remote := range remotes {
			if !denied(log, remote) {
				return false
			}
		}
		return true
	}, 10*time.Second, 200*time.Millisecond, "no refusal of %q in: %s", remotes, log)
}

func denied(log, remote string) bool {
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"decision":"denied"`) && strings.Contains(line, strconv.Quote(remote)) {
			return true
		}
	}
	return false
}

func TestTheAllowListDecidesByTheClientsAddress(t *testing.T) {
	s := stack.Shared(t)
	one, other := stack.NewHost(t), stack.NewHost(t)
	containers := s.Containers()
	t.Cleanup(func() { s.Make("init").OK(t) }) // after the old list is back

	refused := requireNoByte(t, from(one, one.Router, s))
	require.Len(t, refused, 2)
	require.Equal(t, one.Addr, netip.MustParseAddrPort(refused[0]).Addr())
	requireDenials(t, s, refused...)
	requireServed(t, s, locally(s.Address())) // as the gateway

	s.Change(t, stack.Settings{"ALLOWED_IPS": fmt.Sprintf("%s, %s", s.Gateway, one.Addr)})
	s.Make("init").OK(t)
	requireServed(t, s, from(one, one.Router, s))
	requireDenials(t, s, requireNoByte(t, from(other, other.Router, s))...)

	// The decision flips, by a CIDR this time.
	s.Change(t, stack.Settings{"ALLOWED_IPS": fmt.Sprintf("%s\n%s", s.Gateway, other.Subnet)})
	s.Make("init").OK(t)
	requireServed(t, s, from(other, other.Router, s))
	requireDenials(t, s, requireNoByte(t, from(one, one.Router, s))...)

	// Without the gateway, this machine itself is outside.
	s.Change(t, stack.Settings{"ALLOWED_IPS": other.Addr.String()})
	s.Make("init").OK(t)
	requireNoByte(t, locally(s.Address()))
	requireServed(t, s, from(other, other.Router, s))

	requireSameProcesses(t, containers, s.Containers())
}

func TestIPv6IsRefusedWhereTheEdgeHasNone(t *testing.T) {
	s := stack.Shared(t)
	host := stack.NewHost(t)
	for _, how := range []dial{
		from(host, host.Router6, s),
		locally(net.JoinHostPort("::1", strconv.Itoa(s.Port))),
	} {
		_, err := how(t.Context())
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
	}
}

func TestIPv6IsSubjectToTheAllowListWhereTheEdgeHasIt(t *testing.T) {
	host := stack.NewHost(t)
	s := stack.New(t, stack.Settings{
		"COMPOSE_FILE": "docker-compose.yml:caddy/ipv6.yml",
		"EDGE_SUBNET6": stack.FreeSubnet6(),
	})
	s.Up()
	requireHealthy(t, s)
	requireServed(t, s, locally(s.Address()))
	requireNoByte(t, from(host, host.Router, s))

	before := strings.Count(s.Logs("caddy"), `"decision":"denied"`)
	clients := requireNoByte(t, from(host, host.Router6, s))
	require.Len(t, clients, 2, "the port is published on IPv6")
	clients = append(clients, requireNoByte(t, locally(net.JoinHostPort("::1", strconv.Itoa(s.Port))))...)
	require.Eventually(t, func() bool {
		return strings.Count(s.Logs("caddy"), `"decision":"denied"`) >= before+len(clients)
	}, 10*time.Second, 200*time.Millisecond, "refusals are missing in the log")

	// On an Engine that passes IPv6 clients through, this one has its own address,
	// on an older one the gateway's: both are let in by name.
	s.Set(stack.Settings{"ALLOWED_IPS": fmt.Sprintf("%s %s %s", s.Gateway, host.Addr6, s.Gateway6())})
	s.Make("init").OK(t)
	requireServed(t, s, from(host, host.Router6, s))
	require.Contains(t, s.Logs("provisioner-init")+s.Compose("run", "--rm", "--no-deps", "-T", "config-check").OK(t).Output(),
		"the gateway of the edge network")
}
