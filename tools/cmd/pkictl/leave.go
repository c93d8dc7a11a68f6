package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"github.com/infra-pki/infra-pki/tools/internal/anchor"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/enrol"
	"github.com/infra-pki/infra-pki/tools/internal/host"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/renewal"
	"github.com/infra-pki/infra-pki/tools/internal/schedule"
	"github.com/infra-pki/infra-pki/tools/internal/sshd"
)

var leave = command{
	summary: "undo what join did to this host",
	usage: `usage: pkictl leave [flags]

Takes away what "pkictl join" brought, and nothing else: the schedule of renewal, sshd's
drop-in (sshd tests its configuration and is reloaded), the certificates of the host
keys, TLS certificates with their keys, the root in the trust stores if join put it
there, and the record of all that. It asks nothing of the CA, which may be gone.
Programs that use such a TLS certificate will miss it.

Certificates that this host had stay valid until they end: "pkictl revoke" on the CA
host ends them sooner. A second run finds nothing to do.

  --dry-run    say what would be done
  --state DIR  where "pkictl renew" keeps its results (default ` + renewal.Dir + `)
  --dir DIR    the host's record (default ` + host.Dir + `)

Examples:
  sudo pkictl leave --dry-run
  sudo pkictl leave
`,
	setup: func(fs *flag.FlagSet) work {
		var l leaver
		fs.BoolVar(&l.dryRun, "dry-run", false, "")
		fs.StringVar(&l.state, "state", renewal.Dir, "")
		fs.StringVar(&l.dir, "dir", host.Dir, "")
		return l.run
	},
}

type leaver struct {
	dir, state string
	dryRun     bool
	log        *slog.Logger
}

func (l *leaver) run(ctx context.Context, log *slog.Logger) error {
	l.log = log
	if l.dir == host.Dir && os.Geteuid() != 0 {
		return oneshot.Usage(errors.New("only root can do this: sudo pkictl leave"))
	}
	record, err := host.Load(l.dir)
	if errors.Is(err, host.ErrNotJoined) {
		fmt.Println("unchanged: this host has not joined a CA")
		return nil
	}
	if err != nil {
		return err
	}
	if record.Schedule != "" || l.dir == host.Dir { // an interrupted join may have made one
		if err := (schedule.Schedule{Dir: l.dir, DryRun: l.dryRun}).Remove(ctx, log); err != nil {
			return err
		}
	}
	if record.SSH != nil {
		if err := l.ssh(ctx, *record.SSH); err != nil {
			return err
		}
	}
	for _, t := range record.TLS {
		if err := errors.Join(l.remove(ctx, t.Cert), l.remove(ctx, t.Key)); err != nil {
			return err
		}
	}
	if record.Trust {
		if l.dryRun {
			log.LogAttrs(ctx, slog.LevelInfo, "would be taken out of the trust stores", slog.String("root", record.Fingerprint))
		} else if err := anchor.Uninstall(ctx, record.Fingerprint, log, joinStores...); err != nil {
			return fmt.Errorf("making this machine trust the CA no more: %w", err)
		}
	}
	for _, path := range []string{host.UserCA(l.dir), host.Root(l.dir), host.Path(l.dir)} { // the record last
		if err := l.remove(ctx, path); err != nil {
			return err
		}
	}
	if l.dryRun {
		return nil
	}
	if err := os.RemoveAll(l.state); err != nil {
		return fmt.Errorf("removing the results of renewal: %w", err)
	}
	_ = os.Remove(l.dir) // somebody else may have a file in it
	fmt.Printf("left %s\n", record.CAURL)
	return nil
}

// ssh takes the certificates away, the drop-in first: what it names is to be there as
// long as sshd reads it.
func (l *leaver) ssh(ctx context.Context, record host.SSH) error {
	server := sshd.Server{Config: record.Config}
	if server.Installed() {
		if err := l.dropIn(ctx, server, record); err != nil {
			return err
		}
	} else if err := l.remove(ctx, record.DropIn); err != nil {
		return err
	}
	for _, key := range record.Keys {
		if err := l.remove(ctx, record.Cert(key)); err != nil {
			return err
		}
	}
	return nil
}

func (l *leaver) dropIn(ctx context.Context, server sshd.Server, record host.SSH) error {
	content, err := os.ReadFile(record.DropIn)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading sshd's drop-in: %w", err)
	}
	if err := l.remove(ctx, record.DropIn); err != nil || l.dryRun {
		return err
	}
	effective, err := server.Effective(ctx)
	if err != nil {
		// sshd ends if it is to read what it refuses.
		if content != nil {
			_, again := durable.WriteIfChanged(record.DropIn, content, 0o644)
			err = errors.Join(err, again)
		}
		return err
	}
	for _, key := range record.Keys {
		cert, err := enrol.ReadSSHCertificate(record.Cert(key))
		if err != nil || !effective.Offers(ctx, cert) {
			continue
		}
		if err := server.Reload(ctx, effective); err != nil {
			return err
		}
		l.log.LogAttrs(ctx, slog.LevelInfo, "reloaded", slog.String("service", "sshd"))
		return nil
	}
	return nil
}

// remove removes a file, and says so.
func (l *leaver) remove(ctx context.Context, path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		if l.dryRun {
			return nil
		}
		return remove(path) // what a killed writer left
	}
	if l.dryRun {
		l.log.LogAttrs(ctx, slog.LevelInfo, "would be removed", slog.String("file", path))
		return nil
	}
	if err := remove(path); err != nil {
		return err
	}
	l.log.LogAttrs(ctx, slog.LevelInfo, string(durable.Removed), slog.String("file", path))
	return nil
}
