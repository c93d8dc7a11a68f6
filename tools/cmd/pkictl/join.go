package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/anchor"
	"github.com/infra-pki/infra-pki/tools/internal/dotenv"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/enrol"
	"github.com/infra-pki/infra-pki/tools/internal/host"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/schedule"
	"github.com/infra-pki/infra-pki/tools/internal/sshd"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

var join = command{
	summary: "make this host a member: trust, SSH host certificates, TLS, renewal",
	usage: `usage: pkictl join --ca-url URL --fingerprint HEX --token - [flags]
       pkictl join --env-file FILE [flags]

Makes this host trust the CA, gets what the one-time tokens are for, and has it renewed
from then on. "pkictl token" on the CA host makes the tokens and prints this command.

With a token for SSH: a certificate for every host key that sshd offers, and the CA's
key for people in TrustedUserCAKeys. sshd learns of them by one file in sshd_config.d;
no other file of its configuration is touched. sshd tests it before anything is
asked of the CA and again before it is reloaded, and a connection proves that it offers
the certificates. What it refuses is taken back.

With a token for TLS: a key and a certificate.

The same command again changes nothing, or finishes what an interrupted one began; a
token that it does not need stays unused. "pkictl leave" undoes it.

  --ca-url URL        address of the CA
  --fingerprint HEX   SHA-256 of its root
  --token FILE        one-time tokens, separated by white space; - is standard input
  --env-file FILE     take CA_URL, FINGERPRINT and TOKEN from there instead
  --tls-cert FILE     where the TLS certificate goes, PEM, the chain (default
                      ` + host.Dir + `/tls.crt)
  --tls-key FILE      where its key goes (default ` + host.Dir + `/tls.key)
  --tls-owner USER[:GROUP]  owner of both (default root)
  --tls-mode MODE     of the key, octal (default 0600)
  --tls-reload CMD    shell command to run whenever they have changed
  --no-trust          leave the trust stores of this machine alone
  --no-renewal        do not have "pkictl renew" run by systemd or cron
  --dry-run           say what would be done; uses up no token
  --sshd-config FILE  sshd's configuration, if it is not its default
  --dir DIR           the host's record (default ` + host.Dir + `)

Exit codes: 0 joined or unchanged; 1 failed; 2 wrong call.

Examples:
  printf '%s\n' 'eyJ…' | sudo pkictl join --ca-url https://ca.internal:9000 --fingerprint 2f1c… --token -
  sudo pkictl join --env-file web.env --tls-cert /etc/nginx/web.crt --tls-key /etc/nginx/web.key \
      --tls-reload 'systemctl reload nginx'
`,
	setup: func(fs *flag.FlagSet) work {
		var j joiner
		fs.StringVar(&j.caURL, "ca-url", "", "")
		fs.StringVar(&j.fingerprint, "fingerprint", "", "")
		fs.StringVar(&j.tokenFile, "token", "", "")
		fs.StringVar(&j.envFile, "env-file", "", "")
		fs.StringVar(&j.tls.Cert, "tls-cert", "", "")
		fs.StringVar(&j.tls.Key, "tls-key", "", "")
		fs.StringVar(&j.tls.Owner, "tls-owner", "", "")
		fs.StringVar(&j.tls.Mode, "tls-mode", "", "")
		fs.StringVar(&j.tls.Reload, "tls-reload", "", "")
		fs.BoolVar(&j.noTrust, "no-trust", false, "")
		fs.BoolVar(&j.noRenewal, "no-renewal", false, "")
		fs.BoolVar(&j.dryRun, "dry-run", false, "")
		fs.StringVar(&j.server.Config, "sshd-config", "", "")
		fs.StringVar(&j.dir, "dir", host.Dir, "")
		return j.run
	},
}

// joinStores are the trust stores of a server; browsers are people's.
var joinStores = []string{anchor.System, anchor.Java}

