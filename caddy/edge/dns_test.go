package edge

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"
)

// zone is a name server that knows one name, whichever it is asked for.
type zone struct {
	addr  string
	mu    sync.Mutex
	addrs []netip.Addr
	dead  bool
}

func newZone(t *testing.T, addrs ...string) *zone {
	t.Helper()
	conn, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	z := &zone{addr: conn.LocalAddr().String()}
	z.set(addrs...)
	go z.serve(conn)
	return z
}

// set makes addrs the name's; without any there is no such name.
func (z *zone) set(addrs ...string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.addrs = nil
	for _, addr := range addrs {
		z.addrs = append(z.addrs, netip.MustParseAddr(addr))
	}
}

// fail makes every answer an error that says nothing about the name.
func (z *zone) fail(dead bool) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.dead = dead
}

func (z *zone) serve(conn net.PacketConn) {
	buffer := make([]byte, 1500)
	for {
		n, client, err := conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buffer[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		z.mu.Lock()
		m.Response, m.Additionals = true, nil
		switch {
		case z.dead:
			m.RCode = dnsmessage.RCodeServerFailure
		case len(z.addrs) == 0:
			m.RCode = dnsmessage.RCodeNameError
		}
		for _, addr := range z.addrs {
			if m.RCode == dnsmessage.RCodeSuccess && m.Questions[0].Type == dnsmessage.TypeA {
				m.Answers = append(m.Answers, dnsmessage.Resource{
					Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 600},
					Body:   &dnsmessage.AResource{A: addr.As4()},
				})
			}
		}
		z.mu.Unlock()
		if packed, err := m.Pack(); err == nil {
			_, _ = conn.WriteTo(packed, client)
		}
	}
}

// resolverAt asks the name server at addr and no other.
func resolverAt(addr string) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, network, addr)
	}}
}
