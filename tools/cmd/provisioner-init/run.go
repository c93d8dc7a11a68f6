package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	authority "github.com/smallstep/certificates/authority/provisioner"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/caconfig"
	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/pki"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/provisioner"
)

const usage = `Usage: provisioner-init [flags]

Makes the CA's keys on the first run, or imports them, and renders ca.json,
defaults.json, the database passfile and the edge's allow-list and limits from the
environment, the provisioners in files and the certificate templates. What is
already as declared is not touched. A provider of OIDC that cannot be reached
is a warning: step-ca takes it up once it answers.

  --check             print what a run would do, write nothing, exit 3 if anything
  --home DIR          step-ca's home: config/, certs/, secrets/ (default /home/step),
                      and trusted-roots/ for the certificates of OIDC providers
  --root-ca DIR       where the root key lies (default /root-ca)
  --allow-list DIR    where the edge looks for allow.caddy, balancers.caddy and limits.caddy (default /allow-list)
  --provisioners DIR  further provisioners, *.json (default /provisioners.d)
  --templates DIR     certificate templates, *.tpl (default /templates)
  --import DIR        an existing CA to take over at the first run: certs/root_ca.crt,
                      certs/intermediate_ca.crt, secrets/intermediate_ca_key (default /import)

Exit codes: 0 done, 1 failed, 2 misconfigured, 3 drift (with --check).

Examples:
  docker compose run --rm --no-deps provisioner-init --check
  docker compose up -d --wait
`

// soon is how long before the end of a CA certificate its warning begins.
const soon = 90 * 24 * time.Hour

// patience bounds a run; without another one at work it takes a second.
const patience = 2 * time.Minute

// program is one run of provisioner-init.
type program struct {
	settings   caconfig.Settings
	declared   *provisioner.Declared
	edge       config.Edge
	db         config.Database
	dbPassword config.Secret
	passwords  pki.Passwords
	store      pki.Store
	configDir  string
	allowList  string
	importDir  string
	// trustedRoots are of further CAs that OIDC providers may have their certificate from.
	trustedRoots [][]byte // PEM
	check        bool
	now          time.Time
	log          *slog.Logger
	changes      int
	last         []caconfig.Provisioner // of the ca.json that is there
}

func run(ctx context.Context, args []string, log *slog.Logger) error {
	flags := flag.NewFlagSet("provisioner-init", flag.ContinueOnError)
	p := &program{now: time.Now(), log: log}
	flags.BoolVar(&p.check, "check", false, "")
	home := flags.String("home", "/home/step", "")
	flags.StringVar(&p.store.Root, "root-ca", "/root-ca", "")
	flags.StringVar(&p.allowList, "allow-list", "/allow-list", "")
	flags.StringVar(&p.importDir, "import", "/import", "")
	dropins := flags.String("provisioners", "/provisioners.d", "")
	templates := flags.String("templates", "/templates", "")
	if err := oneshot.Parse(flags, args, usage); err != nil {
		return err
	}
	p.configDir = filepath.Join(*home, "config")
	p.store.Certs = filepath.Join(*home, "certs")
	p.store.Secrets = filepath.Join(*home, "secrets")

	settings := config.NewReader()
	i := settings.Issuance()
	p.edge, p.db = settings.Edge(), settings.Database()
	p.dbPassword = settings.RuntimePassword()
	p.passwords = pki.Passwords{
		Root: settings.RootCAPassword(), CA: settings.CAPassword(),
		Provisioner: settings.ProvisionerPassword(), SSHHost: settings.SSHHostPassword(),
	}
	p.settings = caconfig.Settings{Issuance: i}
	var problems []error
	p.declared, problems = provisioner.Read(i, *dropins, *templates)
	settings.Join(problems...)
	p.trustedRoots, problems = readTrustedRoots(filepath.Join(*home, "trusted-roots"))
	settings.Join(problems...)
	if err := settings.Err(); err != nil {
		return err
	}
	for _, w := range settings.Warnings() {
		log.LogAttrs(ctx, slog.LevelWarn, w)
	}
	return p.converge(ctx)
}

