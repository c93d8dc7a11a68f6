package edge

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

// healthcheck asks the two questions that decide whether the edge does its
// job. A check of the process or of the admin API sees neither answer.
type healthcheck struct {
	edge       string        // the listener that clients use
	probe      string        // the loopback listener without allow-list
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
2. --edge answers a TLS ClientHello, be it by closing the connection because
   the allow-list refuses this address. Silence is a failure.`,
		CobraFunc: func(cmd *cobra.Command) {
			// Caddy appends its own usage text to Use.
			cmd.Use = "healthcheck [flags]"
			cmd.Example = "  caddy healthcheck --root /trust/root_ca.crt --timeout 4s"
			cmd.Args = cobra.NoArgs
			flags := cmd.Flags()
			flags.StringVar(&h.edge, "edge", "127.0.0.1:9000", "`address` of the listener that clients use")
			flags.StringVar(&h.probe, "probe", "127.0.0.1:9001", "`address` of the listener without allow-list")
			flags.StringVar(&h.root, "root", "/trust/root_ca.crt", "PEM `file` with the root certificate")
			flags.StringVar(&h.serverName, "server-name", "localhost", "`name` that step-ca's certificate must carry")
			flags.DurationVar(&h.timeout, "timeout", 4*time.Second, "`limit` for the whole check")
			cmd.RunE = func(cmd *cobra.Command, _ []string) error {
				ctx, cancel := context.WithTimeout(cmd.Context(), h.timeout)
				defer cancel()
				err := h.run(ctx)
				if err != nil {
					cmd.SilenceErrors = true // cobra's own line has another form
					report(cmd.ErrOrStderr(), err)
				}
				return err
			}
		},
	}
}

func report(w io.Writer, err error) {
	_, _ = fmt.Fprintf(w, "caddy healthcheck: error: %v\n", err)
	if hinted, ok := errors.AsType[*hintError](err); ok {
		_, _ = fmt.Fprintf(w, "caddy healthcheck: hint: %s\n", hinted.hint)
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
	return h.checkEdge(ctx, trust)
}

func (h *healthcheck) trust() (*tls.Config, error) {
	const hint = "trust-export writes this file; see its log with: docker compose logs trust-export"
	pem, err := os.ReadFile(h.root)
	if err != nil {
		return nil, &hintError{fmt.Errorf("reading root certificate: %w", err), hint}
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, &hintError{fmt.Errorf("reading root certificate: no certificate in %q", h.root), hint}
	}
	return &tls.Config{RootCAs: roots, ServerName: h.serverName, MinVersion: tls.VersionTLS12}, nil
}

func (h *healthcheck) checkUpstream(ctx context.Context, trust *tls.Config) error {
	var dialer net.Dialer
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, h.probe)
		},
		TLSClientConfig:   trust,
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+h.serverName+"/health", http.NoBody)
	if err != nil {
		return fmt.Errorf("building the request to step-ca: %w", err)
	}
	resp, err := client.Do(req)
	if urlErr, ok := errors.AsType[*url.Error](err); ok {
		err = urlErr.Err // without the URL, which is not where it connected to
	}
	if err != nil {
		return &hintError{fmt.Errorf("reaching step-ca through %s: %w", h.probe, err), upstreamHint(err)}
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return &hintError{
			fmt.Errorf("reaching step-ca through %s: /health answered %q", h.probe, resp.Status),
			"see step-ca's log with: docker compose logs step-ca",
		}
	}
	return nil
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

// checkEdge wants any sign of life from the listener itself. When descriptors
// run out, caddy-l4's accept loop ends for good (layer4/server.go, serve): the
// kernel still completes connections, the process and its admin API live on,
// and no client is ever served again.
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
			"the edge accepts connections and serves none, which only a restart of caddy cures; raise its nofile limit",
		}
	}
	// Closed, refused as a certificate or completed: the edge answered.
	return nil
}

func isTimeout(err error) bool {
	netErr, ok := errors.AsType[net.Error](err)
	return ok && netErr.Timeout()
}
