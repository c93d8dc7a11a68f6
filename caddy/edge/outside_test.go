package edge

import (
	"net"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

func TestOutsideReadsTheAllowList(t *testing.T) {
	for name, tc := range map[string]struct {
		block   string
		ranges  []string
		problem string
	}{
		"one line with several ranges": {
			block:  "{\n remote_ip 10.0.0.0/8 192.0.2.7 2001:db8::/32\n}",
			ranges: []string{"10.0.0.0/8", "192.0.2.7", "2001:db8::/32"},
		},
		"no block at all":             {block: "", problem: "the allow-list is empty"},
		"an empty block":              {block: "{\n}", problem: "the allow-list is empty"},
		"a block with only a comment": {block: "{\n # remote_ip 10.0.0.0/8\n}", problem: "the allow-list is empty"},
		"a line without a range":      {block: "{\n remote_ip\n}", problem: "remote_ip without a range"},
		"two lines":                   {block: "{\n remote_ip 10.0.0.1\n remote_ip 10.0.0.2\n}", problem: "a second remote_ip line"},
		"another matcher beside it":   {block: "{\n remote_ip 10.0.0.1\n tls\n}", problem: `unexpected "tls"`},
		"ranges on the wrong line":    {block: "10.0.0.1", problem: "wrong argument count"},
	} {
		t.Run(name, func(t *testing.T) {
			var o Outside
			err := o.UnmarshalCaddyfile(caddyfile.NewTestDispenser("edge_outside " + tc.block))
			if tc.problem != "" {
				require.ErrorContains(t, err, tc.problem)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.ranges, o.Ranges)
		})
	}
}

func TestOutsideRefusesAnEmptyListFromJSON(t *testing.T) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	require.ErrorContains(t, new(Outside).Provision(ctx), "the allow-list is empty")
}

func TestOutsideMatchesEverybodyElse(t *testing.T) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	o := Outside{Ranges: []string{"10.0.0.0/8", "192.0.2.7", "2001:db8::/32"}}
	require.NoError(t, o.Provision(ctx))

	for name, tc := range map[string]struct {
		remote  string
		outside bool
	}{
		"inside a range":   {remote: "10.200.3.4", outside: false},
		"a single address": {remote: "192.0.2.7", outside: false},
		"its neighbour":    {remote: "192.0.2.8", outside: true},
		"an IPv4 address seen by a dual-stack port": {remote: "::ffff:10.0.0.1", outside: false},
		"an IPv6 address in a range":                {remote: "2001:db8::9", outside: false},
		"an IPv6 address out of every range":        {remote: "2001:db9::9", outside: true},
		"IPv6 loopback":                             {remote: "::1", outside: true},
	} {
		t.Run(name, func(t *testing.T) {
			outside, err := o.Match(connectionFrom(tc.remote))
			require.NoError(t, err)
			require.Equal(t, tc.outside, outside)
		})
	}
}

// connectionFrom is a connection of which only the source address is real.
func connectionFrom(ip string) *layer4.Connection {
	return layer4.WrapConnection(addressed{remote: &net.TCPAddr{IP: net.ParseIP(ip), Port: 4711}}, nil, zap.NewNop())
}

type addressed struct {
	net.Conn
	remote net.Addr
}

func (a addressed) RemoteAddr() net.Addr { return a.remote }
func (a addressed) LocalAddr() net.Addr  { return &net.TCPAddr{} }
