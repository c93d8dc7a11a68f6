package enrol

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"go.step.sm/crypto/jose"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

// Token is a one-time token as "pkictl token" makes it: good for one certificate,
// whose names it carries. Only the CA can tell whether it is genuine.
type Token struct {
	Raw         config.Secret
	SSH         bool // for an SSH host certificate, else for a TLS one
	Names       []string
	Expires     time.Time
	Fingerprint string // of the CA's root; empty if it does not say
}

// ReadToken takes a token apart. Errors do not repeat it.
func ReadToken(raw string) (Token, error) {
	parsed, err := jose.ParseSigned(raw)
	if err != nil {
		return Token{}, errors.New("it is not a token, or only a part of one")
	}
	var claims struct {
		jose.Claims
		SANs []string `json:"sans"`
		SHA  string   `json:"sha"`
		Step struct {
			SSH *struct {
				CertType   string   `json:"certType"`
				Principals []string `json:"principals"`
			} `json:"ssh"`
		} `json:"step"`
	}
	if err := parsed.UnsafeClaimsWithoutVerification(&claims); err != nil {
		return Token{}, errors.New("it is a token of another kind")
	}
	if len(claims.Audience) != 1 || claims.Expiry == nil || claims.Subject == "" {
		return Token{}, errors.New("it is a token of another kind")
	}
	t := Token{Raw: config.Secret(raw), Names: claims.SANs, Expires: claims.Expiry.Time(), Fingerprint: claims.SHA}
	audience, err := url.Parse(claims.Audience[0])
	if err != nil {
		return Token{}, errors.New("it is a token of another kind")
	}
	switch path := strings.TrimPrefix(audience.Path, "/1.0"); {
	case path == "/ssh/sign" && claims.Step.SSH != nil && claims.Step.SSH.CertType == "host":
		t.SSH, t.Names = true, claims.Step.SSH.Principals
	case path == "/ssh/sign":
		return Token{}, errors.New("it is for a person's SSH certificate, and not for a host's")
	case path != "/sign":
		return Token{}, fmt.Errorf("it is for %s, and not for a certificate", path)
	}
	if len(t.Names) == 0 {
		t.Names = []string{claims.Subject}
	}
	return t, nil
}
