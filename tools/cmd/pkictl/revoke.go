package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/revocation"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
)

var revoke = command{
	summary: "revoke a TLS or SSH certificate, after showing it",
	usage: `usage: pkictl revoke (--serial SERIAL | --cert FILE) [--reason NAME] [--note TEXT] [--apply]

Shows the certificate, as the CA's database has it, and with --apply revokes it.
There is no way back.

From then on the CA renews and rekeys it no more. Nobody else knows yet: a server or
client that does not look at revocation lists accepts it until it ends. With
step-ca/revocation.yml in COMPOSE_FILE the CA publishes lists: a CRL of TLS
certificates and a KRL of SSH ones, which have it within a minute; those who rely on
certificates take notice when they next fetch the list. Short lifetimes work for
everybody.

  --serial SERIAL     decimal, hex after 0x, or hex with colons as openssl prints it
  --cert FILE         the certificate itself: PEM, or OpenSSH (…-cert.pub); - is
                      standard input
  --reason NAME       unspecified (default), keyCompromise, affiliationChanged,
                      superseded, cessationOfOperation or privilegeWithdrawn
                      (RFC 5280 section 5.3.1); it is in the CRL
  --note TEXT         why, for those who read the database later; not in the CRL
  --apply             do it
  --ca-url URL        address of the CA (default https://step-ca:9000, or what
                      PKICTL_REVOKE_CA_URL says: the step-ca that makes the CRL)
  --root FILE         the root to trust, PEM (default /home/step/certs/root_ca.crt)
  --provisioner NAME  the JWK provisioner that revokes (default admin)

The provisioner's password comes from the file that PROVISIONER_PASSWORD_FILE names,
or from PROVISIONER_PASSWORD; it is needed with --apply.

` + databaseEnvironment + `
A certificate that is revoked already is left as it is, exit code 0.

Examples:
  docker compose run --rm pkictl revoke --serial 4f:1a:…:9c
  docker compose run --rm pkictl revoke --serial 4f:1a:…:9c --reason keyCompromise --apply
  docker compose run --rm -T pkictl revoke --cert - < web.crt
`,
	setup: func(fs *flag.FlagSet) work {
		var r revoker
		r.flags(fs, cmp.Or(os.Getenv("PKICTL_REVOKE_CA_URL"), "https://step-ca:9000"), "/home/step/certs/root_ca.crt")
		fs.StringVar(&r.provisioner, "provisioner", "admin", "")
		fs.StringVar(&r.serial, "serial", "", "")
		fs.StringVar(&r.file, "cert", "", "")
		fs.StringVar(&r.reason, "reason", "unspecified", "")
		fs.StringVar(&r.note, "note", "", "")
		fs.BoolVar(&r.apply, "apply", false, "")
		return r.run
	},
}

type revoker struct {
	authority
	provisioner          string
	serial, file         string
	reason, note         string
	apply                bool
	code                 int
	fromFile             *revocation.Certificate
	provisionersPassword config.Secret
}

func (r *revoker) run(ctx context.Context, log *slog.Logger) error {
	if err := r.check(); err != nil {
		return oneshot.Usage(err)
	}
	settings := func(s *config.Reader) {
		if r.apply {
			r.provisionersPassword = s.ProvisionerPassword()
		}
	}
	return withDatabase(ctx, settings, func(conn *pgx.Conn) error { return r.revoke(ctx, conn, log) })
}

// check reads what was asked for, all of it.
func (r *revoker) check() error {
	var problems []error
	var err error
	switch {
	case (r.serial == "") == (r.file == ""):
		problems = append(problems, errors.New("one of --serial and --cert must name the certificate"))
	case r.serial != "":
		if r.serial, err = revocation.ParseSerial(r.serial); err != nil {
			problems = append(problems, fmt.Errorf("--serial: %w; a good value: 0x4f1a9c", err))
		}
	default:
		if r.fromFile, err = revocation.ReadFile(r.file); err != nil {
			problems = append(problems, fmt.Errorf("--cert: %w", err))
		}
	}
	if r.code, err = revocation.ParseReason(r.reason); err != nil {
		problems = append(problems, fmt.Errorf("--reason: %w", err))
	}
	if !utf8.ValidString(r.note) || strings.ContainsFunc(r.note, func(c rune) bool { return !unicode.IsPrint(c) }) {
		problems = append(problems, errors.New("--note: it has a character that cannot be printed"))
	}
	return errors.Join(problems...)
}

