// Package stepca is the CA as its clients see it: over TLS that is verified against
// the given roots, with bounds on time and size.
//
// The few types of step-ca's API are written down here instead of imported from
// github.com/smallstep/certificates, which would link the whole CA into every
// client. Tests hold them against a real authority of the version that runs.
package stepca

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	requestTimeout = 10 * time.Second
	maxBody        = 1 << 20
	maxMessage     = 300
)

// Reasons for which a request never got an answer.
var (
	// ErrUnreachable: no connection, for want of a name, a route or a listener; or
	// nothing came back in time.
	ErrUnreachable = errors.New("no answer")
	// ErrClosed: connected, then cut off before TLS was up. An edge does that to
	// addresses that it does not admit.
	ErrClosed = errors.New("connection closed before the CA answered")
	// ErrUntrusted: what answered has a certificate that the roots do not verify.
	ErrUntrusted = errors.New("certificate not trusted")
)

// StatusError is an answer that says no.
type StatusError struct {
	URL     string
	Code    int
	Message string // step-ca's own words, if there were any
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("asking %q: status %d", e.URL, e.Code)
	if e.Message != "" {
		s += fmt.Sprintf(", %q", e.Message)
	}
	return s
}

// Client talks to one CA.
type Client struct {
	base  string
	host  string
	port  string
	at    netip.Addr // of one replica; invalid: whichever answers
	roots *x509.CertPool
	http  *http.Client
}

// New returns a client of the CA at rawURL, which must prove itself with a
// certificate for that host under one of the roots.
func New(rawURL string, roots ...*x509.Certificate) (*Client, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" ||
		u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("reading the CA's address: %q is not of the form https://HOST:PORT", rawURL)
	}
	c := &Client{base: "https://" + u.Host, host: u.Hostname(), port: u.Port(), roots: x509.NewCertPool()}
	if c.port == "" {
		c.port = "443"
	}
	for _, r := range roots {
		c.roots.AddCert(r)
	}
	c.http = c.client()
	return c, nil
}

// Replicas returns a client of each CA that the host's name stands for, by address. Each
// has to prove itself as the host all the same.
func (c *Client) Replicas(ctx context.Context) (map[netip.Addr]*Client, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", c.host)
	if err != nil {
		return nil, fmt.Errorf("looking for the CA: %w: %w", ErrUnreachable, err)
	}
	replicas := map[netip.Addr]*Client{}
	for _, addr := range addrs {
		replica := *c
		replica.at = addr.Unmap()
		replica.http = replica.client()
		replicas[replica.at] = &replica
	}
	return replicas, nil
}

// client makes an HTTP client that shows certs, if any, to the CA.
func (c *Client) client(certs ...tls.Certificate) *http.Client {
	return &http.Client{
		Timeout:       requestTimeout,
		Transport:     c.Transport(certs...),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Transport connects to the CA, verifies it against the roots and shows it certs, if
// any. No proxy is asked: the CA judges by address who is calling.
func (c *Client) Transport(certs ...tls.Certificate) *http.Transport {
	var dialer net.Dialer
	return &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if c.at.IsValid() {
				address = net.JoinHostPort(c.at.String(), c.port)
			}
			return dialer.DialContext(ctx, network, address)
		},
		TLSClientConfig:   &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: c.roots, Certificates: certs},
		ForceAttemptHTTP2: true,
		IdleConnTimeout:   requestTimeout,
	}
}

// Health returns nil if the CA serves. step-ca's answer is static: it says nothing
// about the database (smallstep/certificates#935).
func (c *Client) Health(ctx context.Context) error {
	var health struct {
		Status string `json:"status"`
	}
	if err := c.json(ctx, c.http, http.MethodGet, "/health", nil, &health); err != nil {
		return err
	}
	if health.Status != "ok" {
		return fmt.Errorf("asking %q: the CA says that it is %q", c.base+"/health", health.Status)
	}
	return nil
}

