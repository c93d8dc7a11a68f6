package edge

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
	"github.com/stretchr/testify/require"
)

func TestLimitReadsItsNumbers(t *testing.T) {
	for name, tc := range map[string]struct {
		block   string
		problem string
	}{
		"all three":              {block: "{\n max_connections 7000\n max_per_source 5000\n rate_per_source 2000\n}"},
		"in another order":       {block: "{\n rate_per_source 1\n max_connections 1\n max_per_source 1\n}"},
		"no block":               {problem: "no max_connections"},
		"one is missing":         {block: "{\n max_connections 1\n max_per_source 1\n}", problem: "no rate_per_source"},
		"one is there twice":     {block: "{\n max_connections 1\n max_connections 2\n}", problem: "a second max_connections"},
		"one is zero":            {block: "{\n max_connections 0\n}", problem: `max_connections "0"`},
		"one is negative":        {block: "{\n max_per_source -1\n}", problem: `max_per_source "-1"`},
		"one is a word":          {block: "{\n rate_per_source many\n}", problem: `rate_per_source "many"`},
		"two numbers":            {block: "{\n rate_per_source 1 2\n}", problem: "wrong argument count"},
		"no number":              {block: "{\n rate_per_source\n}", problem: "wrong argument count"},
		"another limit":          {block: "{\n max_bytes 1\n}", problem: `unexpected "max_bytes"`},
		"a number on its line":   {block: "5", problem: "wrong argument count"},
		"more than a number has": {block: "{\n max_connections 99999999999999999999\n}", problem: `max_connections "9`},
	} {
		t.Run(name, func(t *testing.T) {
			err := new(Limit).UnmarshalCaddyfile(caddyfile.NewTestDispenser("edge_limit " + tc.block))
			if tc.problem != "" {
				require.ErrorContains(t, err, tc.problem)
				return
			}
			require.NoError(t, err)
		})
	}
}

func TestLimiter(t *testing.T) {
	now := time.Now()
	t.Run("there is room up to each limit", func(t *testing.T) {
		var l limiter
		limit := &Limit{MaxConnections: 4, MaxPerSource: 3, RatePerSource: 1000}
		for range 3 {
			require.NoError(t, l.admit("a", limit, now))
		}
		require.EqualError(t, l.admit("a", limit, now), "max_per_source 3")
		require.NoError(t, l.admit("b", limit, now))
		require.EqualError(t, l.admit("b", limit, now), "max_connections 4")
		l.release("a")
		require.NoError(t, l.admit("b", limit, now))
		require.Equal(t, 4, l.active())
	})
	t.Run("the rate is that of each source", func(t *testing.T) {
		var l limiter
		limit := &Limit{MaxConnections: 1000, MaxPerSource: 1000, RatePerSource: 10}
		for range 10 {
			require.NoError(t, l.admit("a", limit, now))
		}
		require.EqualError(t, l.admit("a", limit, now), "rate_per_source 10")
		require.NoError(t, l.admit("b", limit, now))
		require.NoError(t, l.admit("a", limit, now.Add(100*time.Millisecond)))
		require.Error(t, l.admit("a", limit, now.Add(100*time.Millisecond)))
		for range 10 {
			require.NoError(t, l.admit("a", limit, now.Add(2*time.Second)))
		}
		require.Error(t, l.admit("a", limit, now.Add(2*time.Second)), "it does not save up more than a second's")
		higher := &Limit{MaxConnections: 1000, MaxPerSource: 1000, RatePerSource: 100}
		require.NoError(t, l.admit("a", higher, now.Add(3*time.Second)))
		for range 100 {
			require.NoError(t, l.admit("a", higher, now.Add(4*time.Second)), "a higher limit out of a reload")
		}
	})
	t.Run("sources are forgotten", func(t *testing.T) {
		var l limiter
		limit := &Limit{MaxConnections: 1 << 20, MaxPerSource: 10, RatePerSource: 10}
		for second := range 20 {
			for i := range 1000 {
				src := fmt.Sprintf("%d-%d", second, i)
				require.NoError(t, l.admit(src, limit, now.Add(time.Duration(second)*time.Second)))
				if i > 0 {
					l.release(src)
				}
			}
		}
		require.LessOrEqual(t, len(l.sources), 2*1000+20)
		require.Equal(t, 20, l.active())
	})
}

