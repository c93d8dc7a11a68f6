package edge

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/pires/go-proxyproto"
	"github.com/stretchr/testify/require"
)

func TestBalancerReadsItsList(t *testing.T) {
	for name, tc := range map[string]struct {
		block   string
		ranges  []string
		problem string
	}{
		"one line with several ranges": {block: "{\n remote_ip 10.0.5.0/24 2001:db8::7\n}", ranges: []string{"10.0.5.0/24", "2001:db8::7"}},
		"none":                         {block: "{\n none\n}"},
		"no block":                     {problem: "the list of balancers is empty"},
		"an empty block":               {block: "{\n}", problem: "the list of balancers is empty"},
		"no range":                     {block: "{\n remote_ip\n}", problem: "remote_ip without a range"},
		"two lines":                    {block: "{\n remote_ip 10.0.0.1\n remote_ip 10.0.0.2\n}", problem: "a second line"},
		"some and none":                {block: "{\n remote_ip 10.0.0.1\n none\n}", problem: `a second line, "none"`},
		"none of something":            {block: "{\n none 10.0.0.1\n}", problem: "wrong argument count"},
		"another matcher":              {block: "{\n tls\n}", problem: `unexpected "tls"`},
		"ranges on the wrong line":     {block: "10.0.0.1", problem: "wrong argument count"},
	} {
		t.Run(name, func(t *testing.T) {
			var b Balancer
			err := b.UnmarshalCaddyfile(caddyfile.NewTestDispenser("edge_balancer " + tc.block))
			if tc.problem != "" {
				require.ErrorContains(t, err, tc.problem)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.ranges, b.Ranges)
		})
	}
}

// header speaks of a client's connection to the edge.
func header(tb testing.TB, version byte, client string) []byte {
	tb.Helper()
	from := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(client))
	to := &net.TCPAddr{IP: net.ParseIP("192.0.2.200"), Port: 9000}
	if from.IP.To4() == nil {
		to.IP = net.ParseIP("2001:db8::200")
	}
	b, err := proxyproto.HeaderProxyFromAddrs(version, from, to).Format()
	require.NoError(tb, err)
	return b
}

// The balancers, two of them so that no source has too many lines in the log.
const (
	balancer = "127.0.0.20"
	other    = "127.0.0.21"
)

