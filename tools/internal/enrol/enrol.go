// Package enrol gets and renews the certificates of a host, through step-ca's own
// client (github.com/smallstep/certificates/ca).
//
// A host's first certificates are for one-time tokens. From then on it proves itself
// with what it has: an SSH certificate and its key sign the token for the next one
// (step-ca's SSHPOP), a TLS certificate is shown in the handshake. What comes back
// is verified before anybody sees it: key, names, signature, validity.
package enrol

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/smallstep/certificates/api"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/ca"
	"github.com/smallstep/certificates/errs"
	"go.step.sm/crypto/jose"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/stepca"
)

const (
	// popName is the SSHPOP provisioner (the name is fixed: internal/provisioner).
	popName     = "ssh-pop"
	popLifetime = 5 * time.Minute

	requestTimeout = 10 * time.Second
)

// ErrNoSSH says that the CA signs no SSH certificates.
var ErrNoSSH = errors.New("the CA has no SSH keys")

// The client would show the CA an identity that it finds in STEPPATH.
func init() { ca.DisableIdentity = true }

// Client gets certificates from one CA.
type Client struct {
	base   string
	ca     *ca.Client
	verify *stepca.Client
}

// New returns a client of the CA at url, which must prove itself under one of the roots.
func New(url string, roots ...*x509.Certificate) (*Client, error) {
	verify, err := stepca.New(url, roots...)
	if err != nil {
		return nil, err
	}
	base := strings.TrimRight(url, "/")
	client, err := ca.NewClient(base, ca.WithTransport(verify.Transport()), ca.WithTimeout(requestTimeout))
	if err != nil {
		return nil, fmt.Errorf("reading the CA's address: %w", err)
	}
	return &Client{base: base, ca: client, verify: verify}, nil
}

// SSHKeys returns the keys with which the CA signs host and user certificates.
func (c *Client) SSHKeys(ctx context.Context) (stepca.SSHKeys, error) {
	keys, err := c.verify.SSHRoots(ctx)
	if err != nil {
		return keys, err
	}
	if len(keys.User) == 0 || len(keys.Host) == 0 {
		return keys, fmt.Errorf("asking %q: %w", c.base+"/ssh/roots", ErrNoSSH)
	}
	return keys, nil
}

// VerifyTLS holds a chain, leaf first, against the CA's roots, the names that it must
// have, and its key.
func (c *Client) VerifyTLS(chain []*x509.Certificate, key crypto.PublicKey, names []string) error {
	return c.verify.Verify(chain, key, names...)
}

// SSHSign asks, with a one-time token, for a host certificate of key with these
// names. They must be those of the token.
func (c *Client) SSHSign(ctx context.Context, token string, key ssh.PublicKey, names []string) (*ssh.Certificate, error) {
	return c.ssh(ctx, "/ssh/sign", key, names, func(ctx context.Context) (api.SSHCertificate, error) {
		answer, err := c.ca.SSHSignWithContext(ctx, &api.SSHSignRequest{
			OTT: token, PublicKey: key.Marshal(), CertType: provisioner.SSHHostCert, KeyID: names[0], Principals: names,
		})
		if err != nil {
			return api.SSHCertificate{}, err
		}
		return answer.Certificate, nil
	})
}

// SSHRenew asks for a successor of a host certificate, with the same names and for
// as long. key is its private key. An expired certificate cannot be renewed.
func (c *Client) SSHRenew(ctx context.Context, cert *ssh.Certificate, key crypto.Signer) (*ssh.Certificate, error) {
	return c.ssh(ctx, "/ssh/renew", cert.Key, cert.ValidPrincipals, func(ctx context.Context) (api.SSHCertificate, error) {
		token, err := c.pop("/ssh/renew", cert, key)
		if err != nil {
			return api.SSHCertificate{}, err
		}
		answer, err := c.ca.SSHRenewWithContext(ctx, &api.SSHRenewRequest{OTT: token})
		if err != nil {
			return api.SSHCertificate{}, err
		}
		return answer.Certificate, nil
	})
}

