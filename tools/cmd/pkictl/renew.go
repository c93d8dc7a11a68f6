package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/enrol"
	"github.com/infra-pki/infra-pki/tools/internal/host"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/renewal"
	"github.com/infra-pki/infra-pki/tools/internal/sshd"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

var renew = command{
	summary: "renew this host's certificates that are past two thirds of their life",
	usage: `usage: pkictl renew [flags]
       pkictl renew --cert FILE --key FILE [--reload COMMAND] [flags]

Renews each certificate that "pkictl join" got for this host, once two thirds of its
life are over: TLS certificates and those of sshd's host keys. Each proves itself with
the key that it is for; no password and no token is needed. Certificate and key are
replaced so that they belong together whenever it is killed, with the owner and mode
that the old ones have. Then sshd is told, and the reload commands of those that
changed are run. One that fails is run again the next time.

"pkictl join" has it run every 15 minutes ("systemctl list-timers infra-pki-renew.timer",
or /etc/cron.d/infra-pki-renew). "pkictl status" tells how it went.

An expired certificate cannot be renewed: the host has to join again, with a new token.

  --force            now, whether it is due or not
  --rekey            what is renewed gets a new key; add --force for now. Clients that
                     know an SSH host key by itself and not by the CA will warn
  --dry-run          say what would be done, without asking the CA
  --cert FILE        only this TLS certificate of the same CA (PEM, chain), whoever got
                     it, …
  --key FILE         … with its key
  --reload COMMAND   shell command to run after --cert has changed
  --textfile FILE    write figures for the textfile collector of Prometheus' node_exporter
  --jitter DURATION  wait first, at most this long, so that not all hosts ask at once
  --quiet            say nothing but warnings and errors
  --dir DIR          the host's record (default ` + host.Dir + `)
  --state DIR        where results are kept (default ` + renewal.Dir + `)

Exit codes: 0 nothing was due, or it is done; 1 something was not renewed or reloaded;
2 wrong call.

Examples:
  pkictl renew
  pkictl renew --force --rekey
  pkictl renew --textfile /var/lib/prometheus/node-exporter/infra-pki.prom
  pkictl renew --cert /etc/ssl/web.crt --key /etc/ssl/web.key --reload 'systemctl reload nginx'
`,
	setup: func(fs *flag.FlagSet) work {
		var r renewer
		fs.BoolVar(&r.force, "force", false, "")
		fs.BoolVar(&r.rekey, "rekey", false, "")
		fs.BoolVar(&r.dryRun, "dry-run", false, "")
		fs.StringVar(&r.pair.Cert, "cert", "", "")
		fs.StringVar(&r.pair.Key, "key", "", "")
		fs.StringVar(&r.pair.Reload, "reload", "", "")
		fs.StringVar(&r.textfile, "textfile", "", "")
		fs.DurationVar(&r.jitter, "jitter", 0, "")
		fs.BoolVar(&r.quiet, "quiet", false, "")
		fs.StringVar(&r.dir, "dir", host.Dir, "")
		fs.StringVar(&r.state, "state", renewal.Dir, "")
		return r.run
	},
}

type renewer struct {
	force, rekey, dryRun, quiet bool

	pair       renewal.Pair
	textfile   string
	jitter     time.Duration
	dir, state string
}

