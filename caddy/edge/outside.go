package edge

import (
	"errors"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
)

// Outside matches connections whose source address is in none of the ranges.
//
// The stock spelling, "not { import allow.caddy }", fails open: an empty file
// gives an empty matcher set, which matches everything, so its negation
// matches nobody and the deny route is never taken. Caddy only warns
// ("Import file is empty"). Outside is the same negation, but an empty list, or
// anything in the block besides one remote_ip line, is a configuration that
// does not load.
type Outside struct {
	// Ranges are addresses and CIDRs, as in layer4.matchers.remote_ip.
	Ranges []string `json:"ranges,omitempty"`

	inside layer4.MatchRemoteIP
}

// CaddyModule returns the Caddy module information.
func (*Outside) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.matchers.edge_outside",
		New: func() caddy.Module { return new(Outside) },
	}
}

// Provision parses the ranges. It checks for an empty list a second time,
// because a configuration given as JSON never passes UnmarshalCaddyfile.
func (o *Outside) Provision(ctx caddy.Context) error {
	if len(o.Ranges) == 0 {
		return errors.New("the allow-list is empty")
	}
	o.inside.Ranges = o.Ranges
	return o.inside.Provision(ctx)
}

// Match reports whether the source address is outside every range. An address
// that cannot be read is an error, and an error closes the connection.
func (o *Outside) Match(cx *layer4.Connection) (bool, error) {
	inside, err := o.inside.Match(cx)
	return err == nil && !inside, err
}

// UnmarshalCaddyfile reads a block that holds exactly one remote_ip line,
// which is what provisioner-init renders:
//
//	edge_outside {
//		remote_ip <range> [<range>...]
//	}
func (o *Outside) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the matcher's own name
	if d.NextArg() {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if d.Val() != "remote_ip" {
			return d.Errf("unexpected %q in the allow-list: want one remote_ip line", d.Val())
		}
		if o.Ranges != nil {
			return d.Err("a second remote_ip line in the allow-list: want one")
		}
		o.Ranges = d.RemainingArgs()
		if len(o.Ranges) == 0 {
			return d.Err("remote_ip without a range in the allow-list")
		}
	}
	if len(o.Ranges) == 0 {
		return d.Err("the allow-list is empty: want one remote_ip line")
	}
	return nil
}

var (
	_ caddy.Provisioner     = (*Outside)(nil)
	_ caddyfile.Unmarshaler = (*Outside)(nil)
	_ layer4.ConnMatcher    = (*Outside)(nil)
)
