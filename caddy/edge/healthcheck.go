package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

// healthcheck asks the questions that decide whether the edge does its
// job. A check of the process sees no answer to any of them.
type healthcheck struct {
	edge       string        // the listener that clients use
	probe      string        // the loopback listener without allow-list
	admin      string        // address of the admin API, as Caddy writes it
	root       string        // PEM file that step-ca's certificate must verify against
	serverName string        // name that step-ca's certificate must carry
	timeout    time.Duration // for everything together
}

// hintError is an error with the way out of it.
type hintError struct {
	error
	hint string
}

func (e *hintError) Unwrap() error { return e.error }

func healthcheckCommand() caddycmd.Command {
	var h healthcheck
	return caddycmd.Command{
		Name:  "healthcheck",
		Short: "Checks that the edge serves and reaches the CA",
		Long: `Checks that the edge does its job, and exits 0 if so and 1 if not:

1. through --probe, step-ca answers GET /health with a certificate for
   --server-name that verifies against --root;
2. a step-ca reaches its database, as the edge itself has found;
3. --edge answers a TLS ClientHello, be it by closing the connection because
   the allow-list refuses this address. Silence is a failure.`,
		CobraFunc: func(cmd *cobra.Command) {
			// Caddy appends its own usage text to Use.
			cmd.Use = "healthcheck [flags]"
			cmd.Example = "  caddy healthcheck --root /trust/root_ca.crt --timeout 4s"
			cmd.Args = cobra.NoArgs
			flags := cmd.Flags()
			flags.StringVar(&h.edge, "edge", "127.0.0.1:9000", "`address` of the listener that clients use")
			flags.StringVar(&h.probe, "probe", "127.0.0.1:9001", "`address` of the listener without allow-list")
			flags.StringVar(&h.admin, "admin", defaultAdmin, "`address` of the admin API")
			flags.StringVar(&h.root, "root", "/trust/root_ca.crt", "PEM `file` with the root certificate")
			flags.StringVar(&h.serverName, "server-name", "localhost", "`name` that step-ca's certificate must carry")
			flags.DurationVar(&h.timeout, "timeout", 4*time.Second, "`limit` for the whole check")
			command(cmd, func(cmd *cobra.Command, _ []string) error {
				ctx, cancel := context.WithTimeout(cmd.Context(), h.timeout)
				defer cancel()
				return h.run(ctx)
			})
		},
	}
}

// run looks through the probe first. If step-ca is down and the allow-list
// admits this address, the edge is silent too while it tries to reach step-ca,
// and that would look like a dead listener.
func (h *healthcheck) run(ctx context.Context) error {
	trust, err := h.trust()
	if err != nil {
		return err
	}
	if err := h.checkUpstream(ctx, trust); err != nil {
		return err
	}
	if err := h.checkDatabase(ctx); err != nil {
		return err
	}
	return h.checkEdge(ctx, trust)
}

func (h *healthcheck) trust() (*tls.Config, error) {
	config, err := trust(h.root, h.serverName)
	if err != nil {
		return nil, &hintError{err, "trust-export writes this file; see its log with: docker compose logs trust-export"}
	}
	return config, nil
}

func (h *healthcheck) checkUpstream(ctx context.Context, trust *tls.Config) error {
	err := askHealth(ctx, h.probe, trust)
	if err == nil {
		return nil
	}
	problem := fmt.Errorf("reaching step-ca through %s: %w", h.probe, err)
	if _, answered := errors.AsType[*answeredError](err); answered {
		return &hintError{problem, "see step-ca's log with: docker compose logs step-ca"}
	}
	return &hintError{problem, upstreamHint(err)}
}

// checkDatabase wants a replica that reaches its database. step-ca answers /health
// without a look at it, and every request that matters with an error.
func (h *healthcheck) checkDatabase(ctx context.Context) error {
	var states []Status
	if err := callAdmin(ctx, h.admin, http.MethodGet, upstreamsPath, nil, &states); err != nil {
		return &hintError{fmt.Errorf("asking for the replicas: %w", err), "see caddy's log with: docker compose logs caddy"}
	}
	var problem error
	for _, s := range states {
		switch s.State {
		case ready:
			return nil
		case alive:
			problem = fmt.Errorf("step-ca at %s serves, but not from its database: %s", s.Address, s.Error)
		}
	}
	if problem == nil {
		return &hintError{errors.New("no step-ca is in service"), "caddy upstreams says why: docker compose exec caddy caddy upstreams"}
	}
	return &hintError{problem, "see whether the database runs, with: docker compose ps postgres pgbouncer"}
}

func upstreamHint(err error) string {
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return "the root certificate does not vouch for what step-ca presents; see: docker compose logs trust-export step-ca"
	}
	if opErr, ok := errors.AsType[*net.OpError](err); ok && opErr.Op == "dial" {
		return "nothing listens there; see caddy's log with: docker compose logs caddy"
	}
	if isTimeout(err) {
		return "step-ca hangs, or the edge no longer accepts; see step-ca's log, then restart caddy"
	}
	return "step-ca is down or out of reach; see its log with: docker compose logs step-ca"
}

// checkEdge wants any sign of life from the listener itself. While descriptors
// are short, the kernel still completes connections and the process and its admin
// API live on, but no client is served.
//
// The ClientHello is there for the case that the allow-list admits this
// address: without it the edge would be silent for the whole matching_timeout.
func (h *healthcheck) checkEdge(ctx context.Context, trust *tls.Config) error {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", h.edge)
	if err != nil {
		return &hintError{
			fmt.Errorf("connecting to the edge: %w", err),
			"nothing listens there; see caddy's log with: docker compose logs caddy",
		}
	}
	defer func() { _ = conn.Close() }()
	err = tls.Client(conn, trust).HandshakeContext(ctx)
	if isTimeout(err) {
		return &hintError{
			fmt.Errorf("waiting for an answer from the edge at %s: %w", h.edge, err),
			"the edge accepts connections and serves none; if its log speaks of open files, raise its nofile limit or lower EDGE_MAX_CONNECTIONS",
		}
	}
	// Closed, refused as a certificate or completed: the edge answered.
	return nil
}

func isTimeout(err error) bool {
	netErr, ok := errors.AsType[net.Error](err)
	return ok && netErr.Timeout()
}