type joiner struct {
	dir                        string
	caURL, fingerprint         string
	tokenFile, envFile         string
	tls                        host.TLS
	noTrust, noRenewal, dryRun bool
	server                     sshd.Server
	sshToken, tlsToken         *enrol.Token
	before, record             host.Record // as it was, as it will be
	log                        *slog.Logger
	ca                         *enrol.Client
	roots                      trustbundle.Bundle
	ssh                        *sshJoin
	undo                       []func(context.Context) error // what puts back what this run did so far, in its order
	kept                       bool                          // what was done stays, whatever happens next
	saved                      []byte                        // the record, as this run wrote it
	changed                    bool
}

func (j *joiner) run(ctx context.Context, log *slog.Logger) error {
	j.log = log
	var err error
	if j.before, err = host.Load(j.dir); err != nil && !errors.Is(err, host.ErrNotJoined) {
		return err
	}
	if err := j.check(); err != nil {
		return oneshot.Usage(err)
	}
	if err := j.plan(ctx); err != nil {
		return j.explain(err)
	}
	if err := j.apply(ctx); err != nil {
		err = j.explain(err)
		if j.kept {
			return oneshot.WithHint(err, `what the tokens brought is kept: the same command goes on from there without them, "pkictl leave" takes it away`)
		}
		for _, back := range slices.Backward(j.undo) {
			err = errors.Join(err, back(context.WithoutCancel(ctx)))
		}
		return err
	}
	return j.say()
}

// check reads what was asked for, all of it.
func (j *joiner) check() error {
	var problems []error
	if j.dir == host.Dir && os.Geteuid() != 0 {
		problems = append(problems, errors.New("only root can do this: sudo pkictl join …"))
	}
	tokens, err := j.read()
	if err != nil {
		problems = append(problems, err)
	}
	if j.caURL == "" {
		j.caURL = j.before.CAURL
	}
	if j.fingerprint == "" {
		j.fingerprint = j.before.Fingerprint
	}
	j.caURL = strings.TrimRight(j.caURL, "/")
	if j.caURL == "" {
		problems = append(problems, errors.New("--ca-url is missing; a good value: https://ca.internal:9000"))
	} else if _, err := stepca.New(j.caURL); err != nil {
		problems = append(problems, fmt.Errorf("--ca-url: %w", err))
	}
	if j.fingerprint == "" {
		problems = append(problems, errors.New(`--fingerprint is missing; "make up" on the CA host prints it`))
	} else if j.fingerprint, err = anchor.ParseFingerprint(j.fingerprint); err != nil {
		problems = append(problems, fmt.Errorf("--fingerprint: %w", err))
	} else if was := j.before.Fingerprint; was != "" && was != j.fingerprint {
		problems = append(problems, fmt.Errorf("--fingerprint: this host is a member of the CA at %q with the root %s; leave it first: pkictl leave", j.before.CAURL, was))
	}
	problems = append(problems, j.checkTokens(tokens)...)
	problems = append(problems, j.checkTLS()...)
	if j.server.Config == "" && j.before.SSH != nil {
		j.server.Config = j.before.SSH.Config
	}
	if j.server.Config != "" && !filepath.IsAbs(j.server.Config) {
		problems = append(problems, fmt.Errorf("--sshd-config: %q is not an absolute path; a good value: /etc/ssh/sshd_config", j.server.Config))
	}
	return errors.Join(problems...)
}

const maxTokens = 64 << 10

// read returns the tokens, and takes what the other flags leave open from --env-file.
func (j *joiner) read() ([]string, error) {
	if j.envFile != "" {
		if j.caURL+j.fingerprint+j.tokenFile != "" {
			return nil, errors.New("--env-file stands for --ca-url, --fingerprint and --token, and goes with none of them")
		}
		values, err := dotenv.Read(j.envFile)
		if err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
		j.caURL, j.fingerprint = values["CA_URL"], values["FINGERPRINT"]
		for _, name := range []string{"CA_URL", "FINGERPRINT", "TOKEN"} {
			if values[name] == "" {
				return nil, fmt.Errorf("--env-file: %q does not set %s", j.envFile, name)
			}
		}
		return strings.Fields(values["TOKEN"]), nil
	}
	switch {
	case j.tokenFile == "" && j.before.CAURL == "":
		return nil, errors.New(`--token is missing: "pkictl token" on the CA host makes one`)
	case j.tokenFile == "":
		return nil, nil
	case strings.HasPrefix(j.tokenFile, "eyJ"):
		return nil, errors.New("--token: a token in the command line can be seen by everybody on this machine; --token - reads it from standard input")
	}
	from := io.Reader(os.Stdin)
	if j.tokenFile != "-" {
		f, err := os.Open(j.tokenFile)
		if err != nil {
			return nil, fmt.Errorf("--token: %w", err)
		}
		defer f.Close() //nolint:errcheck // read only
		from = f
	}
	data, err := io.ReadAll(io.LimitReader(from, maxTokens))
	if err != nil {
		return nil, fmt.Errorf("--token: %w", err)
	}
	tokens := strings.Fields(string(data))
	if len(tokens) == 0 {
		return nil, errors.New(`--token: there is none; "pkictl token" on the CA host makes one`)
	}
	return tokens, nil
}

