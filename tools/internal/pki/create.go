package pki

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"time"

	"go.step.sm/crypto/keyutil"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// Names is how new CA certificates are called and how long they live.
type Names struct {
	PKI                  string
	RootLifetime         time.Duration
	IntermediateLifetime time.Duration
	Now                  time.Time
}

// A certificate begins a minute early, as step-ca's leaves do, so that a client
// whose clock is a little behind accepts it.
const backdate = time.Minute

// An intermediate ends at least this long before its root.
const margin = time.Hour

// Create makes the file. Keys and certificates that the authority already holds
// (imported ones) are taken, others are generated.
func (f File) Create() error {
	data, err := f.slot.write(&f.c.Authority)
	if err != nil {
		return fmt.Errorf("making the %s: %w", f.Item, err)
	}
	if err := durable.CreateExclusive(f.Path, data, f.slot.mode); err != nil {
		return fmt.Errorf("storing the %s: %w", f.Item, err)
	}
	delete(f.c.missing, f.Path)
	return nil
}

// newKey returns an ECDSA key on P-256, which every client of TLS and SSH knows.
func newKey() (crypto.Signer, error) {
	key, err := keyutil.GenerateSigner("EC", "P-256", 0)
	if err != nil {
		return nil, fmt.Errorf("generating: %w", err)
	}
	return key, nil
}

func (n Names) root(a *Authority) (*x509.Certificate, error) {
	if a.RootKey == nil {
		return nil, errors.New("there is no root key")
	}
	template := n.template("Root CA", 1, n.Now.Add(n.RootLifetime))
	return x509util.CreateCertificate(template, template, a.RootKey.Public(), a.RootKey)
}

func (n Names) intermediate(a *Authority) (*x509.Certificate, error) {
	if a.RootKey == nil {
		return nil, oneshot.WithHint(errors.New("the root key is not here to sign it"),
			"import the intermediate's certificate and key together with the root certificate")
	}
	end := n.Now.Add(n.IntermediateLifetime)
	if last := a.Root.NotAfter.Add(-margin); end.After(last) {
		end = last
	}
	if !end.After(n.Now) {
		return nil, fmt.Errorf("the root ends on %s, too soon for an intermediate", a.Root.NotAfter.UTC().Format(time.DateOnly))
	}
	return x509util.CreateCertificate(n.template("Intermediate CA", 0, end), a.Root, a.IntermediateKey.Public(), a.RootKey)
}

// template is a CA certificate as in RFC 5280 section 4.2.1: keyCertSign and
// cRLSign, and pathLen more CA certificates below it.
func (n Names) template(role string, pathLen int, end time.Time) *x509.Certificate {
	return &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{n.PKI}, CommonName: n.PKI + " " + role},
		NotBefore:             n.Now.Add(-backdate).Truncate(time.Second),
		NotAfter:              end.Truncate(time.Second),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            pathLen,
		MaxPathLenZero:        pathLen == 0,
	}
}
