// Package renewal renews what a host has from its CA: each certificate of the host's
// record that is past two thirds of its life.
//
// A run may be killed at any instant and run again. Runs take turns. What they found
// is on disk for "pkictl status".
package renewal

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/rogpeppe/go-internal/lockedfile"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/enrol"
	"github.com/infra-pki/infra-pki/tools/internal/host"
)

// reloadTimeout is how long a reload command may take.
const reloadTimeout = time.Minute

// Renewal is a run.
type Renewal struct {
	Pairs     []Pair
	Scheduled bool                                                      // Pairs is all that the host has: the run counts as one of the schedule
	CA        func() (*enrol.Client, error)                             // called once something is due
	SSHD      func(ctx context.Context, certs []*ssh.Certificate) error // makes sshd offer these certificates
	Dir       string                                                    // of the results
	Now       func() time.Time
	Rekey     bool // with a new key
	Force     bool // whether it is due or not
	DryRun    bool // say what would be done
	Log       *slog.Logger

	results Results
}

// Pairs are the certificates of a host's record.
func Pairs(r host.Record) []Pair {
	var pairs []Pair
	if r.SSH != nil {
		for _, key := range r.SSH.Keys {
			pairs = append(pairs, Pair{Kind: SSH, Cert: r.SSH.Cert(key), Key: key})
		}
	}
	for _, t := range r.TLS {
		pairs = append(pairs, Pair{Kind: TLS, Cert: t.Cert, Key: t.Key, Reload: t.Reload})
	}
	return pairs
}

