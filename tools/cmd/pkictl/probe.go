package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
)

var probe = command{
	summary: "prove the CA from outside: get a certificate and renew it",
	usage: `usage: pkictl probe [flags]

Gets a short-lived certificate from the CA with a one-time token, verifies its chain,
name, key and purposes, renews it over mTLS and verifies that one too. Prints one line
about the first certificate; "seconds" is what all of it took.

  --ca-url URL        address of the CA (default https://127.0.0.1:9000)
  --root FILE         the root to trust, PEM (default /trust/root_ca.crt)
  --provisioner NAME  a JWK provisioner (default admin)
  --lifetime LENGTH   of the certificate (default: the CA's own default)
  --allow-refusal     end well, with a warning, if ALLOWED_IPS does not admit this machine

The provisioner's password comes from the file that PROVISIONER_PASSWORD_FILE names,
or from PROVISIONER_PASSWORD.

Examples:
  PROVISIONER_PASSWORD_FILE=/run/secrets/provisioner_password pkictl probe
  pkictl probe --ca-url https://ca.internal:9000 --root ./trust/root_ca.crt
`,
	setup: func(fs *flag.FlagSet) work {
		var p prober
		p.flags(fs, "https://127.0.0.1:9000", "/trust/root_ca.crt")
		fs.StringVar(&p.provisioner, "provisioner", "admin", "")
		fs.DurationVar(&p.lifetime, "lifetime", 0, "")
		fs.BoolVar(&p.allowRefusal, "allow-refusal", false, "")
		return p.run
	},
}

type prober struct {
	authority
	provisioner  string
	lifetime     time.Duration
	allowRefusal bool
}

func (p *prober) run(ctx context.Context, log *slog.Logger) error {
	began := time.Now()
	settings := config.NewReader()
	password := settings.ProvisionerPassword()
	if err := settings.Err(); err != nil {
		return err
	}
	client, err := p.client(ctx, began, log)
	if err != nil {
		return err
	}
	cert, err := p.certificate(ctx, client, password, log)
	if p.allowRefusal && errors.Is(err, stepca.ErrClosed) {
		log.LogAttrs(ctx, slog.LevelWarn, "not proved: ALLOWED_IPS does not admit this machine, so ask for a certificate from one that it does", slog.String("url", p.url))
		return nil
	}
	if err != nil {
		return p.explain(err)
	}
	fmt.Printf("certificate serial=%s issuer=%q seconds=%.3f\n",
		cert.Leaf().SerialNumber, cert.Leaf().Issuer.CommonName, time.Since(began).Seconds())
	return nil
}

// certificate gets one, renews it, and returns the first.
func (p *prober) certificate(ctx context.Context, client *stepca.Client, password config.Secret, log *slog.Logger) (*stepca.Certificate, error) {
	if err := client.Health(ctx); err != nil {
		return nil, err
	}
	jwk, err := client.JWK(ctx, p.provisioner, password.Reveal())
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	name := "probe." + strings.ToLower(rand.Text()) + ".internal"
	first, err := client.Issue(ctx, jwk, name, p.lifetime, key)
	if err != nil {
		return nil, err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "issued", slog.String("name", name), slog.String("serial", first.Leaf().SerialNumber.String()))
	second, err := client.Renew(ctx, first)
	if err != nil {
		return nil, err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "renewed", slog.String("name", name), slog.String("serial", second.Leaf().SerialNumber.String()))
	return first, nil
}