// RootsPEM returns the roots that the CA serves, unparsed.
func (c *Client) RootsPEM(ctx context.Context) ([]byte, error) {
	return c.do(ctx, c.http, http.MethodGet, "/roots.pem", nil)
}

// UnverifiedRoot asks the CA at rawURL for the root with a fingerprint, lower hex. It
// needs no root to start from, so it takes the word of whatever answers: what comes
// back is worth nothing until it is compared with the fingerprint.
func UnverifiedRoot(ctx context.Context, rawURL, fingerprint string) ([]byte, error) {
	c, err := New(rawURL)
	if err != nil {
		return nil, err
	}
	client := c.client()
	client.Transport.(*http.Transport).TLSClientConfig.InsecureSkipVerify = true
	var answer struct {
		PEM string `json:"ca"`
	}
	if err := c.json(ctx, client, http.MethodGet, "/root/"+fingerprint, nil, &answer); err != nil {
		return nil, err
	}
	return []byte(answer.PEM), nil
}

// SSHKeys are the public keys of the SSH CA.
type SSHKeys struct {
	Host, User []ssh.PublicKey
}

// SSHRoots returns the SSH CA's keys, none if the CA signs no SSH certificates.
func (c *Client) SSHRoots(ctx context.Context) (SSHKeys, error) {
	var body struct {
		Host [][]byte `json:"hostKey"` // in base64, wire format of RFC 4253 section 6.6
		User [][]byte `json:"userKey"`
	}
	var status *StatusError
	err := c.json(ctx, c.http, http.MethodGet, "/ssh/roots", nil, &body)
	if errors.As(err, &status) && status.Code == http.StatusNotFound {
		return SSHKeys{}, nil
	}
	if err != nil {
		return SSHKeys{}, err
	}
	var keys SSHKeys
	for _, kind := range []struct {
		from [][]byte
		to   *[]ssh.PublicKey
	}{{body.Host, &keys.Host}, {body.User, &keys.User}} {
		for _, wire := range kind.from {
			key, err := ssh.ParsePublicKey(wire)
			if err != nil {
				return SSHKeys{}, fmt.Errorf("asking %q: SSH key %q: %w", c.base+"/ssh/roots", base64.StdEncoding.EncodeToString(wire), err)
			}
			*kind.to = append(*kind.to, key)
		}
	}
	return keys, nil
}

func (c *Client) json(ctx context.Context, client *http.Client, method, path string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return fmt.Errorf("asking %q: %w", c.base+path, err)
		}
	}
	data, err := c.do(ctx, client, method, path, body)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("asking %q: reading the answer: %w", c.base+path, err)
	}
	return nil
}

func (c *Client) do(ctx context.Context, client *http.Client, method, path string, body []byte) ([]byte, error) {
	target := c.base + path
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("asking %q: %w", target, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking %q: %w", target, Classify(err))
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("asking %q: reading the answer: %w", target, err)
	case len(data) > maxBody:
		return nil, fmt.Errorf("asking %q: the answer is larger than %d bytes", target, maxBody)
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated:
		return nil, &StatusError{URL: target, Code: resp.StatusCode, Message: message(data)}
	}
	return data, nil
}

// message takes the text out of step-ca's error object.
func message(data []byte) string {
	var e struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(data, &e) != nil {
		return ""
	}
	if len(e.Message) > maxMessage {
		return e.Message[:maxMessage] + "…"
	}
	return e.Message
}

// Classify says what kind of failure err is: one of the reasons above, or, for errors
// that fit nowhere, err as it is.
func Classify(err error) error {
	var (
		outer     *url.Error
		op        *net.OpError
		timeout   net.Error
		untrusted *tls.CertificateVerificationError
		record    tls.RecordHeaderError
	)
	if errors.As(err, &outer) {
		err = outer.Err // the address is in our own text
	}
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &untrusted):
		return fmt.Errorf("%w: %w", ErrUntrusted, untrusted.Err)
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		return fmt.Errorf("%w: what answers does not speak TLS", ErrUntrusted)
	case errors.As(err, &op) && op.Op == "dial", errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return err
}