// SSHRekey asks for a certificate like cert for another key. cert stays valid: it is
// the way to certify all keys of a host with one token.
func (c *Client) SSHRekey(ctx context.Context, cert *ssh.Certificate, key crypto.Signer, next ssh.PublicKey) (*ssh.Certificate, error) {
	return c.ssh(ctx, "/ssh/rekey", next, cert.ValidPrincipals, func(ctx context.Context) (api.SSHCertificate, error) {
		token, err := c.pop("/ssh/rekey", cert, key)
		if err != nil {
			return api.SSHCertificate{}, err
		}
		answer, err := c.ca.SSHRekeyWithContext(ctx, &api.SSHRekeyRequest{OTT: token, PublicKey: next.Marshal()})
		if err != nil {
			return api.SSHCertificate{}, err
		}
		return answer.Certificate, nil
	})
}

// TLSSign asks, with a one-time token, for a certificate of key with these names
// (DNS names and addresses), which must be those of the token. It returns the chain,
// leaf first.
func (c *Client) TLSSign(ctx context.Context, token string, key crypto.Signer, names []string) ([]*x509.Certificate, error) {
	csr, err := request(key, names)
	if err != nil {
		return nil, err
	}
	return c.tls(ctx, "/sign", key.Public(), names, func(ctx context.Context) (*api.SignResponse, error) {
		return c.ca.SignWithContext(ctx, &api.SignRequest{CsrPEM: csr, OTT: token})
	})
}

// TLSRenew asks for a successor of the pair's certificate, for the same key. An
// expired certificate cannot be renewed.
func (c *Client) TLSRenew(ctx context.Context, pair tls.Certificate) ([]*x509.Certificate, error) {
	key, names, err := read(pair)
	if err != nil {
		return nil, err
	}
	return c.tls(ctx, "/renew", key.Public(), names, func(ctx context.Context) (*api.SignResponse, error) {
		transport := c.verify.Transport(pair)
		defer transport.CloseIdleConnections()
		return c.ca.RenewWithContext(ctx, transport)
	})
}

// TLSRekey is TLSRenew with another key.
func (c *Client) TLSRekey(ctx context.Context, pair tls.Certificate, next crypto.Signer) ([]*x509.Certificate, error) {
	_, names, err := read(pair)
	if err != nil {
		return nil, err
	}
	csr, err := request(next, names)
	if err != nil {
		return nil, err
	}
	return c.tls(ctx, "/rekey", next.Public(), names, func(ctx context.Context) (*api.SignResponse, error) {
		transport := c.verify.Transport(pair)
		defer transport.CloseIdleConnections()
		return c.ca.RekeyWithContext(ctx, &api.RekeyRequest{CsrPEM: csr}, transport)
	})
}

// pop makes the token with which a host certificate asks for the next one.
func (c *Client) pop(path string, cert *ssh.Certificate, key crypto.Signer) (string, error) {
	algorithm, err := algorithm(key)
	if err != nil {
		return "", err
	}
	opts := new(jose.SignerOptions).WithType("JWT").WithHeader("sshpop", base64.StdEncoding.EncodeToString(cert.Marshal()))
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: key}, opts)
	if err != nil {
		return "", err
	}
	now := time.Now()
	return jose.Signed(signer).Claims(jose.Claims{
		// The fragment names the provisioner (certificates, authority/provisioner/collection.go).
		Issuer: popName, Subject: cert.KeyId, Audience: jose.Audience{c.base + "/1.0" + path + "#sshpop/" + popName}, ID: rand.Text(),
		IssuedAt: jose.NewNumericDate(now), NotBefore: jose.NewNumericDate(now), Expiry: jose.NewNumericDate(now.Add(popLifetime)),
	}).CompactSerialize()
}

func algorithm(key crypto.Signer) (jose.SignatureAlgorithm, error) {
	switch k := key.(type) {
	case ed25519.PrivateKey:
		return jose.EdDSA, nil
	case *rsa.PrivateKey:
		return jose.RS256, nil
	case *ecdsa.PrivateKey:
		switch k.Curve.Params().BitSize {
		case 256:
			return jose.ES256, nil
		case 384:
			return jose.ES384, nil
		case 521:
			return jose.ES512, nil
		}
	}
	return "", fmt.Errorf("signing a token: a key of type %T cannot", key)
}

