package stepca

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// Revocation is a request to revoke a certificate.
type Revocation struct {
	SSH    bool
	Serial string // decimal
	Code   int    // of RFC 5280 section 5.3.1
	Note   string // free text, kept beside the code
}

// Revoke revokes a certificate with a token of p. The CA knows passive revocation
// only: it refuses to renew the certificate and lists it in the CRL if it has one.
// It does not ask whether it ever issued a certificate of that serial.
func (c *Client) Revoke(ctx context.Context, p *JWK, r Revocation) error {
	path := "/1.0/revoke"
	if r.SSH {
		path = "/1.0/ssh/revoke"
	}
	token, err := p.token(c.base+path, r.Serial, nil, tokenLifetime, time.Now())
	if err != nil {
		return fmt.Errorf("making a one-time token: %w", err)
	}
	request := struct {
		Serial     string `json:"serial"`
		OTT        string `json:"ott"`
		ReasonCode int    `json:"reasonCode"`
		Reason     string `json:"reason"`
		Passive    bool   `json:"passive"`
	}{r.Serial, token, r.Code, r.Note, true}
	var answer struct {
		Status string `json:"status"`
	}
	if err := c.json(ctx, c.http, http.MethodPost, path, request, &answer); err != nil {
		return err
	}
	if answer.Status != "ok" {
		return fmt.Errorf("asking %q: the CA says %q", c.base+path, answer.Status)
	}
	return nil
}