func (r *revoker) revoke(ctx context.Context, conn *pgx.Conn, log *slog.Logger) error {
	cert, err := r.find(ctx, conn)
	if err != nil {
		return r.explainSerial(err)
	}
	if err := show(cert, time.Now()); err != nil {
		return fmt.Errorf("printing the certificate: %w", err)
	}
	if cert.Revoked != nil {
		log.LogAttrs(ctx, slog.LevelInfo, "unchanged", slog.String("serial", cert.Serial), slog.String("because", "it is revoked already"))
		return nil
	}
	if !r.apply {
		log.LogAttrs(ctx, slog.LevelInfo, "would be revoked; --apply does it",
			slog.String("serial", cert.Serial), slog.String("reason", r.reason))
		return nil
	}
	if err := r.ask(ctx, cert, log); err != nil {
		// Somebody else may have been faster.
		if now, again := r.find(ctx, conn); again == nil && now.Revoked != nil {
			log.LogAttrs(ctx, slog.LevelInfo, "unchanged", slog.String("serial", cert.Serial), slog.String("because", "it was just revoked by another request"))
			return nil
		}
		return r.explain(err)
	}
	after, err := r.find(ctx, conn)
	if err != nil {
		return fmt.Errorf("reading the revocation back: %w", err)
	}
	if after.Revoked == nil {
		return oneshot.WithHint(fmt.Errorf("reading the revocation back: the CA said ok, and its database has no revocation of serial %s", cert.Serial),
			"--ca-url must be the CA that works on this database")
	}
	log.LogAttrs(ctx, slog.LevelInfo, "revoked", slog.String("serial", cert.Serial), slog.String("kind", string(cert.Kind)),
		slog.String("reason", revocation.ReasonName(after.Revoked.Code)), slog.Time("at", after.Revoked.At))
	return nil
}

func (r *revoker) find(ctx context.Context, conn *pgx.Conn) (*revocation.Certificate, error) {
	if r.fromFile != nil {
		return revocation.Same(ctx, conn, r.fromFile)
	}
	return revocation.Find(ctx, conn, r.serial)
}

func (r *revoker) explainSerial(err error) error {
	switch {
	case errors.Is(err, revocation.ErrAmbiguous):
		return oneshot.WithHint(err, "name the one that is meant with --cert")
	case errors.Is(err, revocation.ErrUnknown) && r.serial != "":
		return oneshot.WithHint(err, `hex needs 0x before it or colons in it; "openssl x509 -noout -serial" prints hex, "ssh-keygen -L" decimal`)
	}
	return err
}

// ask has the CA revoke the certificate.
func (r *revoker) ask(ctx context.Context, cert *revocation.Certificate, log *slog.Logger) error {
	client, err := r.client(ctx, time.Now(), log)
	if err != nil {
		return err
	}
	jwk, err := client.JWK(ctx, r.provisioner, r.provisionersPassword.Reveal())
	if err != nil {
		return err
	}
	return client.Revoke(ctx, jwk, stepca.Revocation{SSH: cert.SSH(), Serial: cert.Serial, Code: r.code, Note: r.note})
}

// show prints what is known about a certificate.
func show(c *revocation.Certificate, now time.Time) error {
	subject, names := "subject", "names"
	if c.SSH() {
		subject, names = "key id", "principals"
	}
	serial, _ := new(big.Int).SetString(c.Serial, 10) // it comes from a certificate
	end := "never"
	if !c.NotAfter.IsZero() {
		end = c.NotAfter.UTC().Format(time.RFC3339)
	}
	status := "active"
	switch {
	case c.Revoked != nil:
		status = fmt.Sprintf("revoked at %s by %s, reason %s", c.Revoked.At.UTC().Format(time.RFC3339), orDash(c.Revoked.By), revocation.ReasonName(c.Revoked.Code))
		if c.Revoked.Note != "" {
			status += fmt.Sprintf(", note %q", c.Revoked.Note)
		}
	case !c.NotAfter.IsZero() && now.After(c.NotAfter):
		status = "expired"
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, line := range [][2]string{
		{"kind", string(c.Kind)},
		{"serial", fmt.Sprintf("%s (0x%x)", c.Serial, serial)},
		{subject, orDash(c.Subject)},
		{names, orDash(strings.Join(c.Names, ", "))},
		{"provisioner", orDash(c.Provisioner)},
		{"valid from", c.NotBefore.UTC().Format(time.RFC3339)},
		{"valid to", end},
		{"status", status},
	} {
		// A certificate's own words may hold anything.
		_, _ = fmt.Fprintf(w, "%s:\t%s\n", line[0], printable(line[1])) // Flush tells
	}
	return w.Flush()
}

// printable keeps foreign text from steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
