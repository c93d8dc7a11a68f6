package main

import (
	"context"
	"crypto/x509"
	"errors"
	"flag"
	"log/slog"
	"net/http"
	"time"

	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

// authority is the CA that a subcommand talks to.
type authority struct {
	url, root string
}

func (a *authority) flags(fs *flag.FlagSet, url, root string) {
	fs.StringVar(&a.url, "ca-url", url, "")
	fs.StringVar(&a.root, "root", root, "")
}

func (a *authority) client(ctx context.Context, now time.Time, log *slog.Logger) (*stepca.Client, error) {
	bundle, err := trustbundle.Read(a.root, now)
	if err != nil {
		return nil, oneshot.WithHint(err, "trust-export publishes the root as root_ca.crt")
	}
	for _, root := range bundle.Roots() {
		log.LogAttrs(ctx, slog.LevelInfo, "trusting", slog.String("root", x509util.Fingerprint(root)))
	}
	client, err := stepca.New(a.url, bundle.Roots()...)
	if err != nil {
		return nil, oneshot.Usage(err)
	}
	return client, nil
}

// explain adds the way out to what can go wrong.
func (a *authority) explain(err error) error {
	var (
		name   x509.HostnameError
		status *stepca.StatusError
	)
	switch {
	case errors.Is(err, stepca.ErrClosed):
		return oneshot.WithHint(err, `the edge closes connections from addresses that ALLOWED_IPS does not have; `+
			`from this host and its containers it sees the gateway of EDGE_SUBNET (its first address), from elsewhere the client's own; `+
			`"docker compose logs caddy" shows the address that it refused`)
	case errors.Is(err, stepca.ErrUnreachable):
		return oneshot.WithHint(err, `"docker compose ps" tells whether caddy and step-ca run; CA_PORT is the port that is published`)
	case errors.As(err, &name):
		return oneshot.WithHint(err, "the host in --ca-url must be one of PKI_DNS_NAMES, or DOMAIN_CA")
	case errors.Is(err, stepca.ErrUntrusted):
		return oneshot.WithHint(err, "%q is not the root of the CA at %q, or something stands between", a.root, a.url)
	case errors.Is(err, stepca.ErrPassword):
		return oneshot.WithHint(err, "PROVISIONER_PASSWORD must be the password that the provisioner's key was made with")
	case errors.Is(err, stepca.ErrNoProvisioner):
		return oneshot.WithHint(err, `the CA lists its provisioners at %s/provisioners`, a.url)
	case errors.As(err, &status) && status.Code >= http.StatusInternalServerError:
		return oneshot.WithHint(err, `the CA runs and cannot do its work, for want of its database as a rule: "docker compose logs step-ca"`)
	}
	return err
}