func TestHeaderOfABalancerIsBelievedAndNobodyElses(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	// Neither balancer nor loopback is on the list; the client behind it is.
	e := newEdge(t, ca, up.addr, "remote_ip 127.0.0.2 203.0.113.0/24 2001:db8:1::/48\n")
	write(t, e.balancers, "remote_ip "+balancer+" "+other+"\n")
	e.run(t)
	e.waitForLog(t, `"state":"ready"`)
	inside, outside := "203.0.113.5:4711", "198.51.100.6:4711"
	inside6 := "[2001:db8:1:2:3::4]:4711"

	for name, tc := range map[string]struct {
		from   string
		header []byte
		line   string // of the log
		served bool
	}{
		"an admitted client, version 1":          {balancer, header(t, 1, inside), `"decision":"admitted","remote":"` + inside + `","source":"203.0.113.5"`, true},
		"an admitted client, version 2":          {balancer, header(t, 2, inside), `"decision":"admitted","remote":"` + inside + `","source":"203.0.113.5"`, true},
		"an admitted client over IPv6":           {balancer, header(t, 1, inside6), `"decision":"admitted","remote":"` + inside6 + `","source":"2001:db8:1:2::/64"`, true},
		"IPv4 within IPv6":                       {balancer, []byte("PROXY TCP6 ::ffff:203.0.113.5 2001:db8::200 4711 9000\r\n"), `"decision":"admitted","remote":"203.0.113.5:4711","source":"203.0.113.5"`, true},
		"a client that is not on the list":       {balancer, header(t, 1, outside), `"decision":"denied","remote":"` + outside + `","source":"198.51.100.6"`, false},
		"the balancer as its own client":         {balancer, header(t, 2, balancer+":1"), `"decision":"denied","remote":"` + balancer + `:1"`, false},
		"a connection of the balancer's own":     {balancer, []byte("PROXY UNKNOWN\r\n"), `"decision":"denied","remote":"LOCAL"`, false},
		"no header":                              {other, nil, `"error":"reading PROXY header: proxyproto: proxy protocol signature not present"`, false},
		"a header that is none":                  {other, []byte("PROXY TCP4 203.0.113.5\r\n"), `"error":"reading PROXY header: proxyproto:`, false},
		"a header without an end":                {other, append([]byte("PROXY "), bytes.Repeat([]byte("x"), 2000)...), `"error":"reading PROXY header: proxyproto:`, false},
		"a header for UDP":                       {other, udpHeader(t), `is no TCP address`, false},
		"two headers":                            {balancer, append(header(t, 1, inside), header(t, 1, inside)...), `"decision":"not-tls","remote":"` + inside + `"`, false},
		"a header from the client itself":        {insider, header(t, 1, inside), `"decision":"not-tls","remote":"LOCAL"`, false},
		"a header from somebody not on the list": {outsider, header(t, 1, inside), `"decision":"denied","remote":"LOCAL"`, false},
		"version 2 from the client itself":       {insider, header(t, 2, inside), `"decision":"not-tls","remote":"LOCAL"`, false},
		"no header from the client itself":       {insider, nil, `"decision":"admitted","remote":"LOCAL"`, true},
	} {
		t.Run(name, func(t *testing.T) {
			conn := e.dial(t, tc.from)
			_, err := conn.Write(tc.header)
			require.NoError(t, err)
			if tc.served {
				body, err := get(conn, ca.clientConfig(t), "/whoami")
				require.NoError(t, err)
				require.Equal(t, "client of the test", body)
			} else {
				requireClosed(t, conn, recordHello(t))
			}
			e.waitForLog(t, strings.Replace(tc.line, "LOCAL", conn.LocalAddr().String(), 1))
		})
	}

	t.Run("a header in pieces", func(t *testing.T) {
		conn := e.dial(t, balancer)
		for _, b := range header(t, 2, inside) {
			_, err := conn.Write([]byte{b})
			require.NoError(t, err)
			time.Sleep(time.Millisecond)
		}
		_, err := get(conn, ca.clientConfig(t), "/whoami")
		require.NoError(t, err)
	})
	t.Run("a balancer that sends nothing", func(t *testing.T) {
		conn := e.dial(t, other)
		start := time.Now()
		require.NoError(t, conn.SetReadDeadline(start.Add(5*time.Second)))
		_, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.InDelta(t, headerTimeout.Seconds(), time.Since(start).Seconds(), 0.7)
		e.waitForLog(t, `"remote":"`+conn.LocalAddr().String()+`"`)
	})
	t.Run("a balancer that only looks whether the port is open", func(t *testing.T) {
		conn := e.dial(t, other)
		require.NoError(t, conn.CloseWrite())
		_, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.NotContains(t, e.log(), conn.LocalAddr().String())
	})
	t.Run("the limits are those of the client", func(t *testing.T) {
		write(t, e.limits, "max_connections 100\nmax_per_source 1\nrate_per_source 100\n")
		out, err := e.reload(t)
		require.NoError(t, err, out)
		for i := range 3 { // through one balancer
			conn := e.dial(t, balancer)
			_, err := conn.Write(header(t, 2, fmt.Sprintf("203.0.113.%d:1", 50+i)))
			require.NoError(t, err)
			require.NoError(t, tls.Client(conn, ca.clientConfig(t)).HandshakeContext(t.Context()))
		}
		conn := e.dial(t, balancer)
		_, err = conn.Write(header(t, 2, "203.0.113.50:2"))
		require.NoError(t, err)
		requireClosed(t, conn, nil)
		e.waitForLog(t, `"decision":"limited","remote":"203.0.113.50:2"`)
	})
	t.Run("half-close", func(t *testing.T) {
		conn := e.dial(t, balancer)
		_, err := conn.Write(append(header(t, 1, "203.0.113.77:1"), recordHello(t)...))
		require.NoError(t, err)
		require.NoError(t, conn.CloseWrite())
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(5*time.Second)))
		all, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.NotEmpty(t, all, "a ServerHello")
	})
}

func udpHeader(tb testing.TB) []byte {
	tb.Helper()
	b, err := proxyproto.HeaderProxyFromAddrs(2, &net.UDPAddr{IP: net.IPv4(203, 0, 113, 5), Port: 1}, &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 2}).Format()
	require.NoError(tb, err)
	return b
}
