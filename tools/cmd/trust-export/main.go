// Command trust-export publishes what others need to trust the CA: its roots, their
// fingerprint and the SSH CA keys, in the forms that clients read.
//
// It compares what lies in the CA's directory with what the live CA serves, and
// writes nothing unless both agree.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
)

const usage = `usage: trust-export [flags]

Publishes the roots and SSH CA keys of a running CA as files.

  --certs DIR       the CA's directory of certificates (default /home/step/certs):
                    root_ca.crt, ssh_host_ca_key.pub, ssh_user_ca_key.pub
  --out DIR         where the files go (default /trust)
  --ca-url URL      the CA that must serve the same (default https://step-ca:9000)
  --timeout LENGTH  how long to wait for the CA (default 30s)

Files:
  root_ca.crt       the current root, PEM
  root_ca.der       the current root, DER
  roots.pem         all roots, ordered by fingerprint
  truststore.p12    all roots for Java; its password is "changeit" and protects nothing
  fingerprint       SHA-256 of the current root's DER, in hex
  ssh_host_ca.pub   the key that signs SSH host certificates
  ssh_user_ca.pub   the key that signs SSH user certificates, for TrustedUserCAKeys
  known_hosts       a line that trusts every host with such a certificate
  SHA256SUMS        check with: sha256sum -c SHA256SUMS

Examples:
  trust-export
  trust-export --certs ./certs --out ./trust --ca-url https://localhost:9000
`

func main() { oneshot.Main("trust-export", run) }

func run(ctx context.Context, args []string, log *slog.Logger) error {
	fs := flag.NewFlagSet("trust-export", flag.ContinueOnError)
	certs := fs.String("certs", "/home/step/certs", "")
	out := fs.String("out", "/trust", "")
	caURL := fs.String("ca-url", "https://step-ca:9000", "")
	timeout := fs.Duration("timeout", 30*time.Second, "")
	if err := oneshot.Parse(fs, args, usage); err != nil {
		return err
	}
	src, err := read(*certs, time.Now())
	if err != nil {
		return err
	}
	client, err := stepca.New(*caURL, src.bundle.Roots()...)
	if err != nil {
		return oneshot.Usage(err)
	}
	if err := wait(ctx, client, *timeout, log); err != nil {
		return err
	}
	if err := compare(ctx, client, src, *caURL); err != nil {
		return err
	}
	files, err := src.files(*out)
	if err != nil {
		return err
	}
	return write(ctx, *out, files, log)
}

const pause = 250 * time.Millisecond

// wait returns when the CA serves. A CA that cannot be reached yet is waited for; one
// that is not the right one is not.
func wait(ctx context.Context, client *stepca.Client, timeout time.Duration, log *slog.Logger) error {
	deadline, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for waiting := false; ; waiting = true {
		err := client.Health(deadline)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, stepca.ErrUntrusted):
			return oneshot.WithHint(err, "%s", hintDiffers)
		case !errors.Is(err, stepca.ErrUnreachable) && !errors.Is(err, stepca.ErrClosed) && ctx.Err() == nil:
			return err
		case !waiting:
			log.LogAttrs(ctx, slog.LevelInfo, "waiting for the CA", slog.Duration("at most", timeout), slog.String("reason", err.Error()))
		}
		select {
		case <-deadline.Done():
			if ctx.Err() != nil {
				return fmt.Errorf("waiting for the CA: %w", ctx.Err())
			}
			return oneshot.WithHint(fmt.Errorf("waiting %s for the CA: %w", timeout, err),
				`"docker compose ps step-ca" tells whether it runs, "docker compose logs step-ca" why not`)
		case <-time.After(pause):
		}
	}
}