// converge reads, plans, applies and reads back.
func (p *program) converge(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := postgres.Runtime(p.db, p.dbPassword).Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // the lock ends with the connection either way
	// Two runs at once would both find no keys and make two CAs.
	if err := postgres.Lock(ctx, conn, postgres.Provisioning); err != nil {
		return err
	}

	ca := p.settings.CA
	names := pki.Names{PKI: ca.Name, RootLifetime: ca.RootLifetime, IntermediateLifetime: ca.IntermediateLifetime, Now: p.now}
	contents, err := p.store.Open(p.passwords, names, p.now)
	if err != nil {
		return err
	}
	if p.last, err = caconfig.Provisioners(p.caJSON()); err != nil {
		p.log.LogAttrs(ctx, slog.LevelWarn, "ca.json is damaged and will be made anew", slog.String("reason", err.Error()))
	}
	if err := p.authority(ctx, conn, contents); err != nil {
		return err
	}
	if err := p.render(ctx, contents); err != nil {
		return err
	}
	if err := p.requireEAB(ctx, conn); err != nil {
		return err
	}
	p.discover(ctx, contents.Root)
	if p.check && p.changes > 0 {
		return p.drift(ctx)
	}
	p.expiry(ctx, contents)
	p.log.LogAttrs(ctx, slog.LevelInfo, "done", slog.Int("changes", p.changes),
		slog.String("root", x509util.Fingerprint(contents.Root)), slog.String("url", ca.URL()))
	return nil
}

// authority makes or imports what is missing, if that is allowed, and records the
// root in the database after its keys are safe on disk.
func (p *program) authority(ctx context.Context, conn *pgx.Conn, contents *pki.Contents) error {
	imported, err := pki.Import(p.importDir, p.passwords, p.now)
	if err != nil {
		return err
	}
	if imported != nil {
		if err := contents.Adopt(imported); err != nil {
			return oneshot.WithHint(err, "empty %s, or restore the CA whose root it is", p.importDir)
		}
	}
	recorded, err := postgres.Root(ctx, conn)
	if err != nil {
		return oneshot.WithHint(err, "db-migrate makes the schema: run it first")
	}
	if err := p.allowed(ctx, conn, contents, recorded, imported != nil); err != nil {
		return err
	}
	if !p.check {
		if err := contents.Sweep(); err != nil {
			return writing(err)
		}
	}
	for _, file := range contents.Missing() {
		if !p.check {
			if err := file.Create(); err != nil {
				return writing(err)
			}
		}
		p.report(ctx, file.Item, file.Path, durable.Created)
	}
	if recorded != "" || p.check {
		return nil
	}
	// Only now: a record without keys would be a CA that can never start.
	return postgres.RecordRoot(ctx, conn, x509util.Fingerprint(contents.Root))
}

// allowed decides whether what is missing may be made. A CA is made only where
// there are no keys and the database has never known one.
func (p *program) allowed(ctx context.Context, conn *pgx.Conn, contents *pki.Contents, recorded string, importing bool) error {
	const wayBack = "restore the volumes root-ca, step-ca-certs and step-ca-secrets from the backup that belongs to this database: make restore RESTORE=--keep-database ARCHIVE=… IDENTITY=…"
	if contents.Root != nil && recorded != "" && recorded != x509util.Fingerprint(contents.Root) {
		return oneshot.WithHint(
			fmt.Errorf("the database belongs to the CA with root %s, the keys here to root %s", recorded, x509util.Fingerprint(contents.Root)),
			"bring database and keys from the same backup")
	}
	missing := contents.Missing()
	if len(missing) == 0 {
		return nil
	}
	if contents.Outdated() && !slices.ContainsFunc(p.last, func(l caconfig.Provisioner) bool { return l.Name == provisioner.SSHHost }) {
		return nil
	}
	if err := contents.Broken(); err != nil {
		return oneshot.WithHint(err, wayBack)
	}
	var names []string
	for _, file := range missing {
		names = append(names, file.Item)
	}
	what := strings.Join(names, ", ")
	if recorded != "" {
		return oneshot.WithHint(fmt.Errorf("the database knows the CA with root %s, but missing here: %s", recorded, what), wayBack)
	}
	if _, err := os.Stat(p.caJSON()); err == nil {
		return oneshot.WithHint(fmt.Errorf("%s says that there was a CA, but missing here: %s", p.caJSON(), what), wayBack)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("looking for ca.json: %w", err)
	}
	if importing {
		return nil // a database with certificates is what an imported CA comes with
	}
	used, err := postgres.HasCertificates(ctx, conn)
	if err != nil {
		return err
	}
	if used {
		return oneshot.WithHint(fmt.Errorf("the database holds certificates of a CA, but missing here: %s", what),
			"put the CA's certificates and keys into IMPORT_DIR, or "+wayBack)
	}
	return nil
}

