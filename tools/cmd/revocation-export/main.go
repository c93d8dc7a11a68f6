// Command revocation-export publishes what was revoked, again and again: the CRL of
// the CA's certificates, and a KRL of its SSH certificates, as files for the edge.
//
// The two are independent: what stops one does not stop the other, and a file that
// cannot be renewed stays as it is.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const usage = `usage: revocation-export [flags]
       revocation-export --health
       revocation-export --forget

Publishes CRL and KRL of a running CA as files, until it is stopped.

  --certs DIR        the CA's directory of certificates (default /home/step/certs):
                     intermediate_ca.crt, ssh_host_ca_key.pub, ssh_user_ca_key.pub
  --crl-url URL      where step-ca serves its CRL (default http://crl:9001/1.0/crl)
  --out DIR          where the files go (default /revocation)
  --state FILE       whose time is that of the last complete round
                     (default /tmp/revocation-export)
  --interval LENGTH  between two rounds (default 10s)
  --health           ends with 0 if both files are there, the CRL is valid, and the
                     last complete round was within six intervals; else with 1
  --forget           removes the published CRL, so that the next round takes the one
                     that the CA has, be it older: after the restore of a backup

Files:
  ca.crl    revoked certificates, DER (RFC 5280), signed by the intermediate
  ssh.krl   revoked SSH certificates, for RevokedKeys of sshd; not signed

Environment:
  POSTGRES_HOST, POSTGRES_PORT, POSTGRES_SSLMODE      the server
  POSTGRES_DB, POSTGRES_USER                          the database and its owner
  STEP_CA_DB_PASSWORD or STEP_CA_DB_PASSWORD_FILE     the password of step-ca's role
  LOG_FORMAT=json                                     one JSON object a line

Examples:
  revocation-export
  docker compose exec revocation-export revocation-export --health

Exit codes: 0 stopped, or healthy; 1 not healthy; 2 misconfigured.
`

func main() { oneshot.Main("revocation-export", run) }

func run(ctx context.Context, args []string, log *slog.Logger) error {
	flags := flag.NewFlagSet("revocation-export", flag.ContinueOnError)
	certs := flags.String("certs", "/home/step/certs", "")
	crlURL := flags.String("crl-url", "http://crl:9001/1.0/crl", "")
	out := flags.String("out", "/revocation", "")
	state := flags.String("state", "/tmp/revocation-export", "")
	interval := flags.Duration("interval", 10*time.Second, "")
	health := flags.Bool("health", false, "")
	forget := flags.Bool("forget", false, "")
	if err := oneshot.Parse(flags, args, usage); err != nil {
		return err
	}
	switch {
	case *interval <= 0:
		return oneshot.Usage(fmt.Errorf("--interval %s is not a length of time", *interval))
	case *health && *forget:
		return oneshot.Usage(errors.New("--health and --forget exclude each other"))
	case *health:
		return healthy(*out, *state, 6**interval, time.Now())
	case *forget:
		if err := os.Remove(filepath.Join(*out, crlFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the published CRL: %w", err)
		}
		return nil
	}

	settings := config.NewReader()
	db, password := settings.Database(), settings.RuntimePassword()
	if err := settings.Err(); err != nil {
		return err
	}
	for _, w := range settings.Warnings() {
		log.LogAttrs(ctx, slog.LevelWarn, w)
	}
	work := []*task{
		{file: crlFile, renew: (&crl{url: *crlURL, certs: *certs, out: *out}).renew},
		{file: krlFile, renew: (&krlTable{db: db, password: password, certs: *certs, out: *out}).renew},
	}
	for {
		complete := true
		for _, t := range work {
			complete = t.round(ctx, log) && complete
		}
		if complete {
			if err := os.WriteFile(*state, nil, 0o600); err != nil {
				return fmt.Errorf("recording a complete round: %w", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(*interval):
		}
	}
}

// A round that takes longer will not end well; the next one may.
const roundTimeout = 8 * time.Second

// task keeps one file up to date.
type task struct {
	file  string
	renew func(context.Context) (summary, error)

	published *summary // as last logged
	trouble   string
}

// summary is what the operator wants to know about a file. Two that are equal are not
// worth two lines in the log.
type summary struct {
	revoked int
	skipped int // rows that stand for no certificate
}

// round reports whether the file is up to date. It logs what changed since the last
// round, and nothing else: at six rounds a minute the log has to stay readable.
func (t *task) round(ctx context.Context, log *slog.Logger) bool {
	limited, cancel := context.WithTimeout(ctx, roundTimeout)
	defer cancel()
	now, err := t.renew(limited)
	switch {
	case err != nil && ctx.Err() != nil:
		return false // stopped: err says so, if anything
	case err != nil:
		if err.Error() != t.trouble {
			attrs := []slog.Attr{slog.String("file", t.file), slog.String("reason", err.Error())}
			for _, hint := range oneshot.Hints(err) {
				attrs = append(attrs, slog.String("hint", hint))
			}
			log.LogAttrs(ctx, slog.LevelError, "not renewed", attrs...)
			t.trouble = err.Error()
		}
		return false
	}
	if t.trouble != "" || t.published == nil || *t.published != now {
		attrs := []slog.Attr{slog.String("file", t.file), slog.Int("revoked", now.revoked)}
		level := slog.LevelInfo
		if now.skipped > 0 {
			level = slog.LevelWarn
			attrs = append(attrs, slog.Int("skipped", now.skipped),
				slog.String("hint", "step-ca takes any text for the serial number of an SSH certificate; these are none, or 0"))
		}
		log.LogAttrs(ctx, level, "published", attrs...)
	}
	t.published, t.trouble = &now, ""
	return true
}