func (j *joiner) checkTokens(tokens []string) []error {
	var problems []error
	for i, raw := range tokens {
		t, err := enrol.ReadToken(raw)
		if err != nil {
			problems = append(problems, fmt.Errorf("token %d: %w", i+1, err))
			continue
		}
		slot, kind := &j.tlsToken, "TLS"
		if t.SSH {
			slot, kind = &j.sshToken, "SSH"
		}
		if *slot != nil {
			problems = append(problems, fmt.Errorf("token %d: it is a second one for %s", i+1, kind))
		}
		*slot = &t
		if t.Fingerprint != "" && t.Fingerprint != j.fingerprint {
			problems = append(problems, fmt.Errorf("token %d: it is for the CA with the root %s", i+1, t.Fingerprint))
		}
		// A token for another machine, most likely. Further names may come and go.
		if was := j.before.SSH; t.SSH && was != nil && was.Names[0] != t.Names[0] {
			problems = append(problems, fmt.Errorf("token %d: it is for %q, and this host is %q; if that is to change: pkictl leave", i+1, t.Names[0], was.Names[0]))
		}
	}
	return problems
}

// plan asks the CA and sshd, and changes nothing.
func (j *joiner) plan(ctx context.Context) error {
	var err error
	if j.roots, err = anchor.Fetch(ctx, j.caURL, j.fingerprint, time.Now()); err != nil {
		return err
	}
	if j.ca, err = enrol.New(j.caURL, j.roots.Roots()...); err != nil {
		return err
	}
	j.record = host.Record{
		CAURL: j.caURL, Fingerprint: j.fingerprint, Trust: j.before.Trust, SSH: j.before.SSH,
		TLS: slices.Clone(j.before.TLS), Schedule: j.before.Schedule,
	}
	if !j.noTrust && !j.before.Trust {
		system := anchor.Status(ctx, j.fingerprint, anchor.System)
		// What somebody else put there is not ours to take away.
		j.record.Trust = !slices.ContainsFunc(system, func(s anchor.State) bool { return s.State == anchor.Trusted })
	}
	return errors.Join(j.planSSH(ctx), j.planTLS())
}

// apply goes in this order: the record first, so that "pkictl leave" knows of
// everything that an interrupted run may have done; what can be tested without the CA;
// then the tokens; the schedule last, since what is not there cannot be renewed. From
// the moment a token is used, what it brought stays: the next run goes on from there.
func (j *joiner) apply(ctx context.Context) error {
	if _, err := os.Stat(j.dir); errors.Is(err, os.ErrNotExist) && !j.dryRun {
		if err := os.MkdirAll(j.dir, 0o755); err != nil { //nolint:gosec // G301: nothing in it is secret but keys, which are 0600
			return fmt.Errorf("making the host's directory: %w", err)
		}
		j.undoes(func(context.Context) error { return os.Remove(j.dir) })
	}
	if err := j.save(ctx); err != nil {
		return err
	}
	if err := j.put(ctx, host.Root(j.dir), j.roots.PEM(), 0o644); err != nil {
		return err
	}
	if err := j.testSSH(ctx); err != nil {
		return err
	}
	if err := j.trust(ctx); err != nil {
		return err
	}
	if err := j.joinSSH(ctx); err != nil {
		return err
	}
	if err := j.joinTLS(ctx); err != nil {
		return err
	}
	if !j.noRenewal {
		binary, err := os.Executable()
		if err != nil {
			return fmt.Errorf("looking for pkictl: %w", err)
		}
		kind, err := schedule.Schedule{Binary: binary, Dir: j.dir, DryRun: j.dryRun}.Install(ctx, j.log)
		if err != nil {
			return oneshot.WithHint(err, "--no-renewal leaves it out")
		}
		j.record.Schedule = string(kind)
	}
	return j.save(ctx)
}

