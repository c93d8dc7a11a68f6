package edge

import (
	"errors"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"

	"github.com/infra-pki/infra-pki/caddy/edge/proxyheader"
)

// Balancer matches connections that come from an outer load balancer, by the
// address at the other end of the TCP connection.
type Balancer struct {
	// Ranges are addresses and CIDRs, as in layer4.matchers.remote_ip. Without
	// any, nobody is a balancer.
	Ranges []string `json:"ranges,omitempty"`

	balancers layer4.MatchRemoteIP
}

// CaddyModule returns the Caddy module information.
func (*Balancer) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.matchers.edge_balancer",
		New: func() caddy.Module { return new(Balancer) },
	}
}

// Provision parses the ranges.
func (b *Balancer) Provision(ctx caddy.Context) error {
	b.balancers.Ranges = b.Ranges
	return b.balancers.Provision(ctx)
}

// Match reports whether the connection comes from a balancer. An address that
// cannot be read is an error, and an error closes the connection.
func (b *Balancer) Match(cx *layer4.Connection) (bool, error) { return b.balancers.Match(cx) }

// UnmarshalCaddyfile reads a block with exactly one line, which is what
// provisioner-init renders: one that names the balancers, or one that says that
// there are none.
//
//	edge_balancer {
//		remote_ip <range> [<range>...]
//	}
//	edge_balancer {
//		none
//	}
func (b *Balancer) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the matcher's own name
	if d.NextArg() {
		return d.ArgErr()
	}
	read := false
	for nesting := d.Nesting(); d.NextBlock(nesting); read = true {
		if read {
			return d.Errf("a second line, %q, in the list of balancers: want one", d.Val())
		}
		switch d.Val() {
		case "none":
			if d.NextArg() {
				return d.ArgErr()
			}
		case "remote_ip":
			b.Ranges = d.RemainingArgs()
			if len(b.Ranges) == 0 {
				return d.Err("remote_ip without a range in the list of balancers")
			}
		default:
			return d.Errf("unexpected %q in the list of balancers: want remote_ip or none", d.Val())
		}
	}
	if !read {
		return d.Err("the list of balancers is empty: want remote_ip or none")
	}
	return nil
}

// headerTimeout bounds the wait for a PROXY header, which a balancer sends as
// soon as it has connected.
const headerTimeout = 2 * time.Second

// ProxyProtocol reads a PROXY header, version 1 or 2, and makes its source address
// the one that all handlers and matchers behind it see. Without a header that can
// be read the connection is closed as "denied".
//
// It believes whoever comes, so it stands in a route behind edge_balancer, which
// looks at the TCP peer. The handler of caddy-l4 believes even those whom its own
// list of trusted addresses leaves out.
type ProxyProtocol struct {
	log Log
}

// CaddyModule returns the Caddy module information.
func (*ProxyProtocol) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.handlers.edge_proxy_protocol",
		New: func() caddy.Module { return new(ProxyProtocol) },
	}
}

// Provision sets up the log of those who are closed.
func (p *ProxyProtocol) Provision(ctx caddy.Context) error {
	p.log.Decision = denied
	return p.log.Provision(ctx)
}

// Cleanup ends the log.
func (p *ProxyProtocol) Cleanup() error { return p.log.Cleanup() }

// Handle reads the header and passes on the connection that it speaks of.
func (p *ProxyProtocol) Handle(cx *layer4.Connection, next layer4.Handler) error {
	conn, err := proxyheader.Read(cx.Conn, headerTimeout)
	if errors.Is(err, proxyheader.ErrSilent) {
		return nil
	}
	if err != nil {
		return p.log.Handle(cx, layer4.HandlerFunc(func(cx *layer4.Connection) error {
			conclude(cx, outcome{decision: denied, err: err})
			return nil
		}))
	}
	return next.Handle(cx.Wrap(conn))
}

// UnmarshalCaddyfile reads
//
//	edge_proxy_protocol
func (*ProxyProtocol) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the handler's own name
	if d.NextArg() || d.NextBlock(d.Nesting()) {
		return d.ArgErr()
	}
	return nil
}

var (
	_ caddy.Provisioner     = (*Balancer)(nil)
	_ caddyfile.Unmarshaler = (*Balancer)(nil)
	_ layer4.ConnMatcher    = (*Balancer)(nil)
	_ caddy.CleanerUpper    = (*ProxyProtocol)(nil)
	_ caddy.Provisioner     = (*ProxyProtocol)(nil)
	_ caddyfile.Unmarshaler = (*ProxyProtocol)(nil)
	_ layer4.NextHandler    = (*ProxyProtocol)(nil)
)
