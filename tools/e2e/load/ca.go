package load

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// CA is a CA as a client knows it that has the key of the provisioner "admin".
type CA struct {
	address string // where it is
	url     *url.URL
	tls     *tls.Config
	admin   jose.Signer
	kept    *http.Client // nil: each request has a connection of its own
}

// Open asks the CA at an address for the key of admin, and opens it. The URL is what
// clients call the CA.
func Open(ctx context.Context, address, at string, roots *x509.CertPool, password string) (*CA, error) {
	parsed, err := url.Parse(at)
	if err != nil {
		return nil, err
	}
	c := &CA{address: address, url: parsed, tls: &tls.Config{RootCAs: roots, ServerName: parsed.Hostname(), MinVersion: tls.VersionTLS12}}
	answer, err := c.ask(ctx, http.MethodGet, "/provisioners?limit=100", nil, nil, http.StatusOK)
	if err != nil {
		return nil, fmt.Errorf("asking %s for its provisioners: %w", address, err)
	}
	var list struct {
		Provisioners []struct{ Name, EncryptedKey string }
	}
	if err := json.Unmarshal(answer, &list); err != nil {
		return nil, err
	}
	for _, p := range list.Provisioners {
		if p.Name != "admin" {
			continue
		}
		sealed, err := jose.ParseEncryptedCompact(p.EncryptedKey, []jose.KeyAlgorithm{jose.PBES2_HS256_A128KW}, []jose.ContentEncryption{jose.A256GCM})
		if err != nil {
			return nil, err
		}
		plain, err := sealed.Decrypt([]byte(password))
		if err != nil {
			return nil, err
		}
		var key jose.JSONWebKey
		if err := json.Unmarshal(plain, &key); err != nil {
			return nil, err
		}
		c.admin, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("JWT"))
		return c, err
	}
	return nil, errors.New("the CA has no provisioner admin")
}

// At is the same CA at another address: behind another edge, or one of its replicas.
func (c *CA) At(address string) *CA {
	other := *c
	other.address = address
	return &other
}

// KeptAlive is the same CA, asked over connections that are kept: for requests that
// have to arrive at one instant. HangUp closes them.
func (c *CA) KeptAlive(connections int) *CA {
	other := *c
	other.kept = &http.Client{Timeout: Patience, Transport: &http.Transport{
		TLSClientConfig: c.tls, MaxIdleConnsPerHost: connections,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, c.address)
		},
	}}
	return &other
}

// HangUp closes the connections that are kept.
func (c *CA) HangUp() {
	if c.kept != nil {
		c.kept.CloseIdleConnections()
	}
}

// Clock is when a client believes to be.
type Clock func() time.Time

// Token is a one-time token for a certificate with the name, good for five minutes.
func (c *CA) Token(name string, now Clock) (string, error) {
	return c.token(name, "/1.0/sign", map[string]any{"sans": []string{name}}, now)
}

// RevocationToken is one for the revocation of a certificate.
func (c *CA) RevocationToken(serial string) (string, error) {
	return c.token(serial, "/1.0/revoke", nil, time.Now)
}

func (c *CA) token(subject, path string, more map[string]any, now Clock) (string, error) {
	at := now()
	return jwt.Signed(c.admin).Claims(jwt.Claims{
		Issuer: "admin", Subject: subject, Audience: jwt.Audience{c.url.JoinPath(path).String()}, ID: rand.Text(),
		IssuedAt: jwt.NewNumericDate(at), NotBefore: jwt.NewNumericDate(at), Expiry: jwt.NewNumericDate(at.Add(5 * time.Minute)),
	}).Claims(more).Serialize()
}

// request is a key and what asks for a certificate for it.
type request struct {
	key *ecdsa.PrivateKey
	der []byte
}

func newRequest(template *x509.CertificateRequest) (request, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return request{}, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	return request{key, der}, err
}

// Signing is asking for a certificate with a token of admin. Key and request are made
// here, once: they cost the client, and the client shares the machine with the CA.
func (c *CA) Signing(name string, now Clock) (Operation, error) {
	r, err := newRequest(&x509.CertificateRequest{DNSNames: []string{name}})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) (string, error) {
		body, err := c.signBody(r, name, now)
		if err != nil {
			return "", err
		}
		answer, err := c.Sign(ctx, body)
		return answer.serial, err
	}, nil
}

// SignBody is a request for a certificate, with a token of its own.
func (c *CA) SignBody(name string) ([]byte, error) {
	r, err := newRequest(&x509.CertificateRequest{DNSNames: []string{name}})
	if err != nil {
		return nil, err
	}
	return c.signBody(r, name, time.Now)
}

func (c *CA) signBody(r request, name string, now Clock) ([]byte, error) {
	token, err := c.Token(name, now)
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]string{
		"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.der})), "ott": token,
	})
}

// Issued is a certificate as the CA gave it.
type Issued struct {
	chain  [][]byte // DER, the leaf first
	serial string
}

// Serial is decimal, as the CA's own records have it.
func (i Issued) Serial() string { return i.serial }

