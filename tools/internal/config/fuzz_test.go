package config

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// Whatever is in a list, what is taken from it is what it says, in a form that can stand
// in a Caddyfile or in ca.json, and the rest is a problem.
func FuzzLists(f *testing.F) {
	for _, seed := range []string{
		"10.0.0.0/8, 192.0.2.1\n2001:db8::/32", "private_ranges", "fe80::1%eth0", "::ffff:10.0.0.0/104", "*.internal www.lan", "a.*.b", "@lan,root@lan", "route {\n echo\n}",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r := &Reader{env: environment{
			AllowedIPs: s, BalancerIPs: s, PolicyDNS: s, PolicyIPs: s, PolicyEmails: s, PolicyWildcards: "false", EdgeSubnet: "172.28.100.0/24",
			EdgeMaxConnections: "100", EdgeMaxPerAddress: "10", EdgeRatePerAddress: "5",
		}}
		edge, policy := r.Edge(), r.Policy()
		for _, p := range slices.Concat(edge.Allowed, edge.Balancers, policy.IPs) {
			if again, err := netip.ParsePrefix(p.String()); err != nil || again != p || p.Masked() != p {
				t.Fatalf("%q became %v", s, p)
			}
		}
		for _, name := range append(policy.DNS, policy.Emails...) {
			if strings.ContainsAny(name, " \t\r\n\"\\") || !strings.Contains(strings.ToLower(s), strings.TrimPrefix(name, "@")) {
				t.Fatalf("%q became %q", s, name)
			}
		}
		if strings.TrimSpace(s) == "" && r.Err() == nil {
			t.Fatal("nobody may connect, and nobody says so")
		}
	})
}