// Run renews what is due and makes who uses it read it. Each certificate is on its own:
// all problems are in the error.
func (r *Renewal) Run(ctx context.Context) error {
	if r.DryRun {
		return r.run(ctx)
	}
	if err := os.MkdirAll(r.Dir, 0o755); err != nil { //nolint:gosec // G301: nothing in it is secret
		return fmt.Errorf("writing the results of renewal: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(r.Dir, lockName))
	if err != nil {
		return err
	}
	defer unlock()
	return r.run(ctx)
}

func (r *Renewal) run(ctx context.Context) error {
	var err error
	if r.results, err = Load(r.Dir); err != nil {
		// It must not end renewal for good.
		r.Log.LogAttrs(ctx, slog.LevelWarn, "beginning new results", slog.String("reason", err.Error()))
		r.results = Results{}
	}
	var problems []error
	for _, p := range r.Pairs {
		if err := r.renew(ctx, p); err != nil {
			problems = append(problems, err)
			r.failed(p, err)
		} else if !r.DryRun {
			r.results.note(p.Cert, func(result *Result) { result.Error = "" })
		}
	}
	problems = append(problems, r.reload(ctx)...)
	if r.DryRun || ctx.Err() != nil { // told to stop: that says nothing about the certificates
		return errors.Join(problems...)
	}
	if r.Scheduled {
		r.results.ran(r.Now(), problems)
	}
	return errors.Join(append(problems, r.results.save(r.Dir))...)
}

// Results are those of the run.
func (r *Renewal) Results() *Results { return &r.results }

func (r *Renewal) failed(p Pair, err error) {
	r.results.note(p.Cert, func(result *Result) { result.Failed, result.Error = r.Now(), err.Error() })
}

// renew looks after one certificate.
func (r *Renewal) renew(ctx context.Context, p Pair) error {
	if !r.DryRun {
		// What it left is complete, so whoever uses it may have to be told.
		finished, err := p.recover(func() error { return r.pending(p) })
		if err != nil {
			return err
		}
		if finished {
			r.Log.LogAttrs(ctx, slog.LevelInfo, "finished what a killed run began", slog.String("certificate", p.Cert))
		}
	}
	c, err := p.Read()
	if err != nil {
		return err
	}
	now := r.Now()
	attrs := []slog.Attr{slog.String("certificate", p.Cert), slog.Time("until", c.Until)}
	switch {
	case !now.Before(c.Until):
		return fmt.Errorf("renewing %q: %w on %s, and it is %s", p.Cert, ErrExpired, c.Until.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case r.Force:
	case now.Before(c.From):
		r.Log.LogAttrs(ctx, slog.LevelWarn, "not valid yet: the clock of this host is behind, or was ahead",
			append(attrs, slog.Time("from", c.From), slog.Time("now", now))...)
		return nil
	case now.Before(c.Due()):
		r.Log.LogAttrs(ctx, slog.LevelInfo, string(durable.Unchanged), append(attrs, slog.Time("due", c.Due()))...)
		return nil
	}
	if r.DryRun {
		r.Log.LogAttrs(ctx, slog.LevelInfo, "would be renewed", attrs...)
		return nil
	}
	r.Log.LogAttrs(ctx, slog.LevelInfo, "renewing", attrs...)
	next, err := r.ask(ctx, p, c)
	if err != nil {
		return fmt.Errorf("renewing %q, which is good until %s: %w", p.Cert, c.Until.UTC().Format(time.RFC3339), err)
	}
	// First, so that a run that is killed from here on leaves it to the next one.
	if err := r.pending(p); err != nil {
		return err
	}
	if err := p.replace(next); err != nil {
		return fmt.Errorf("renewing %q: %w", p.Cert, err)
	}
	if c, err = p.Read(); err != nil {
		return fmt.Errorf("reading it back: %w", err)
	}
	r.results.note(p.Cert, func(result *Result) { result.Renewed = now })
	r.Log.LogAttrs(ctx, slog.LevelInfo, "renewed", slog.String("certificate", p.Cert), slog.String("serial", c.Serial),
		slog.Time("until", c.Until), slog.Bool("new_key", next.key != nil))
	return nil
}

// ErrExpired says that a certificate is over: it proves nothing to the CA any more.
var ErrExpired = errors.New("it expired")

// ask gets a successor of c.
func (r *Renewal) ask(ctx context.Context, p Pair, c *Certificate) (content, error) {
	ca, err := r.CA()
	if err != nil {
		return content{}, err
	}
	var key crypto.Signer
	if r.Rekey {
		if key, err = another(c.key); err != nil {
			return content{}, err
		}
	}
	if p.Kind == TLS {
		var chain []*x509.Certificate
		if key == nil {
			chain, err = ca.TLSRenew(ctx, c.tls)
		} else {
			chain, err = ca.TLSRekey(ctx, c.tls, key)
		}
		if err != nil {
			return content{}, err
		}
		return tlsContent(chain, key)
	}
	var cert *ssh.Certificate
	if key == nil {
		cert, err = ca.SSHRenew(ctx, c.ssh, c.key)
	} else {
		var public ssh.PublicKey
		if public, err = ssh.NewPublicKey(key.Public()); err != nil {
			return content{}, fmt.Errorf("making a key: %w", err)
		}
		cert, err = ca.SSHRekey(ctx, c.ssh, c.key, public)
	}
	if err != nil {
		return content{}, err
	}
	return sshContent(cert, key)
}

// pending notes down that whoever uses p has to be told.
func (r *Renewal) pending(p Pair) error {
	r.results.note(p.Cert, func(result *Result) { result.ReloadPending = p.Kind == SSH || p.Reload != "" })
	return r.results.save(r.Dir)
}

// reload tells those whose certificates changed, in this run or in one that came to
// grief: sshd once, and each command once.
func (r *Renewal) reload(ctx context.Context) []error {
	waiting := map[string][]Pair{} // by command; "" is sshd
	var commands []string
	for _, p := range r.Pairs {
		if !r.results.Certificates[p.Cert].ReloadPending {
			continue
		}
		if !slices.Contains(commands, p.Reload) {
			commands = append(commands, p.Reload)
		}
		waiting[p.Reload] = append(waiting[p.Reload], p)
	}
	var problems []error
	for _, command := range commands {
		name := cmp.Or(command, "sshd")
		if r.DryRun {
			r.Log.LogAttrs(ctx, slog.LevelInfo, "would be reloaded", slog.String("reload", name))
			continue
		}
		if err := r.tell(ctx, command, waiting[command]); err != nil {
			problems = append(problems, err)
			for _, p := range waiting[command] {
				r.failed(p, err)
			}
			continue
		}
		r.Log.LogAttrs(ctx, slog.LevelInfo, "reloaded", slog.String("reload", name))
		for _, p := range waiting[command] {
			r.results.note(p.Cert, func(result *Result) { result.ReloadPending = false })
		}
	}
	return problems
}

// tell runs a reload command, or has sshd take the certificates.
func (r *Renewal) tell(ctx context.Context, command string, pairs []Pair) error {
	if command != "" {
		return Shell(ctx, command)
	}
	var certs []*ssh.Certificate
	for _, p := range pairs {
		c, err := p.Read()
		if err != nil {
			return err
		}
		certs = append(certs, c.ssh)
	}
	return r.SSHD(ctx, certs)
}

// Shell runs a reload command.
func Shell(ctx context.Context, command string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, reloadTimeout, fmt.Errorf("it took longer than %s", reloadTimeout))
	defer cancel()
	sh := exec.CommandContext(ctx, "sh", "-c", command)
	sh.WaitDelay = time.Second // a child may hold its output open
	said, err := sh.CombinedOutput()
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	text := string(bytes.TrimSpace(said))
	if len(text) > 300 {
		text = "…" + text[len(text)-300:]
	}
	return fmt.Errorf("running the reload command %q: %w: %q", command, err, text)
}

// lock waits until no other run is at work.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	type held struct {
		unlock func()
		err    error
	}
	got := make(chan held, 1)
	go func() {
		unlock, err := lockedfile.MutexAt(path).Lock()
		got <- held{unlock, err}
	}()
	select {
	case h := <-got:
		if h.err != nil {
			return nil, fmt.Errorf("waiting for another run: %w", h.err)
		}
		return h.unlock, nil
	case <-ctx.Done():
		go func() {
			if h := <-got; h.err == nil {
				h.unlock()
			}
		}()
		return nil, fmt.Errorf("waiting for another run: %w", ctx.Err())
	}
}