func (p *program) caJSON() string { return filepath.Join(p.configDir, "ca.json") }

// rendered is a file that follows from settings and keys.
type rendered struct {
	item, path string
	data       []byte
	mode       fs.FileMode
}

// render writes what follows from settings and keys. ca.json comes last, since
// its presence says that there was a CA.
func (p *program) render(ctx context.Context, contents *pki.Contents) error {
	passfile := filepath.Join(p.store.Secrets, "pgpass")
	var defaults, ca, crl []byte // unknown in a check before the keys are made: any content will differ
	if len(contents.Missing()) == 0 {
		var err error
		if defaults, err = caconfig.Defaults(p.store, x509util.Fingerprint(contents.Root)); err != nil {
			return err
		}
		if p.settings.Provisioners, err = p.declared.List(provisioner.Keys{Admin: contents.Admin, SSHHost: contents.SSHHostJWK}); err != nil {
			return err
		}
		dsn := postgres.RuntimeDSN(p.db.Pooler(), passfile)
		if ca, err = caconfig.Render(p.settings, p.store, dsn); err != nil {
			return err
		}
		if crl, err = caconfig.RenderCRL(p.settings, p.store, dsn); err != nil {
			return err
		}
	}
	files := []rendered{
		{"database passfile", passfile, []byte(postgres.PassfileLine(p.db.Pooler(), p.dbPassword)), 0o400},
		{"allow-list", filepath.Join(p.allowList, "allow.caddy"), []byte(remoteIP(p.edge.Allowed)), 0o444},
		{"list of balancers", filepath.Join(p.allowList, "balancers.caddy"), []byte(balancers(p.edge)), 0o444},
		{"limits of the edge", filepath.Join(p.allowList, "limits.caddy"), []byte(limits(p.edge)), 0o444},
		{"CLI defaults", filepath.Join(p.configDir, "defaults.json"), defaults, 0o444},
	}
	const crlItem = "CRL service configuration"
	if path := filepath.Join(p.configDir, "crl.json"); p.settings.CA.RevocationPort != 0 {
		files = append(files, rendered{crlItem, path, crl, 0o400})
	} else if err := p.remove(ctx, crlItem, path); err != nil {
		return err
	}
	// It has the client secret of OIDC and whatever secrets a drop-in needs.
	files = append(files, rendered{"CA configuration", p.caJSON(), ca, 0o400})
	if err := p.reportProvisioners(ctx, ca); err != nil {
		return err
	}
	for _, f := range files {
		write := durable.WriteIfChanged
		if p.check {
			write = durable.Compare
		}
		outcome, err := write(f.path, f.data, f.mode)
		if err != nil {
			return writing(fmt.Errorf("%s: %w", f.item, err))
		}
		p.report(ctx, f.item, f.path, outcome)
	}
	if p.check {
		return nil
	}
	for _, f := range files {
		outcome, err := durable.Compare(f.path, f.data, f.mode)
		if err != nil {
			return fmt.Errorf("reading the %s back: %w", f.item, err)
		}
		if outcome != durable.Unchanged {
			return fmt.Errorf("reading the %s back from %q: it is not what was written", f.item, f.path)
		}
	}
	return nil
}

// reportProvisioners tells which of them a changed ca.json creates, updates and removes.
func (p *program) reportProvisioners(ctx context.Context, ca []byte) error {
	if ca == nil {
		return nil
	}
	next, err := caconfig.ReadProvisioners(ca)
	if err != nil {
		return err
	}
	find := func(list []caconfig.Provisioner, name string) int {
		return slices.IndexFunc(list, func(l caconfig.Provisioner) bool { return l.Name == name })
	}
	report := func(outcome durable.Outcome, name string) {
		p.log.LogAttrs(ctx, slog.LevelInfo, string(outcome), slog.String("provisioner", name))
	}
	for _, n := range next {
		switch i := find(p.last, n.Name); {
		case i < 0:
			report(durable.Created, n.Name)
		case p.last[i] != n:
			report(durable.Updated, n.Name)
		}
	}
	for _, l := range p.last {
		if find(next, l.Name) < 0 {
			report(durable.Removed, l.Name)
		}
	}
	return nil
}

