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
	"strings"
)

// checkPrincipal is the host that the database is asked about. Nobody has it: the
// name is reserved (RFC 6761 section 6.4).
const checkPrincipal = "health.edge.invalid"

// trust is how to verify step-ca. The root is read every time, so that a file
// which trust-export has replaced counts at once.
func trust(root, serverName string) (*tls.Config, error) {
	pem, err := os.ReadFile(root)
	if err != nil {
		return nil, fmt.Errorf("reading root certificate: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("reading root certificate: no certificate in %q", root)
	}
	return &tls.Config{RootCAs: roots, ServerName: serverName, MinVersion: tls.VersionTLS12}, nil
}

// askHealth asks whether step-ca at addr serves. It answers without a look at its
// database, and logs nothing.
func askHealth(ctx context.Context, addr string, trust *tls.Config) error {
	return ask(ctx, addr, trust, http.MethodGet, "/health", "")
}

// askDatabase asks step-ca at addr for something that it has to look up in its
// database: whether a host has an SSH certificate, which it answers to everybody
// and with SSH switched off too (smallstep/certificates v0.30.2, api/ssh.go,
// SSHCheckHost). Without a database that is a 500.
func askDatabase(ctx context.Context, addr string, trust *tls.Config) error {
	return ask(ctx, addr, trust, http.MethodPost, "/ssh/check-host", `{"type":"host","principal":"`+checkPrincipal+`"}`)
}

// ask makes one request on a connection of its own and wants the answer 200.
func ask(ctx context.Context, addr string, trust *tls.Config, method, path, body string) error {
	var dialer net.Dialer
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, addr)
		},
		TLSClientConfig:   trust,
		DisableKeepAlives: true,
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+trust.ServerName+path, strings.NewReader(body))
	if err != nil {
		return fmt.Errorf("building the request: %w", err)
	}
	client := http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err // without the URL, which is not where it connected to
	}
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16)); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return &answeredError{path, resp.Status}
	}
	return nil
}

// answeredError is an answer other than 200.
type answeredError struct{ path, status string }

func (e *answeredError) Error() string { return fmt.Sprintf("%s answered %q", e.path, e.status) }
