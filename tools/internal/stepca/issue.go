package stepca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"go.step.sm/crypto/jose"
)

// JWK is a provisioner whose private key the CA hands out in encrypted form.
type JWK struct {
	name string
	key  *jose.JSONWebKey
}

var (
	// ErrNoProvisioner: the CA has no JWK provisioner of that name.
	ErrNoProvisioner = errors.New("the CA has no such JWK provisioner")
	// ErrPassword: the password does not open the provisioner's key.
	ErrPassword = errors.New("wrong password")
)

// tokenLifetime is for tokens that are used at once.
const tokenLifetime = 5 * time.Minute

// JWK finds a JWK provisioner by name and opens its key.
func (c *Client) JWK(ctx context.Context, name, password string) (*JWK, error) {
	encrypted, err := c.encryptedKey(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("looking for provisioner %q: %w", name, err)
	}
	jwe, err := jose.ParseEncrypted(encrypted)
	if err != nil {
		return nil, fmt.Errorf("reading the key of provisioner %q: %w", name, err)
	}
	plain, err := jwe.Decrypt([]byte(password))
	if err != nil {
		return nil, fmt.Errorf("opening the key of provisioner %q: %w", name, ErrPassword)
	}
	key := new(jose.JSONWebKey)
	if err := json.Unmarshal(plain, key); err != nil || key.IsPublic() || !key.Valid() {
		return nil, fmt.Errorf("reading the key of provisioner %q: it is not a private JWK", name)
	}
	return &JWK{name: name, key: key}, nil
}

func (c *Client) encryptedKey(ctx context.Context, name string) (string, error) {
	all, err := c.Provisioners(ctx)
	if err != nil {
		return "", err
	}
	for _, data := range all {
		var p struct {
			Type         string `json:"type"`
			Name         string `json:"name"`
			EncryptedKey string `json:"encryptedKey"`
		}
		// What does not read as one is a provisioner of another type.
		if json.Unmarshal(data, &p) == nil && p.Name == name && strings.EqualFold(p.Type, "JWK") && p.EncryptedKey != "" {
			return p.EncryptedKey, nil
		}
	}
	return "", ErrNoProvisioner
}

// Host is what a one-time token for a host is about.
type Host struct {
	CAURL       string   // as the host knows it; its name must be one of the CA's own
	Fingerprint string   // of the root
	Names       []string // DNS names and addresses, the host's own first
	Lifetime    time.Duration
}

// SSHHostToken makes a one-time token for an SSH host certificate.
func (p *JWK) SSHHostToken(h Host) (string, error) {
	return p.hostToken(h, "/1.0/ssh/sign", map[string]any{
		"step": map[string]any{"ssh": map[string]any{"certType": "host", "keyID": h.Names[0], "principals": h.Names}},
	})
}

// TLSToken makes a one-time token for a TLS certificate.
func (p *JWK) TLSToken(h Host) (string, error) {
	return p.hostToken(h, "/1.0/sign", map[string]any{"sans": h.Names})
}

func (p *JWK) hostToken(h Host, path string, further map[string]any) (string, error) {
	further["sha"] = h.Fingerprint
	token, err := p.token(h.CAURL+path, h.Names[0], further, h.Lifetime, time.Now())
	if err != nil {
		return "", fmt.Errorf("making a one-time token: %w", err)
	}
	return token, nil
}

// token makes a one-time token. audience is the URL that it is meant for; further
// claims are step-ca's own.
func (p *JWK) token(audience, subject string, further map[string]any, lifetime time.Duration, now time.Time) (string, error) {
	opts := new(jose.SignerOptions).WithType("JWT").WithHeader("kid", p.key.KeyID)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(p.key.Algorithm), Key: p.key.Key}, opts)
	if err != nil {
		return "", err
	}
	return jose.Signed(signer).Claims(jose.Claims{
		Issuer: p.name, Subject: subject, Audience: jose.Audience{audience}, ID: rand.Text(),
		IssuedAt: jose.NewNumericDate(now), NotBefore: jose.NewNumericDate(now),
		Expiry: jose.NewNumericDate(now.Add(lifetime)),
	}).Claims(further).CompactSerialize()
}