// requireEAB tells the database which ACME provisioners demand an external account key:
// it keeps accounts from ordering that step-ca has let in without one.
func (p *program) requireEAB(ctx context.Context, conn *pgx.Conn) error {
	var want []string
	for _, declared := range p.settings.Provisioners {
		if acme, ok := declared.(*authority.ACME); ok && acme.RequireEAB {
			want = append(want, acme.Name)
		}
	}
	slices.Sort(want)
	have, err := postgres.EABRequired(ctx, conn)
	if err != nil || slices.Equal(have, want) {
		return err
	}
	p.changes++
	p.log.LogAttrs(ctx, slog.LevelInfo, string(durable.Updated), slog.String("item", "provisioners that demand an external account key"),
		slog.String("names", strings.Join(want, " ")))
	if p.check {
		return nil
	}
	return postgres.RequireEAB(ctx, conn, want)
}

// What follows is what caddy/Caddyfile imports.

// remoteIP is a line of caddy-l4's matcher of that name.
func remoteIP(prefixes []netip.Prefix) string {
	var b strings.Builder
	b.WriteString("remote_ip")
	for _, prefix := range prefixes {
		b.WriteString(" " + prefix.String())
	}
	b.WriteString("\n")
	return b.String()
}

// balancers says so if there are none: an empty file is what a mishap leaves, and the
// edge refuses it.
func balancers(edge config.Edge) string {
	if len(edge.Balancers) == 0 {
		return "none\n"
	}
	return remoteIP(edge.Balancers)
}

func limits(edge config.Edge) string {
	return fmt.Sprintf("max_connections %d\nmax_per_source %d\nrate_per_source %d\n",
		edge.MaxConnections, edge.MaxPerAddress, edge.RatePerAddress)
}

// remove takes away a file that the settings do not ask for.
func (p *program) remove(ctx context.Context, item, path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !p.check {
		if err := os.Remove(path); err != nil {
			return writing(fmt.Errorf("%s: %w", item, err))
		}
	}
	p.report(ctx, item, path, durable.Removed)
	return nil
}

// report logs one item of the plan; in a check the words are those of a run.
func (p *program) report(ctx context.Context, item, path string, outcome durable.Outcome) {
	if outcome != durable.Unchanged {
		p.changes++
	}
	p.log.LogAttrs(ctx, slog.LevelInfo, string(outcome), slog.String("item", item), slog.String("path", path))
}

func (p *program) drift(ctx context.Context) error {
	p.log.LogAttrs(ctx, slog.LevelInfo, "checked, nothing written", slog.Int("changes", p.changes))
	return oneshot.WithHint(oneshot.WithExitCode(fmt.Errorf("%d items are not as declared", p.changes), oneshot.ExitDrift),
		"\"make init\" applies them")
}

// expiry warns while there is time. step-ca itself issues leaves that outlive the
// intermediate (smallstep/certificates#381).
func (p *program) expiry(ctx context.Context, contents *pki.Contents) {
	for _, c := range []struct {
		name string
		end  time.Time
	}{{"root", contents.Root.NotAfter}, {"intermediate", contents.Intermediate.NotAfter}} {
		if left := c.end.Sub(p.now); left < max(soon, p.settings.CA.TLS.Max) {
			p.log.LogAttrs(ctx, slog.LevelWarn, "the "+c.name+" certificate ends soon",
				slog.String("end", c.end.UTC().Format(time.DateOnly)), slog.Int("days", int(left.Hours()/24)))
		}
	}
}

func writing(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return oneshot.WithHint(err, "the volume must belong to uid %d; volumes made by this stack do", os.Getuid())
	case strings.Contains(err.Error(), "read-only file system"):
		return oneshot.WithHint(err, "mount the volume writable for provisioner-init")
	}
	return err
}