func TestLimitEndsWithTheConnection(t *testing.T) {
	l := Limit{MaxConnections: 1, MaxPerSource: 1, RatePerSource: 100}
	cx := connectionFrom("192.0.2.99")
	problem := errors.New("problem")
	require.ErrorIs(t, l.Handle(cx, layer4.HandlerFunc(func(cx *layer4.Connection) error {
		second := connectionFrom("192.0.2.99")
		require.NoError(t, l.Handle(second, layer4.HandlerFunc(func(*layer4.Connection) error {
			t.Error("there is no room for a second")
			return nil
		})))
		require.Equal(t, limited, second.GetVar(outcomeVar).(outcome).decision)
		return problem
	})), problem)
	passed := false
	require.NoError(t, l.Handle(cx, layer4.HandlerFunc(func(*layer4.Connection) error { passed = true; return nil })))
	require.True(t, passed)
}

func TestLimitsHoldOverReloads(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, "remote_ip 127.0.0.0/8\n")
	write(t, e.limits, "max_connections 5\nmax_per_source 3\nrate_per_source 1000\n")
	e.run(t)
	e.waitForLog(t, `"state":"ready"`)
	config := ca.clientConfig(t)
	hold := func(from string) *tls.Conn {
		conn := tls.Client(e.dial(t, from), config)
		require.NoError(t, conn.HandshakeContext(t.Context()))
		return conn
	}
	refused := func(from, why string) {
		t.Helper()
		local := e.requireRefused(t, from, nil)
		host, _, err := net.SplitHostPort(local)
		require.NoError(t, err)
		e.waitForLog(t, `"decision":"limited","remote":"`+local+`","source":"`+host+`"`)
		require.Contains(t, e.log(), `"error":"`+why+`"`)
	}
	first := hold("127.0.0.2")
	hold("127.0.0.2")
	hold("127.0.0.2")
	refused("127.0.0.2", "max_per_source 3")

	out, err := e.reload(t)
	require.NoError(t, err, out)
	refused("127.0.0.2", "max_per_source 3")
	hold("127.0.0.3")
	hold("127.0.0.3")
	refused("127.0.0.4", "max_connections 5")

	require.NoError(t, first.Close())
	require.Eventually(t, func() bool { return e.metric(t, "edge_active_connections") == 4 }, 5*time.Second, 20*time.Millisecond)
	hold("127.0.0.4")

	write(t, e.limits, "max_connections 50\nmax_per_source 30\nrate_per_source 2\n")
	out, err = e.reload(t)
	require.NoError(t, err, out)
	hold("127.0.0.5")
	hold("127.0.0.5")
	refused("127.0.0.5", "rate_per_source 2")
	require.InDelta(t, 4, e.metric(t, `edge_connections_total{decision="limited"}`), 0)
}

func TestTenThousandConnectionsFromOneAddress(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	up := ca.serve(t)
	e := newEdge(t, ca, up.addr, "remote_ip 127.0.0.0/8\n")
	const room = 50
	write(t, e.limits, "max_connections 7000\nmax_per_source "+strconv.Itoa(room)+"\nrate_per_source 100000\n")
	e.run(t)
	e.waitForLog(t, `"state":"ready"`)
	// They come from one address and stay as long as they may: 3 s, without a byte.
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.9")}}
	for range 10_000 {
		conn, err := dialer.DialContext(t.Context(), "tcp", e.edge)
		require.NoError(t, err)
		defer func() { _ = conn.Close() }()
		if conn.LocalAddr().(*net.TCPAddr).Port%500 == 0 {
			require.Equal(t, "client of the test", e.whoami(t, insider, ca), "others are served meanwhile")
		}
	}
	require.Less(t, len(e.log()), 1<<20, "a line for each would be a way to fill the disk")
}