func (j *joiner) trust(ctx context.Context) error {
	if j.noTrust || !j.record.Trust {
		return nil
	}
	if j.dryRun {
		j.log.LogAttrs(ctx, slog.LevelInfo, "would be installed into the trust stores", slog.String("root", j.fingerprint))
		return nil
	}
	if !j.before.Trust {
		j.undoes(func(ctx context.Context) error { return anchor.Uninstall(ctx, j.fingerprint, j.log, joinStores...) })
	}
	if err := anchor.Install(ctx, j.roots.Current(), j.log, joinStores...); err != nil {
		return oneshot.WithHint(fmt.Errorf("making this machine trust the CA: %w", err), "--no-trust leaves it out")
	}
	return nil
}

// save writes the record, unless this run has written it so.
func (j *joiner) save(ctx context.Context) error {
	data, err := j.record.Encode()
	if err != nil || bytes.Equal(data, j.saved) {
		return err
	}
	j.saved = data
	return j.put(ctx, host.Path(j.dir), data, 0o644)
}

// put writes a file, or says that it would be written, and notes how to put it back.
func (j *joiner) put(ctx context.Context, path string, data []byte, mode os.FileMode) error {
	outcome, err := durable.Compare(path, data, mode)
	if err != nil {
		return err
	}
	if outcome != durable.Unchanged && !j.dryRun {
		old, err := os.ReadFile(path)
		back := func(context.Context) error { return remove(path) }
		if err == nil {
			back = func(context.Context) error { _, err := durable.WriteIfChanged(path, old, mode); return err }
		}
		if _, err := durable.WriteIfChanged(path, data, mode); err != nil {
			return err
		}
		j.undoes(back)
	}
	j.tell(ctx, outcome, "file", path)
	return nil
}

// undoes notes how to put something back.
func (j *joiner) undoes(back func(context.Context) error) {
	if !j.kept {
		j.undo = append(j.undo, back)
	}
}

// keep makes everything stay, whatever happens next.
func (j *joiner) keep() { j.undo, j.kept = nil, true }

// tell logs what was done, or would be.
func (j *joiner) tell(ctx context.Context, outcome durable.Outcome, what, name string) {
	message := string(outcome)
	if outcome != durable.Unchanged {
		j.changed = true
		if j.dryRun {
			message = "would be " + message
		}
	}
	j.log.LogAttrs(ctx, slog.LevelInfo, message, slog.String(what, name))
}

