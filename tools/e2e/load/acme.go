package load

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/acme"
)

// Responder answers the http-01 challenges of all clients, at an address from which the
// CA can be reached and which the certificates are for.
type Responder struct {
	address netip.Addr
	answers sync.Map // by path
	server  *http.Server
}

// Respond begins to answer on port 80 of an address of this machine.
func Respond(ctx context.Context, address netip.Addr) (*Responder, error) {
	r := &Responder{address: address}
	r.server = &http.Server{ReadHeaderTimeout: Patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		answer, ok := r.answers.Load(req.URL.Path)
		if !ok {
			http.NotFound(w, req)
			return
		}
		_, _ = fmt.Fprint(w, answer) //nolint:gosec // G705: it is what our own client has stored
	})}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(address.String(), "80"))
	if err != nil {
		return nil, err
	}
	go r.server.Serve(listener) //nolint:errcheck // ends with Close
	return r, nil
}

// Close ends it.
func (r *Responder) Close() error { return r.server.Close() }

// ACME is a client of RFC 8555 with a new key at the CA. The connections that it uses
// are kept until they are closed by the returned function. It tries nothing twice.
func (c *CA) ACME() (*acme.Client, func(), error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	transport := &http.Transport{
		TLSClientConfig: c.tls,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, c.address)
		},
	}
	return &acme.Client{
		Key: key, DirectoryURL: c.url.JoinPath("/acme/acme/directory").String(),
		HTTPClient:   &http.Client{Transport: transport},
		RetryBackoff: func(int, *http.Request, *http.Response) time.Duration { return -1 },
	}, transport.CloseIdleConnections, nil
}

// Ordering is an order of a client with an account of its own, from newOrder to the
// certificate, over one connection. The account is made here; one account's orders
// must not run in parallel (smallstep/certificates#341).
func (c *CA) Ordering(ctx context.Context, r *Responder) (Operation, error) {
	client, hangUp, err := c.ACME()
	if err != nil {
		return nil, err
	}
	defer hangUp()
	if _, err := client.Register(ctx, &acme.Account{}, acme.AcceptTOS); err != nil {
		return nil, fmt.Errorf("registering an account: %w", err)
	}
	csr, err := newRequest(&x509.CertificateRequest{IPAddresses: []net.IP{r.address.AsSlice()}})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), orderPatience)
		defer cancel()
		defer hangUp()
		return order(ctx, client, r, csr.der)
	}, nil
}

func order(ctx context.Context, client *acme.Client, r *Responder, csr []byte) (string, error) {
	o, err := client.AuthorizeOrder(ctx, acme.IPIDs(r.address.String()))
	if err != nil {
		return "", err
	}
	for _, url := range o.AuthzURLs {
		if err := fulfil(ctx, client, r, url); err != nil {
			return "", err
		}
	}
	if o, err = client.WaitOrder(ctx, o.URI); err != nil {
		return "", err
	}
	chain, _, err := client.CreateOrderCert(ctx, o.FinalizeURL, csr, false)
	if err != nil {
		return "", err
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return "", err
	}
	return leaf.SerialNumber.String(), nil
}

func fulfil(ctx context.Context, client *acme.Client, r *Responder, url string) error {
	authorization, err := client.GetAuthorization(ctx, url)
	if err != nil {
		return err
	}
	for _, challenge := range authorization.Challenges {
		if challenge.Type != "http-01" {
			continue
		}
		path := client.HTTP01ChallengePath(challenge.Token)
		answer, err := client.HTTP01ChallengeResponse(challenge.Token)
		if err != nil {
			return err
		}
		r.answers.Store(path, answer)
		defer r.answers.Delete(path)
		accepted, err := client.Accept(ctx, challenge)
		if err != nil {
			return err
		}
		if accepted.Status != acme.StatusValid { // step-ca looks at once
			return fmt.Errorf("the challenge is %s: %w", accepted.Status, accepted.Error)
		}
		return nil
	}
	return errors.New("the CA offers no http-01 for " + strings.Join([]string{authorization.Identifier.Type, authorization.Identifier.Value}, " "))
}
