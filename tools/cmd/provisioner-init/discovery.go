package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/smallstep/certificates/authority/provisioner"
	"golang.org/x/crypto/x509roots/fallback/bundle"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const (
	// step-ca waits as long as it takes; a run of this program should not.
	discoveryTimeout = 5 * time.Second
	maxDocument      = 1 << 20
)

// discover asks every OIDC provider for its discovery document, as step-ca will when it
// reads ca.json: one that does not answer then is a dead provisioner until the next
// reload (smallstep/certificates#2724), which step-ca's health check asks for when
// the provider is back.
func (p *program) discover(ctx context.Context, root *x509.Certificate) {
	providers := p.declared.OIDC()
	if len(providers) == 0 {
		return
	}
	client := &http.Client{
		Timeout:   discoveryTimeout,
		Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: p.trusted(root)}},
	}
	problems := make([]error, len(providers))
	var wg sync.WaitGroup
	for i, o := range providers {
		wg.Go(func() { problems[i] = document(ctx, client, o) })
	}
	wg.Wait()
	for i, o := range providers {
		if problems[i] != nil {
			p.log.LogAttrs(ctx, slog.LevelWarn, "the OIDC provider does not answer as it should: nobody can log in with it until it does; step-ca then takes it up by itself",
				slog.String("provisioner", o.Name), slog.String("reason", problems[i].Error()))
		}
	}
}

// trusted are the roots that step-ca trusts in a provider: the public ones, this CA's
// own and those in trusted-roots.
func (p *program) trusted(root *x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for r := range bundle.Roots() {
		if cert, err := x509.ParseCertificate(r.Certificate); err == nil {
			pool.AddCert(cert)
		}
	}
	if root != nil {
		pool.AddCert(root)
	}
	for _, data := range p.trustedRoots {
		pool.AppendCertsFromPEM(data)
	}
	return pool
}

// readTrustedRoots reads the *.crt of a directory as step-ca will, which leaves out in
// silence what has no certificate in PEM.
func readTrustedRoots(dir string) (roots [][]byte, problems []error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.crt"))
	if err != nil {
		return nil, []error{fmt.Errorf("%s cannot be searched: %w", dir, err)}
	}
	for _, file := range files {
		name := filepath.Join(filepath.Base(dir), filepath.Base(file))
		data, err := os.ReadFile(file)
		switch {
		case err != nil:
			problems = append(problems, fmt.Errorf("%s cannot be read: %w", name, err))
		case !x509.NewCertPool().AppendCertsFromPEM(data):
			problems = append(problems, fmt.Errorf("%s has no certificate in PEM; a good one begins with -----BEGIN CERTIFICATE-----", name))
		}
		roots = append(roots, data)
	}
	return roots, problems
}

// document gets and reads a discovery document (OpenID Connect Discovery 1.0, section 4).
func document(ctx context.Context, client *http.Client, o *provisioner.OIDC) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, o.ConfigurationEndpoint, nil)
	if err != nil {
		return fmt.Errorf("asking %q: %w", o.ConfigurationEndpoint, err)
	}
	response, err := client.Do(request)
	if err != nil {
		var inner *url.Error
		if errors.As(err, &inner) { // the address stands in it once more
			err = inner.Err
		}
		return fmt.Errorf("asking %q: %w", o.ConfigurationEndpoint, err)
	}
	defer response.Body.Close() //nolint:errcheck // read only
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("asking %q: status %d", o.ConfigurationEndpoint, response.StatusCode)
	}
	var d struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, maxDocument)).Decode(&d); err != nil || d.Issuer == "" || d.JWKSURI == "" {
		return oneshot.WithHint(fmt.Errorf("asking %q: the answer is no discovery document", o.ConfigurationEndpoint),
			"it ends in /.well-known/openid-configuration as a rule")
	}
	return nil
}