// Certificate is an issued one with its chain (leaf first) and key.
type Certificate struct {
	Chain []*x509.Certificate
	key   crypto.Signer
}

// Leaf is the certificate itself.
func (c *Certificate) Leaf() *x509.Certificate { return c.Chain[0] }

type signRequest struct {
	CSR      string `json:"csr"`
	OTT      string `json:"ott"`
	NotAfter string `json:"notAfter,omitempty"`
}

// Issue asks for a certificate for the DNS name, with a token of p, and verifies it.
// With a lifetime of 0 the CA decides.
func (c *Client) Issue(ctx context.Context, p *JWK, name string, lifetime time.Duration, key crypto.Signer) (*Certificate, error) {
	token, err := p.token(c.base+"/1.0/sign", name, map[string]any{"sans": []string{name}}, tokenLifetime, time.Now())
	if err != nil {
		return nil, fmt.Errorf("making a one-time token: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{name}}, key)
	if err != nil {
		return nil, fmt.Errorf("making a certificate request: %w", err)
	}
	request := signRequest{CSR: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})), OTT: token}
	if lifetime > 0 {
		request.NotAfter = lifetime.String()
	}
	return c.obtain(ctx, c.http, "/1.0/sign", name, key, request)
}

// Renew asks for a successor of cert over mTLS, on a connection of its own, and
// verifies it.
func (c *Client) Renew(ctx context.Context, cert *Certificate) (*Certificate, error) {
	pair := tls.Certificate{PrivateKey: cert.key}
	for _, x := range cert.Chain {
		pair.Certificate = append(pair.Certificate, x.Raw)
	}
	client := c.client(pair)
	defer client.CloseIdleConnections()
	next, err := c.obtain(ctx, client, "/1.0/renew", cert.Leaf().DNSNames[0], cert.key, nil)
	if err != nil {
		return nil, err
	}
	if next.Leaf().SerialNumber.Cmp(cert.Leaf().SerialNumber) == 0 {
		return nil, fmt.Errorf("renewing: the CA returned the same certificate, serial %s", cert.Leaf().SerialNumber)
	}
	return next, nil
}

func (c *Client) obtain(ctx context.Context, client *http.Client, path, name string, key crypto.Signer, in any) (*Certificate, error) {
	var out struct {
		Chain []string `json:"certChain"`
	}
	if err := c.json(ctx, client, http.MethodPost, path, in, &out); err != nil {
		return nil, err
	}
	cert := &Certificate{key: key}
	for _, text := range out.Chain {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			return nil, fmt.Errorf("asking %q: the answer has a certificate that is not PEM", c.base+path)
		}
		x, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("asking %q: %w", c.base+path, err)
		}
		cert.Chain = append(cert.Chain, x)
	}
	if err := c.Verify(cert.Chain, key.Public(), name); err != nil {
		return nil, fmt.Errorf("verifying the certificate from %q: %w", c.base+path, err)
	}
	return cert, nil
}

// Verify holds a chain, leaf first, against the roots, the names that it was asked
// for (DNS names and addresses), its key and its purposes.
func (c *Client) Verify(chain []*x509.Certificate, key crypto.PublicKey, names ...string) error {
	if len(chain) == 0 {
		return errors.New("there is none in the answer")
	}
	leaf, intermediates := chain[0], x509.NewCertPool()
	for _, x := range chain[1:] {
		intermediates.AddCert(x)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: c.roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}})
		if err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := leaf.VerifyHostname(name); err != nil {
			return err
		}
	}
	pub, ok := key.(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case !ok || !pub.Equal(leaf.PublicKey):
		return errors.New("it is for another key")
	case leaf.IsCA:
		return errors.New("it is a CA certificate")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("its key usage has no digital signature")
	}
	return nil
}
