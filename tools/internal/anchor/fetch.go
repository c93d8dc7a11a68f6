// Package anchor makes a machine trust the CA: it gets the root, checks it against
// the fingerprint that the operator was told, and brings it into the machine's
// trust stores and out of them again.
package anchor

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

// ErrForeign says that there was a certificate that no fingerprint vouches for.
var ErrForeign = errors.New("a certificate that nobody vouches for")

const sha256Digits = 64

// ParseFingerprint reads the SHA-256 of a certificate's DER as people paste it: hex
// in either case, with or without colons. It returns lower hex without colons.
func ParseFingerprint(s string) (string, error) {
	digits := s
	if strings.Contains(s, ":") {
		pairs := strings.Split(s, ":")
		if slices.ContainsFunc(pairs, func(p string) bool { return len(p) != 2 }) {
			return "", fmt.Errorf("%q has colons elsewhere than between pairs of hex digits", s)
		}
		digits = strings.Join(pairs, "")
	}
	for _, c := range digits {
		if !strings.ContainsRune("0123456789abcdefABCDEF", c) {
			return "", fmt.Errorf("%q has %q in it, which is not a hex digit", s, c)
		}
	}
	switch n := len(digits); n {
	case sha256Digits:
		return strings.ToLower(digits), nil
	case 2 * 20:
		return "", fmt.Errorf("%q is a SHA-1 fingerprint: SHA-256 has %d hex digits", s, sha256Digits)
	default:
		return "", fmt.Errorf("%q has %d hex digits: SHA-256 has %d", s, n, sha256Digits)
	}
}

// Fetch gets the root with a fingerprint from the CA at caURL. TLS is not verified,
// as there is nothing yet to verify it with: the fingerprint is what decides. The
// bundle holds that root and nothing else. What is not a root valid at now, or comes
// with anything beside it, is refused whole.
func Fetch(ctx context.Context, caURL, fingerprint string, now time.Time) (trustbundle.Bundle, error) {
	want, err := ParseFingerprint(fingerprint)
	if err != nil {
		return trustbundle.Bundle{}, fmt.Errorf("reading the fingerprint: %w", err)
	}
	data, err := stepca.UnverifiedRoot(ctx, caURL, want)
	if err != nil {
		return trustbundle.Bundle{}, explain(err, caURL)
	}
	bundle, err := trustbundle.Parse(data, now)
	if err == nil {
		err = OnlyThese(bundle, want)
	}
	if err != nil {
		return trustbundle.Bundle{}, oneshot.WithHint(fmt.Errorf("checking what %q serves as its root: %w", caURL, err), hintImpostor, caURL)
	}
	return bundle, nil
}

// OnlyThese refuses a bundle that holds a certificate of another fingerprint (lower
// hex), and names each.
func OnlyThese(bundle trustbundle.Bundle, fingerprints ...string) error {
	var problems []error
	for _, cert := range bundle.Roots() {
		if fp := x509util.Fingerprint(cert); !slices.Contains(fingerprints, fp) {
			problems = append(problems, fmt.Errorf("%w: %s", ErrForeign, describe(cert)))
		}
	}
	return errors.Join(problems...)
}

func describe(cert *x509.Certificate) string {
	return fmt.Sprintf("%q with the fingerprint %s", cert.Subject, x509util.Fingerprint(cert))
}

const hintImpostor = `nothing was installed. Either something between here and %[1]q has changed the answer, or the fingerprint is of something else: ` +
	`"make up" and trust/fingerprint on the CA host tell the right one`

// explain adds the way out to what can go wrong on the way.
func explain(err error, caURL string) error {
	var status *stepca.StatusError
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, stepca.ErrClosed):
		return oneshot.WithHint(err, "the edge closes connections from addresses that ALLOWED_IPS does not have: this machine's must be in it")
	case errors.Is(err, stepca.ErrUnreachable), errors.As(err, &status) && status.Code >= http.StatusInternalServerError:
		return oneshot.WithHint(err, `the address is https://DOMAIN_CA:9000 of the CA; "make status" on the CA host tells whether it serves`)
	case errors.As(err, &status) && status.Code == http.StatusNotFound:
		return oneshot.WithHint(err, hintImpostor, caURL)
	}
	return oneshot.WithHint(err, "what answers at %q is not step-ca", caURL)
}