// Sign posts a request for a certificate.
func (c *CA) Sign(ctx context.Context, body []byte) (Issued, error) {
	return c.issued(c.ask(ctx, http.MethodPost, "/1.0/sign", body, nil, http.StatusCreated))
}

// Renewing is asking, with a certificate, for one that follows it. The first is asked for here.
func (c *CA) Renewing(ctx context.Context, name string) (Operation, error) {
	r, err := newRequest(&x509.CertificateRequest{DNSNames: []string{name}})
	if err != nil {
		return nil, err
	}
	body, err := c.signBody(r, name, time.Now)
	if err != nil {
		return nil, err
	}
	first, err := c.Sign(ctx, body)
	if err != nil {
		return nil, fmt.Errorf("asking for the certificate to renew: %w", err)
	}
	own := &tls.Certificate{Certificate: first.chain, PrivateKey: r.key}
	return func(ctx context.Context) (string, error) {
		next, err := c.issued(c.ask(ctx, http.MethodPost, "/1.0/renew", nil, own, http.StatusCreated))
		return next.serial, err
	}, nil
}

// Asking is a GET that is answered with 200.
func (c *CA) Asking(path string) Operation {
	return func(ctx context.Context) (string, error) {
		_, err := c.ask(ctx, http.MethodGet, path, nil, nil, http.StatusOK)
		return "", err
	}
}

// Revoke posts a revocation.
func (c *CA) Revoke(ctx context.Context, serial, token, reason string) error {
	body, err := json.Marshal(map[string]any{"serial": serial, "ott": token, "reason": reason, "reasonCode": 4, "passive": true})
	if err != nil {
		return err
	}
	_, err = c.ask(ctx, http.MethodPost, "/1.0/revoke", body, nil, http.StatusOK)
	return err
}

func (c *CA) issued(answer []byte, err error) (Issued, error) {
	if err != nil {
		return Issued{}, err
	}
	var out struct{ CertChain []string }
	if err := json.Unmarshal(answer, &out); err != nil {
		return Issued{}, err
	}
	var i Issued
	for _, text := range out.CertChain {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			return Issued{}, fmt.Errorf("the answer has no certificate: %s", answer)
		}
		i.chain = append(i.chain, block.Bytes)
	}
	if len(i.chain) == 0 {
		return Issued{}, fmt.Errorf("the answer has no certificate: %s", answer)
	}
	leaf, err := x509.ParseCertificate(i.chain[0])
	if err != nil {
		return Issued{}, err
	}
	i.serial = leaf.SerialNumber.String()
	return i, nil
}

// Answer is what the CA says.
type Answer struct {
	Code   int
	Header http.Header
	Body   []byte
}

// ask sends a request and wants one answer.
func (c *CA) ask(ctx context.Context, method, path string, body []byte, own *tls.Certificate, want int) ([]byte, error) {
	answer, err := c.do(ctx, method, path, "application/json", body, own)
	if err == nil && answer.Code != want {
		err = &StatusError{Code: answer.Code, Body: string(answer.Body)}
	}
	return answer.Body, err
}

// Do sends a request.
func (c *CA) Do(ctx context.Context, method, path, contentType string, body []byte) (Answer, error) {
	return c.do(ctx, method, path, contentType, body, nil)
}

func (c *CA) do(ctx context.Context, method, path, contentType string, body []byte, own *tls.Certificate) (Answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.url.String()+path, bytes.NewReader(body))
	if err != nil {
		return Answer{}, err
	}
	if body != nil {
		req.Header.Set("Content-Type", contentType)
	}
	if c.kept != nil {
		resp, err := c.kept.Do(req)
		if err != nil {
			return Answer{}, err
		}
		return read(resp)
	}
	return c.once(ctx, req, own)
}

func read(resp *http.Response) (Answer, error) {
	defer resp.Body.Close() //nolint:errcheck // read to its end
	body, err := io.ReadAll(resp.Body)
	return Answer{resp.StatusCode, resp.Header, body}, err
}

// once sends a request over a connection of its own, with a handshake in full, as a
// client does that asks once a day.
func (c *CA) once(ctx context.Context, req *http.Request, own *tls.Certificate) (Answer, error) {
	req.Close = true
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.address)
	if err != nil {
		return Answer{}, err
	}
	defer conn.Close() //nolint:errcheck // nothing is left to lose
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return Answer{}, err
		}
	}
	config := c.tls
	if own != nil {
		config = config.Clone()
		config.Certificates = []tls.Certificate{*own}
	}
	secured := tls.Client(conn, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return Answer{}, err
	}
	if err := req.Write(secured); err != nil {
		return Answer{}, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(secured), req)
	if err != nil {
		return Answer{}, err
	}
	answer, err := read(resp)
	// The CA closes first: who does so keeps the port for a minute, and 28,000 ports
	// would be used up after 28,000 requests.
	if conn.SetReadDeadline(time.Now().Add(time.Second)) == nil {
		_, _ = conn.Read(make([]byte, 1)) // the answer is there
	}
	return answer, err
}