// say prints what this host is from now on.
func (j *joiner) say() error {
	if j.dryRun {
		return nil
	}
	state := "unchanged"
	if j.changed {
		state = "joined"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s\n", state, j.caURL)
	if s := j.record.SSH; s != nil {
		fmt.Fprintf(&b, "  ssh  %s until %s (%d host keys)\n", strings.Join(s.Names, ", "), j.ssh.until().UTC().Format(time.RFC3339), len(s.Keys))
	}
	for _, t := range j.record.TLS {
		fmt.Fprintf(&b, "  tls  %s in %s\n", strings.Join(t.Names, ", "), t.Cert)
	}
	fmt.Print(b.String())
	return nil
}

// explain adds the way out to what can go wrong with the CA.
func (j *joiner) explain(err error) error {
	var status *stepca.StatusError
	const another = `; "pkictl token" on the CA host makes another one`
	switch {
	case len(oneshot.Hints(err)) > 0: // it knows better
		return err
	case errors.Is(err, stepca.ErrClosed):
		return oneshot.WithHint(err, `the edge closes connections from addresses that ALLOWED_IPS does not have: this machine's must be in it; `+
			`"docker compose logs caddy" on the CA host shows the address that it refused`)
	case errors.Is(err, stepca.ErrUnreachable):
		return oneshot.WithHint(err, `"make status" on the CA host tells whether it serves`)
	case errors.Is(err, stepca.ErrUntrusted):
		return oneshot.WithHint(err, "what answers at %q is not the CA with that root, or this machine's clock is wrong", j.caURL)
	case errors.Is(err, enrol.ErrNoSSH):
		return oneshot.WithHint(err, "ENABLE_SSH_PROVISIONER=true on the CA host brings them")
	case errors.As(err, &status) && status.Code == http.StatusUnauthorized:
		return oneshot.WithHint(err, "a token is good once and until its end, and this one has been used, or is not from this CA"+another)
	case errors.As(err, &status) && status.Code == http.StatusForbidden:
		return oneshot.WithHint(err, "the CA takes the token and does not give what it is for: see its words, POLICY_DNS, POLICY_IPS and POLICY_WILDCARDS")
	case errors.As(err, &status) && status.Code >= http.StatusInternalServerError:
		return oneshot.WithHint(err, `the CA runs and cannot do its work: "make status" on the CA host`)
	}
	return err
}

// usable says why a token cannot be used now.
func usable(t *enrol.Token, what, flagName string) error {
	const hint = `"pkictl token%s" on the CA host makes one`
	if t == nil {
		return oneshot.WithHint(fmt.Errorf("%s: it takes a one-time token, and there is none", what), hint, flagName)
	}
	if now := time.Now(); now.After(t.Expires) {
		return oneshot.WithHint(fmt.Errorf("%s: the token ended at %s, and it is %s", what,
			t.Expires.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)), hint+"; --lifetime makes it live longer", flagName)
	}
	return nil
}

// sshJoin is what becomes of sshd.
type sshJoin struct {
	sshd.Effective
	keys   []sshd.Key
	good   []*ssh.Certificate // of each key, nil where there is none
	userCA []byte
	dropIn []byte
	paths  []string // of the certificates
	runs   bool
}

func (s *sshJoin) until() time.Time {
	end := uint64(1 << 62)
	for _, c := range s.good {
		end = min(end, c.ValidBefore)
	}
	return time.Unix(int64(min(end, 253402300799)), 0)
}

// planSSH looks at sshd and at the certificates that are there.
func (j *joiner) planSSH(ctx context.Context) error {
	if j.sshToken == nil && j.before.SSH == nil {
		return nil
	}
	record := host.SSH{DropIn: j.server.DropIn(), Config: j.server.Config}
	if j.before.SSH != nil {
		record.Names = j.before.SSH.Names
	}
	if j.sshToken != nil {
		record.Names = j.sshToken.Names
	}
	effective, err := j.server.Effective(ctx)
	if err != nil {
		return err
	}
	s := &sshJoin{Effective: effective, runs: effective.Runs(ctx)}
	if s.keys, err = effective.Keys(); err != nil {
		return err
	}
	if other := effective.OtherUserCA(host.UserCA(j.dir)); other != "" {
		return oneshot.WithHint(fmt.Errorf("sshd has a TrustedUserCAKeys already, %q, and reads only one", other),
			"take that line out of sshd's configuration; what it has beyond this CA's key can go into AuthorizedKeysFile as a cert-authority line")
	}
	if err := j.server.Includes(); err != nil {
		return err
	}
	authorities, err := j.ca.SSHKeys(ctx)
	if err != nil {
		return err
	}
	for _, key := range authorities.User {
		s.userCA = append(s.userCA, ssh.MarshalAuthorizedKey(key)...)
	}
	var problems []error
	have := 0
	for _, key := range s.keys {
		path := record.Cert(key.Path)
		record.Keys, s.paths = append(record.Keys, key.Path), append(s.paths, path)
		cert, err := enrol.ReadSSHCertificate(path)
		if _, missing := os.Lstat(path); missing == nil && (j.before.SSH == nil || !slices.Contains(j.before.SSH.Keys, key.Path)) {
			problems = append(problems, oneshot.WithHint(fmt.Errorf("%q is there already, and not from pkictl", path), "move it away"))
		}
		if err != nil || enrol.VerifySSH(cert, key.Public, record.Names, authorities.Host) != nil || !sameNames(cert.ValidPrincipals, record.Names) {
			cert = nil
		} else {
			have++
		}
		s.good = append(s.good, cert)
	}
	if have == 0 {
		if err := usable(j.sshToken, "certifying the host keys", ""); err != nil {
			problems = append(problems, err)
		}
	}
	s.dropIn = sshd.Content(s.paths, host.UserCA(j.dir))
	j.ssh, j.record.SSH = s, &record
	return errors.Join(problems...)
}