func (c *Client) ssh(ctx context.Context, path string, key ssh.PublicKey, names []string,
	do func(context.Context) (api.SSHCertificate, error),
) (*ssh.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := do(ctx)
	if err != nil {
		return nil, c.explain(path, err)
	}
	keys, err := c.verify.SSHRoots(ctx)
	if err != nil {
		return nil, err
	}
	if err := VerifySSH(answer.Certificate, key, names, keys.Host); err != nil {
		return nil, fmt.Errorf("verifying the certificate from %q: %w", c.base+path, err)
	}
	return answer.Certificate, nil
}

func (c *Client) tls(ctx context.Context, path string, key crypto.PublicKey, names []string,
	do func(context.Context) (*api.SignResponse, error),
) ([]*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := do(ctx)
	if err != nil {
		return nil, c.explain(path, err)
	}
	var chain []*x509.Certificate
	for _, x := range answer.CertChainPEM {
		chain = append(chain, x.Certificate)
	}
	if err := c.verify.Verify(chain, key, names...); err != nil {
		return nil, fmt.Errorf("verifying the certificate from %q: %w", c.base+path, err)
	}
	return chain, nil
}

// explain makes step-ca's errors those of package stepca.
func (c *Client) explain(path string, err error) error {
	var no *errs.Error
	if errors.As(err, &no) {
		return &stepca.StatusError{URL: c.base + path, Code: no.StatusCode(), Message: no.Message()}
	}
	// "client POST URL failed: …", where the URL is in our own text.
	if inner := errors.Unwrap(err); inner != nil && strings.HasPrefix(err.Error(), "client ") {
		err = inner
	}
	return fmt.Errorf("asking %q: %w", c.base+path, stepca.Classify(err))
}

// VerifySSH holds a host certificate against its key, the names that it must have,
// and the keys that may have signed it.
func VerifySSH(cert *ssh.Certificate, key ssh.PublicKey, names []string, authorities []ssh.PublicKey) error {
	same := func(a ssh.PublicKey) func(ssh.PublicKey) bool {
		return func(b ssh.PublicKey) bool { return string(a.Marshal()) == string(b.Marshal()) }
	}
	switch {
	case cert == nil:
		return errors.New("there is none in the answer")
	case cert.CertType != ssh.HostCert:
		return errors.New("it is not a host certificate")
	case !same(key)(cert.Key):
		return errors.New("it is for another key")
	case !slices.ContainsFunc(authorities, same(cert.SignatureKey)):
		return errors.New("it is signed by a key that is none of the CA's SSH host keys")
	}
	var checker ssh.CertChecker
	for _, name := range names {
		// With the signature and the validity.
		if err := checker.CheckCert(name, cert); err != nil {
			return errors.New(strings.TrimPrefix(err.Error(), "ssh: "))
		}
	}
	return nil
}

// request is a certificate request for names, the first of which is the subject.
func request(key crypto.Signer, names []string) (api.CertificateRequest, error) {
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: names[0]}}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return api.CertificateRequest{}, fmt.Errorf("making a certificate request: %w", err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return api.CertificateRequest{}, fmt.Errorf("making a certificate request: %w", err)
	}
	return api.NewCertificateRequest(csr), nil
}

// read takes the key and the names out of a pair.
func read(pair tls.Certificate) (crypto.Signer, []string, error) {
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || len(pair.Certificate) == 0 {
		return nil, nil, errors.New("reading the certificate: it is not a pair of certificate and key")
	}
	leaf, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return nil, nil, fmt.Errorf("reading the certificate: %w", err)
	}
	names := Names(leaf)
	if len(names) == 0 {
		return nil, nil, errors.New("reading the certificate: it has no DNS name and no address")
	}
	return key, names, nil
}

// Names are the DNS names and addresses of a certificate, the subject's first.
func Names(leaf *x509.Certificate) []string {
	names := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	if i := slices.Index(names, leaf.Subject.CommonName); i > 0 {
		names = slices.Insert(slices.Delete(names, i, i+1), 0, leaf.Subject.CommonName)
	}
	return names
}
