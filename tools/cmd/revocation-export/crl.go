package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const (
	crlFile = "ca.crl"
	// About 400,000 certificates, at forty bytes each.
	maxCRL = 16 << 20
	// Readable for the edge, which runs as somebody else.
	published = 0o444
)

// crl is step-ca's list, taken over if it is what relying parties will accept.
type crl struct{ url, certs, out string }

func (c *crl) renew(ctx context.Context) (summary, error) {
	issuer, err := readIssuer(filepath.Join(c.certs, "intermediate_ca.crt"))
	if err != nil {
		return summary{}, err
	}
	list, err := c.fetch(ctx)
	if err != nil {
		return summary{}, err
	}
	if err := acceptable(list, issuer, time.Now()); err != nil {
		return summary{}, fmt.Errorf("checking the CRL from %s: %w", c.url, err)
	}
	path := filepath.Join(c.out, crlFile)
	old, err := readCRL(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return summary{}, err
	}
	// One of another issuer tells nothing about this one's numbers.
	if old != nil && old.CheckSignatureFrom(issuer) == nil {
		if err := notOlder(list, old); err != nil {
			return summary{}, fmt.Errorf("checking the CRL from %s: %w", c.url, err)
		}
	}
	if _, err := durable.WriteIfChanged(path, list.Raw, published); err != nil {
		return summary{}, err
	}
	return summary{revoked: len(list.RevokedCertificateEntries)}, nil
}

func readIssuer(path string) (*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the issuer of the CRL: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("reading the issuer of the CRL: %q does not begin with a certificate in PEM", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading the issuer of the CRL from %q: %w", path, err)
	}
	return cert, nil
}

// readCRL returns nil for a file that is no CRL: it has to be replaced.
func readCRL(path string) (*x509.RevocationList, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the published CRL: %w", err)
	}
	list, err := x509.ParseRevocationList(data)
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // see above
	}
	return list, nil
}

// direct neither asks a proxy for a neighbour nor lets that one send it elsewhere.
var direct = http.Client{
	Transport:     &http.Transport{DisableKeepAlives: true},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

func (c *crl) fetch(ctx context.Context) (*x509.RevocationList, error) {
	const hint = `"docker compose ps crl" tells whether it runs, "docker compose logs crl" why not`
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("fetching the CRL: %w", err)
	}
	resp, err := direct.Do(req)
	if e := new(url.Error); errors.As(err, &e) {
		err = e.Err // the URL is told below
	}
	if err != nil {
		return nil, oneshot.WithHint(fmt.Errorf("fetching the CRL from %s: %w", c.url, err), hint)
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	if resp.StatusCode != http.StatusOK {
		return nil, oneshot.WithHint(fmt.Errorf("fetching the CRL from %s: it answered %q", c.url, resp.Status), hint)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxCRL+1))
	switch {
	case err != nil:
		return nil, oneshot.WithHint(fmt.Errorf("fetching the CRL from %s: %w", c.url, err), hint)
	case len(data) > maxCRL:
		return nil, fmt.Errorf("fetching the CRL from %s: it is larger than %d bytes", c.url, maxCRL)
	}
	list, err := x509.ParseRevocationList(data)
	if err != nil {
		return nil, fmt.Errorf("fetching the CRL from %s: %w", c.url, err)
	}
	return list, nil
}

func acceptable(list *x509.RevocationList, issuer *x509.Certificate, now time.Time) error {
	if err := list.CheckSignatureFrom(issuer); err != nil {
		return oneshot.WithHint(fmt.Errorf("%q did not sign it: %w", issuer.Subject, err),
			`after a change of the intermediate certificate: "docker compose restart crl"`)
	}
	if list.Number == nil {
		return errors.New("it has no number")
	}
	return inTime(list, now)
}

func inTime(list *x509.RevocationList, now time.Time) error {
	if !now.Before(list.NextUpdate) {
		return fmt.Errorf("it expired on %s", list.NextUpdate.UTC().Format(time.RFC3339))
	}
	return nil
}

// notOlder keeps revocations from being undone by a list from before them.
func notOlder(list, old *x509.RevocationList) error {
	if old.Number == nil || list.Number.Cmp(old.Number) >= 0 && !list.ThisUpdate.Before(old.ThisUpdate) {
		return nil
	}
	return oneshot.WithHint(
		fmt.Errorf("it is older than the published one: number %s of %s, published number %s of %s",
			list.Number, list.ThisUpdate.UTC().Format(time.RFC3339), old.Number, old.ThisUpdate.UTC().Format(time.RFC3339)),
		`if the database was restored from a backup: revoke again what was revoked since, then "docker compose exec revocation-export revocation-export --forget"`)
}