func sameNames(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// testSSH writes what sshd has to read, and asks it. sshd passes over certificates that
// are not there yet, and nothing makes it read its configuration at this point.
func (j *joiner) testSSH(ctx context.Context) error {
	if j.ssh == nil {
		return nil
	}
	if err := j.put(ctx, host.UserCA(j.dir), j.ssh.userCA, 0o644); err != nil {
		return err
	}
	if err := j.put(ctx, j.record.SSH.DropIn, j.ssh.dropIn, 0o644); err != nil {
		return err
	}
	if j.dryRun {
		return nil
	}
	return j.server.Check(ctx, j.ssh.paths, host.UserCA(j.dir))
}

// joinSSH certifies the keys, the first one by the token and the others by the first
// one's certificate, and has sshd offer them.
func (j *joiner) joinSSH(ctx context.Context) error {
	s := j.ssh
	if s == nil {
		return nil
	}
	source := slices.IndexFunc(s.good, func(c *ssh.Certificate) bool { return c != nil })
	for i, key := range s.keys {
		if s.good[i] != nil {
			j.tell(ctx, durable.Unchanged, "file", s.paths[i])
			continue
		}
		outcome := durable.Created
		if _, err := os.Lstat(s.paths[i]); err == nil {
			outcome = durable.Updated
		}
		if !j.dryRun {
			var err error
			if source < 0 {
				s.good[i], err = j.ca.SSHSign(ctx, j.sshToken.Raw.Reveal(), key.Public, j.record.SSH.Names)
			} else {
				s.good[i], err = j.ca.SSHRekey(ctx, s.good[source], s.keys[source].Private, key.Public)
			}
			if err != nil {
				return err
			}
			if source < 0 {
				source = i
			}
			j.keep()
			if _, err := durable.WriteIfChanged(s.paths[i], ssh.MarshalAuthorizedKey(s.good[i]), 0o644); err != nil {
				return err
			}
		}
		j.tell(ctx, outcome, "file", s.paths[i])
	}
	if was := j.before.SSH; was != nil && !j.dryRun {
		for _, key := range was.Keys {
			if path := was.Cert(key); !slices.Contains(s.paths, path) {
				if err := remove(path); err != nil {
					return err
				}
				j.tell(ctx, durable.Removed, "file", path)
			}
		}
	}
	return j.offer(ctx)
}

// offer makes a running sshd offer the certificates. If it does not, the drop-in goes.
func (j *joiner) offer(ctx context.Context) error {
	s := j.ssh
	if !s.runs {
		j.log.LogAttrs(ctx, slog.LevelWarn, "not proved: sshd does not run, and will offer the certificates when it starts", slog.String("address", s.Address()))
		return nil
	}
	if j.dryRun || !slices.ContainsFunc(s.good, func(c *ssh.Certificate) bool { return !s.Offers(ctx, c) }) {
		return nil
	}
	err := j.server.Test(ctx)
	reloaded := err == nil
	if reloaded {
		if err = j.server.Reload(ctx, s.Effective, s.good...); err == nil {
			j.tell(ctx, "reloaded", "service", "sshd")
			return nil
		}
	}
	ctx = context.WithoutCancel(ctx)
	err = errors.Join(err, remove(j.record.SSH.DropIn))
	// It ends if it is to read a configuration that it refuses.
	if reloaded && j.server.Test(ctx) == nil {
		err = errors.Join(err, j.server.Reload(ctx, s.Effective))
	}
	return oneshot.WithHint(err, "%q was taken away again", j.record.SSH.DropIn)
}

// remove removes a file and what killed writers left beside it.
func remove(path string) error {
	if err := durable.Sweep(path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing: %w", err)
	}
	return nil
}
