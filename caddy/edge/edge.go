// Package edge is what the certificate authority's edge needs and stock Caddy
// with caddy-l4 does not have:
//
//   - the matcher edge_outside: the allow-list, which refuses to load when empty;
//   - the handler edge_log: refusals in the log, with their address;
//   - the command "caddy healthcheck": a check of the edge's job, not its process.
//
// xcaddy compiles it in; see ../Dockerfile.
package edge

import (
	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

func init() {
	caddy.RegisterModule(new(Outside))
	caddy.RegisterModule(new(Log))
	caddycmd.RegisterCommand(healthcheckCommand())
}
