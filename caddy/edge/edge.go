// Package edge is what the certificate authority's edge needs and stock Caddy
// with caddy-l4 does not have:
//
//   - the network "edge/": a listener that survives reloads and a lack of
//     descriptors;
//   - the matcher edge_balancer and the handler edge_proxy_protocol: the PROXY
//     protocol, believed from named balancers and from nobody else;
//   - the matcher edge_outside: the allow-list, which refuses to load when empty;
//   - the handler edge_limit: how many connections, in all and per source;
//   - the handler edge_proxy: the way to the replicas of the CA, found through
//     DNS and checked by what the CA is for;
//   - the handler edge_log: a line and a count for every connection;
//   - the commands "caddy upstreams", "drain" and "undrain", which take a replica
//     out of service and put it back;
//   - the command "caddy healthcheck": a check of the edge's job, not its process.
//
// Handlers of one configuration come and go with reloads. What has to outlive
// them (replicas, drains, limits, counters, sockets) is kept by the package.
//
// xcaddy compiles it in; see ../Dockerfile.
package edge

import (
	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func init() {
	caddy.RegisterNetwork("edge", openListener)
	caddy.RegisterModule(new(Balancer))
	caddy.RegisterModule(new(ProxyProtocol))
	caddy.RegisterModule(new(Outside))
	caddy.RegisterModule(new(Limit))
	caddy.RegisterModule(new(Proxy))
	caddy.RegisterModule(new(Log))
	caddy.RegisterModule(new(Admin))
	caddycmd.RegisterCommand(upstreamsCommand())
	caddycmd.RegisterCommand(drainCommand())
	caddycmd.RegisterCommand(undrainCommand())
	caddycmd.RegisterCommand(healthcheckCommand())
}