func (r *renewer) run(ctx context.Context, log *slog.Logger) error {
	if err := r.check(); err != nil {
		return oneshot.Usage(err)
	}
	if r.quiet {
		log = slog.New(warnings{log.Handler()})
	}
	if r.jitter > 0 {
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for a moment of its own: %w", ctx.Err())
		case <-time.After(rand.N(r.jitter)): //nolint:gosec // G404: not a secret
		}
	}
	record, err := host.Load(r.dir)
	if err != nil {
		return explainRecord(err)
	}
	run := &renewal.Renewal{
		Pairs: renewal.Pairs(record), Scheduled: true, Dir: r.state, Now: time.Now,
		Force: r.force, Rekey: r.rekey, DryRun: r.dryRun, Log: log,
		CA: sync.OnceValues(func() (*enrol.Client, error) {
			roots, err := trustbundle.Read(host.Root(r.dir), time.Now())
			if err != nil {
				return nil, err
			}
			return enrol.New(record.CAURL, roots.Roots()...)
		}),
		SSHD: func(ctx context.Context, certs []*ssh.Certificate) error {
			return reloadSSHD(ctx, sshd.Server{Config: record.SSH.Config}, certs, log)
		},
	}
	if r.pair.Cert != "" {
		r.pair.Kind = renewal.TLS
		run.Pairs, run.Scheduled = []renewal.Pair{r.pair}, false
	}
	err = run.Run(ctx)
	if r.textfile != "" && !r.dryRun {
		err = errors.Join(err, run.Results().Textfile(r.textfile, run.Pairs))
	}
	return explainRenewal(err, record)
}

func (r *renewer) check() error {
	var problems []error
	if (r.pair.Cert == "") != (r.pair.Key == "") {
		problems = append(problems, errors.New("--cert and --key belong together"))
	}
	if r.pair.Reload != "" && r.pair.Cert == "" {
		problems = append(problems, errors.New("--reload belongs to --cert; other certificates have the command that \"pkictl join\" was given"))
	}
	if r.jitter < 0 {
		problems = append(problems, fmt.Errorf("--jitter: %s is not a time to wait; a good value: 10m", r.jitter))
	}
	return errors.Join(problems...)
}

// warnings lets through what is not merely news.
type warnings struct{ slog.Handler }

func (w warnings) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }

func reloadSSHD(ctx context.Context, server sshd.Server, certs []*ssh.Certificate, log *slog.Logger) error {
	effective, err := server.Effective(ctx)
	if err != nil {
		return err
	}
	if !effective.Runs(ctx) {
		log.LogAttrs(ctx, slog.LevelWarn, "sshd does not run; it reads the certificates when it starts", slog.String("address", effective.Address()))
		return nil
	}
	return server.Reload(ctx, effective, certs...)
}

func explainRecord(err error) error {
	switch {
	case errors.Is(err, host.ErrNotJoined):
		return oneshot.WithHint(err, `"pkictl token" on the CA host prints the "pkictl join" that makes this host a member`)
	case errors.Is(err, fs.ErrPermission):
		return oneshot.WithHint(err, "run it as root")
	}
	return err
}

func explainRenewal(err error, record host.Record) error {
	if errors.Is(err, renewal.ErrExpired) {
		err = oneshot.WithHint(err, `the CA renews no certificate that has expired: "pkictl token" on the CA host prints a new "pkictl join" for this host; `+
			`if the time above is wrong, set this host's clock`)
	}
	var status *stepca.StatusError
	if errors.As(err, &status) && status.Code < http.StatusInternalServerError {
		return oneshot.WithHint(err, `the CA refuses to renew it, for one that was revoked for example: "pkictl token" on the CA host prints a new "pkictl join"`)
	}
	if errors.Is(err, fs.ErrPermission) {
		return oneshot.WithHint(err, "run it as root")
	}
	return explainCA(err, record.CAURL)
}

// explainCA adds the way out for a host that does not get on with its CA.
func explainCA(err error, url string) error {
	var status *stepca.StatusError
	switch {
	case errors.Is(err, stepca.ErrClosed):
		return oneshot.WithHint(err, `the CA closes connections from this host's address: ALLOWED_IPS in its .env must have it ("docker compose logs caddy" there shows it)`)
	case errors.Is(err, stepca.ErrUnreachable):
		return oneshot.WithHint(err, `nothing answers at %s: "make status" on the CA host tells what runs there; renewal is tried again every 15 minutes`, url)
	case errors.Is(err, stepca.ErrUntrusted):
		return oneshot.WithHint(err, "what answers at %s is not the CA that this host joined, or this host's clock is wrong", url)
	case errors.As(err, &status):
		return oneshot.WithHint(err, `the CA runs and cannot do its work: "make status" on the CA host tells why`)
	}
	return err
}
