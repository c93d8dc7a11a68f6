package config

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Edge is who may connect, and how often.
type Edge struct {
	Allowed   []netip.Prefix // masked, each once, in the order of the setting
	Balancers []netip.Prefix // who says in a PROXY header for whom it connects; likewise

	MaxConnections int // at once, of everybody
	MaxPerAddress  int // at once, of one source address
	RatePerAddress int // new ones a second, of one source address
}

// The edge may have 16384 file descriptors (docker-compose.yml), a connection takes
// two, and a few are its own.
const mostConnections = 8000

// privateRanges is what the keyword private_ranges stands for, as in a Caddyfile.
var privateRanges = []string{"192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8", "127.0.0.1/8", "fd00::/8", "::1"}

const allowedExample = `"192.0.2.10 10.20.0.0/16"`

// Edge reads ALLOWED_IPS and the edge network's subnets.
//
// The list is parsed here and rendered anew for Caddy, which takes a variable as
// text: a line end in it would be the beginning of a directive.
func (r *Reader) Edge() Edge {
	edge := Edge{
		MaxConnections: r.number("EDGE_MAX_CONNECTIONS", r.env.EdgeMaxConnections, "7000", 10, mostConnections),
		MaxPerAddress:  r.number("EDGE_MAX_PER_ADDRESS", r.env.EdgeMaxPerAddress, "5000", 1, mostConnections),
		RatePerAddress: r.number("EDGE_RATE_PER_ADDRESS", r.env.EdgeRatePerAddress, "2000", 1, 1_000_000),
		Allowed:        r.ranges("ALLOWED_IPS", r.env.AllowedIPs, allowedExample),
		Balancers:      r.ranges("PROXY_PROTOCOL_FROM", r.env.BalancerIPs, "192.0.2.5"),
	}
	if edge.Allowed != nil && len(edge.Allowed) == 0 {
		r.problem("ALLOWED_IPS", allowedExample, "is missing: nobody could connect")
	}
	if edge.MaxConnections > 0 && edge.MaxPerAddress > edge.MaxConnections {
		r.problem("EDGE_MAX_PER_ADDRESS", "5000", "is more than EDGE_MAX_CONNECTIONS (%d > %d)", edge.MaxPerAddress, edge.MaxConnections)
	}
	for _, p := range edge.Balancers {
		if p.Bits() == 0 {
			r.problem("PROXY_PROTOCOL_FROM", "192.0.2.5", "has %s: everybody could say to be anybody", p)
		}
	}
	for _, p := range edge.Allowed {
		if p.Bits() == 0 {
			r.warn("ALLOWED_IPS has %s: every such address may connect", p)
		}
	}
	r.gateways(edge.Allowed)
	return edge
}

// ranges reads a list of addresses and CIDRs; nil if there was a problem.
func (r *Reader) ranges(setting, value, example string) []netip.Prefix {
	found := []netip.Prefix{}
	var bad []string
	for _, item := range items(value) {
		texts := []string{item}
		if item == "private_ranges" {
			texts = privateRanges
		}
		for _, text := range texts {
			p, err := parseRange(text)
			if err != nil {
				bad = append(bad, strconv.Quote(text))
				continue
			}
			if !slices.Contains(found, p) {
				found = append(found, p)
			}
		}
	}
	if len(bad) > 0 {
		r.problem(setting, example, "has items that are neither an address nor a CIDR: %s", strings.Join(bad, ", "))
		return nil
	}
	return found
}

// gateways warns where the allow-list lets in more than it says. Without IPv6 on
// the edge network only this host and its containers come in through the gateway
// (the port is published on IPv4 alone). With IPv6, an Engine without ip6tables
// (any before 27) forwards each IPv6 client through the gateway: moby/moby#17666.
func (r *Reader) gateways(allowed []netip.Prefix) {
	v4 := r.gateway("EDGE_SUBNET", r.env.EdgeSubnet, "172.28.100.0/24", netip.Addr.Is4)
	if r.env.EdgeSubnet6 == "" {
		return
	}
	v6 := r.gateway("EDGE_SUBNET6", r.env.EdgeSubnet6, "fd1c:9000::/64", netip.Addr.Is6)
	for _, gw := range []netip.Addr{v4, v6} {
		i := slices.IndexFunc(allowed, func(p netip.Prefix) bool { return p.Contains(gw) })
		if gw.IsValid() && i >= 0 {
			r.warn("ALLOWED_IPS has %s, which covers %s, the gateway of the edge network: with IPv6 on, IPv6 clients from anywhere may arrive with that address (Docker Engine before 27, or without ip6tables)", allowed[i], gw)
		}
	}
}

// gateway is the first address of a subnet: Docker's choice, and the source
// address of whatever reaches the edge from this host or through its proxy.
func (r *Reader) gateway(setting, value, example string, family func(netip.Addr) bool) netip.Addr {
	p, err := netip.ParsePrefix(value)
	if err != nil || !family(p.Addr()) || p.Masked() != p || p.Bits() > p.Addr().BitLen()-3 {
		r.problem(setting, example, "is not a subnet of its family with room for hosts: %q", value)
		return netip.Addr{}
	}
	return p.Addr().Next()
}

func parseRange(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		addr = addr.Unmap() // Caddy compares IPv4 clients as IPv4
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err == nil && p.Addr().Is4In6() {
		return p, strconv.ErrRange // would match nobody
	}
	return p.Masked(), err
}
