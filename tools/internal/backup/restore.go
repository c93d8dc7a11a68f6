package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/tern/v2/migrate"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

// Target is where a CA is restored to.
type Target struct {
	Owner      postgres.Login
	Parts      map[string]string // directories, by part
	Migrations string            // directory
	// KeepDatabase: it is there, belongs to the same root, and is newer than the archive.
	KeepDatabase bool
	DryRun       bool   // verify the archive and look at the stack, write nothing
	Journal      string // directory; none if empty
	Log          *slog.Logger
}

const hintEmpty = "nothing was changed; a restore overwrites nothing. If the CA that is here is not needed any more, take it away for good " +
	"with \"docker compose down -v\"; to look at the backup beside it, choose another COMPOSE_PROJECT_NAME, CA_PORT and EDGE_SUBNET; " +
	"for keys that were lost beside their database: make restore RESTORE=--keep-database"

// lockPatience is longer than any run of the programs that a restore must not meet.
const lockPatience = time.Minute

// Restore verifies the archive and then brings its database and volumes into an empty
// stack. The database comes first, in one transaction, and the root certificate last:
// whatever is killed between them, provisioner-init refuses to make another CA, and
// the next run continues.
func Restore(ctx context.Context, archive io.ReadSeeker, identities []age.Identity, t Target) (*Contents, error) {
	c, err := Verify(archive, identities)
	if err != nil {
		return nil, err
	}
	t.report(ctx, "verified", "archive", slog.Time("taken", c.Taken), slog.String("root", c.Root), slog.Int64("certificates", c.Certificates))
	var j *Journal
	if t.Journal != "" {
		if j, err = OpenJournal(t.Journal, identities, c); err != nil {
			return nil, err
		}
		t.report(ctx, "verified", "journal", slog.Time("through", j.Through), slog.Int("segments", j.Segments), slog.Int("transactions", j.Transactions))
	}
	conn, err := t.Owner.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // everything is committed or given up
	waiting, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	for _, work := range []postgres.Work{postgres.Migrating, postgres.Provisioning} {
		if err := postgres.Lock(waiting, conn, work); err != nil {
			return nil, err
		}
	}
	volumes, err := c.plan(Volumes, t.Parts)
	if err != nil {
		return nil, err
	}
	if t.KeepDatabase {
		if err := sameRoot(ctx, conn, c); err != nil {
			return nil, err
		}
		return c, volumes.apply(ctx, t.DryRun, t.report)
	}
	if err := t.database(ctx, conn, c, j, func(each func(string, io.Reader) error) (*Contents, error) {
		if _, err := archive.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		return read(archive, identities, each)
	}); err != nil {
		return nil, err
	}
	return c, volumes.apply(ctx, t.DryRun, t.report)
}

// sameRoot demands a database that belongs to the archive's CA.
func sameRoot(ctx context.Context, conn *pgx.Conn, c *Contents) error {
	root, err := postgres.Root(ctx, conn)
	if err == nil && root != c.Root {
		err = fmt.Errorf("the database belongs to root %q, the archive to root %s", root, c.Root)
	}
	if err != nil {
		return oneshot.WithHint(err, "nothing was changed; a database is kept where it knows the root of the keys that are restored")
	}
	return nil
}

func (t Target) report(ctx context.Context, outcome, item string, attrs ...slog.Attr) {
	t.Log.LogAttrs(ctx, slog.LevelInfo, outcome, append([]slog.Attr{slog.String("item", item)}, attrs...)...)
}

// database loads the tables, unless an earlier run has.
func (t Target) database(ctx context.Context, conn *pgx.Conn, c *Contents, j *Journal, again func(func(string, io.Reader) error) (*Contents, error)) error {
	const item = "database"
	done, err := loaded(ctx, conn, c, j)
	if err != nil {
		return err
	}
	if done {
		t.report(ctx, "unchanged", item)
		return nil
	}
	if t.DryRun {
		t.report(ctx, "would be created", item, slog.Int("tables", len(c.Tables)))
		return nil
	}
	migrations, err := migrateTo(ctx, conn, t.Migrations, c.Schema, j)
	if err != nil {
		return err
	}
	tx, err := conn.Begin(ctx)
	if err != nil {
		return fmt.Errorf("restoring the database: %w", err)
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) //nolint:errcheck // after a commit there is nothing to roll back
	// Without the guards: what is restored is what was, also from before there were guards.
	if _, err := tx.Exec(ctx, "set local session_replication_role = replica"); err != nil {
		return oneshot.WithHint(fmt.Errorf("restoring the database: %w", err), "POSTGRES_USER must be the superuser that the database was made with")
	}
	tables, err := prepare(ctx, tx, c, j)
	if err != nil {
		return err
	}
	second, err := again(func(name string, rows io.Reader) error {
		to := tables[name]
		if _, err := tx.Conn().PgConn().CopyFrom(ctx, rows, fmt.Sprintf("copy %s (%s) from stdin", to.quoted(), quoted(to.Columns))); err != nil {
			return fmt.Errorf("restoring table %s: %w", name, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if !reflect.DeepEqual(second.Manifest, c.Manifest) {
		return errors.New("restoring the database: the archive changed while it was read")
	}
	for _, want := range c.Tables {
		got, err := tables[want.Name].digest(ctx, tx)
		if err != nil {
			return err
		}
		if got != want.SHA256 {
			return fmt.Errorf("reading table %s back: it is not what the archive has", want.Name)
		}
	}
	if j != nil {
		if err := t.replay(ctx, tx, c, j, migrations); err != nil {
			return err
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return fmt.Errorf("restoring the database: %w", err)
	}
	t.report(ctx, "created", item, slog.Int("tables", len(c.Tables)))
	return nil
}

// replay brings the loaded tables to where the journal ends, and notes that it did.
func (t Target) replay(ctx context.Context, tx pgx.Tx, c *Contents, j *Journal, migrations []*migrate.Migration) error {
	schema := c.Schema
	err := j.replay(ctx, tx, func(version int32) error {
		// As the migrator would, but within this transaction.
		steps := []string{"set local session_replication_role = origin"}
		for ; schema < version; schema++ {
			steps = append(steps, migrations[schema].UpSQL)
		}
		steps = append(steps, "set local session_replication_role = replica", fmt.Sprintf("update %s set version = %d", versionTable, version))
		for _, step := range steps {
			if _, err := tx.Exec(ctx, step); err != nil {
				return fmt.Errorf("bringing the schema to version %d, as the journal does: %w", version, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "comment on table infra_pki.root is '"+restored(c, j)+"'"); err != nil {
		return fmt.Errorf("restoring the database: %w", err)
	}
	return nil
}

// restored is what a restore with a journal leaves in the database, for the next run to
// know that the tables are loaded: there are no digests of them as they are now.
func restored(c *Contents, j *Journal) string {
	last := j.files[len(j.files)-1]
	return fmt.Sprintf("restored from the backup of %s and the journal of %s up to %s", c.Taken.Format(time.RFC3339), last.begin.Chain, last.end.End)
}

// loaded tells whether an earlier run has loaded the tables, and refuses a database that
// holds anything else.
func loaded(ctx context.Context, conn *pgx.Conn, c *Contents, j *Journal) (bool, error) {
	tx, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return false, fmt.Errorf("reading the database: %w", err)
	}
	defer tx.Rollback(ctx) //nolint:errcheck // it only reads
	tables, err := listTables(ctx, tx)
	if err != nil {
		return false, err
	}
	var holds []string
	there := map[string]table{}
	for _, t := range tables {
		there[t.name()] = t
		filled, err := t.filled(ctx, tx)
		if err != nil {
			return false, fmt.Errorf("reading table %s: %w", t.name(), err)
		}
		if filled {
			holds = append(holds, t.name())
		}
	}
	if len(holds) == 0 {
		return false, nil
	}
	if j != nil {
		var note string
		err := tx.QueryRow(ctx, "select coalesce(obj_description(to_regclass('infra_pki.root'), 'pg_class'), '')").Scan(&note)
		if err != nil {
			return false, fmt.Errorf("reading the database: %w", err)
		}
		if note == restored(c, j) {
			return true, nil
		}
		return false, notEmpty(ctx, tx, holds)
	}
	for _, want := range c.Tables {
		t, ok := there[want.Name]
		if !ok {
			return false, notEmpty(ctx, tx, holds)
		}
		t.Columns = want.Columns
		got, err := t.digest(ctx, tx)
		if err != nil || got != want.SHA256 {
			return false, errors.Join(err, notEmpty(ctx, tx, holds))
		}
	}
	return true, nil
}

func notEmpty(ctx context.Context, tx pgx.Tx, holds []string) error {
	if slices.Contains(holds, "infra_pki.root") {
		var root string
		if err := tx.QueryRow(ctx, "select fingerprint from infra_pki.root").Scan(&root); err != nil {
			return fmt.Errorf("reading the recorded root: %w", err)
		}
		return oneshot.WithHint(fmt.Errorf("the stack is not empty: its database belongs to the CA with root %s", root), "%s", hintEmpty)
	}
	return oneshot.WithHint(fmt.Errorf("the stack is not empty: its database has rows in %s", strings.Join(holds, ", ")), "%s", hintEmpty)
}

// migrateTo brings an empty database to the schema that the archive is from. What is
// newer is db-migrate's, which then also changes the rows where a migration does. It
// returns all migrations, for those that the journal goes through.
func migrateTo(ctx context.Context, conn *pgx.Conn, dir string, schema int32, j *Journal) ([]*migrate.Migration, error) {
	files := os.DirFS(dir)
	found, err := migrate.FindMigrations(files)
	if err != nil || len(found) == 0 {
		return nil, oneshot.WithHint(fmt.Errorf("reading migrations: %q holds none, or not all", dir), "--migrations names the directory, postgres/migrations in the repository")
	}
	last := schema
	if j != nil {
		last = j.schema(schema)
	}
	if int(last) > len(found) {
		return nil, oneshot.WithHint(fmt.Errorf("the archive's schema is at version %d, this release knows %d", last, len(found)),
			"nothing was changed; take the release that made it, or a later one")
	}
	if _, err := conn.Exec(ctx, "create schema if not exists infra_pki"); err != nil {
		return nil, fmt.Errorf("creating schema infra_pki: %w", err)
	}
	m, err := migrate.NewMigrator(ctx, conn, "infra_pki.version") // as db-migrate does
	if err != nil {
		return nil, fmt.Errorf("preparing migrations: %w", err)
	}
	if err := m.LoadMigrations(files); err != nil {
		return nil, fmt.Errorf("reading migrations: %w", err)
	}
	version, err := m.GetCurrentVersion(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the schema's version: %w", err)
	}
	if version > schema {
		return nil, oneshot.WithHint(fmt.Errorf("the archive's schema is at version %d, the empty database is at %d already", schema, version),
			"nothing was changed; take the empty database away, so that the restore can make it: docker compose down, then docker volume rm PROJECT_postgres-data")
	}
	if err := m.MigrateTo(ctx, schema); err != nil {
		return nil, fmt.Errorf("making the schema: %w", err)
	}
	return m.Migrations, nil
}

// prepare returns the tables that rows go into, and makes those of step-ca that the
// migrations do not know.
func prepare(ctx context.Context, tx pgx.Tx, c *Contents, j *Journal) (map[string]table, error) {
	list, err := listTables(ctx, tx)
	if err != nil {
		return nil, err
	}
	there := map[string]table{}
	for _, t := range list {
		there[t.name()] = t
	}
	tables := map[string]table{}
	for _, want := range c.Tables {
		t, err := have(ctx, tx, there, want.Name, want.Columns)
		if err != nil {
			return nil, err
		}
		tables[want.Name] = t
	}
	if j == nil {
		return tables, nil
	}
	for name, columns := range j.tables {
		if _, ok := tables[name]; ok || !strings.HasPrefix(name, "public.") {
			continue // of this project, by the migrations
		}
		if _, err := have(ctx, tx, there, name, columns); err != nil {
			return nil, err
		}
	}
	return tables, nil
}

// have returns a table, and makes it if it is not there and step-ca's.
func have(ctx context.Context, tx pgx.Tx, there map[string]table, name string, columns []string) (table, error) {
	t, ok := there[name]
	if !ok {
		schema, relation, _ := strings.Cut(name, ".")
		t = table{Schema: schema, Relation: relation, Columns: columns, Key: []string{"nkey"}}
		if !t.stepCA() {
			return t, oneshot.WithHint(fmt.Errorf("the archive has table %s, which this release does not know", name), "take the release that made it")
		}
		if _, err := tx.Exec(ctx, "create table "+t.quoted()+" (nkey bytea check (octet_length(nkey) <= 255), nvalue bytea, primary key (nkey))"); err != nil {
			return t, fmt.Errorf("creating table %s: %w", name, err)
		}
	}
	t.Columns = columns
	return t, nil
}

// planned are files to be written.
type planned struct {
	files []placed
	known map[string]bool // paths
}

type placed struct {
	item, path string
	data       []byte
	mode       fs.FileMode
	there      bool
}

// plan says where the files of parts go, and refuses if anything else is there.
func (c *Contents) plan(parts []string, dirs map[string]string) (*planned, error) {
	p := &planned{known: map[string]bool{}}
	var taken []string
	for _, part := range parts {
		for _, f := range c.Files {
			if partOf(f.Name) != part {
				continue
			}
			_, name, _ := strings.Cut(f.Name, "/")
			file := placed{item: f.Name, path: filepath.Join(dirs[part], filepath.FromSlash(name)), data: c.data[f.Name], mode: f.Mode}
			outcome, err := durable.Compare(file.path, file.data, file.mode)
			if err != nil || outcome == durable.Updated {
				taken = append(taken, f.Name)
			}
			file.there = outcome == durable.Unchanged
			p.files, p.known[file.path] = append(p.files, file), true
		}
		others, err := p.others(part, dirs[part])
		if err != nil {
			return nil, err
		}
		taken = append(taken, others...)
	}
	if len(taken) > 0 {
		return nil, oneshot.WithHint(fmt.Errorf("the stack is not empty: its volumes hold %s", strings.Join(taken, ", ")), "%s", hintEmpty)
	}
	last := func(f placed) int {
		if f.item == rootCertificate {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(p.files, func(a, b placed) int { return last(a) - last(b) })
	return p, nil
}

// others lists the files in a directory that the archive does not have, but for what
// killed writers left.
func (p *planned) others(part, dir string) (names []string, err error) {
	err = filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || p.known[file] || strings.HasPrefix(d.Name(), ".") {
			return err
		}
		relative, err := filepath.Rel(dir, file)
		names = append(names, path.Join(part, filepath.ToSlash(relative)))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("looking into %s: %w", part, err)
	}
	return names, nil
}

func (p *planned) apply(ctx context.Context, dryRun bool, report func(context.Context, string, string, ...slog.Attr)) error {
	for _, f := range p.files {
		if f.there {
			// A run that was killed just after it had made the file leaves its other name.
			if !dryRun {
				if err := durable.Sweep(f.path); err != nil {
					return err
				}
			}
			report(ctx, string(durable.Unchanged), f.item)
			continue
		}
		if dryRun {
			report(ctx, "would be created", f.item)
			continue
		}
		if err := os.MkdirAll(filepath.Dir(f.path), 0o755); err != nil { //nolint:gosec // G301: containers of another user read provisioners and templates
			return fmt.Errorf("restoring %s: %w", f.item, err)
		}
		if err := durable.CreateExclusive(f.path, f.data, f.mode); err != nil {
			return fmt.Errorf("restoring %s: %w", f.item, err)
		}
		report(ctx, string(durable.Created), f.item)
	}
	return nil
}

// Unpack writes .env and the operator's files into a checkout. What is there already
// has to be the same; nothing is overwritten. In a dry run it only says what it would do.
func (c *Contents) Unpack(ctx context.Context, checkout string, dryRun bool, log *slog.Logger) error {
	p := &planned{}
	var differ []string
	for _, f := range c.Files {
		part := partOf(f.Name)
		relative := ""
		switch {
		case part == Env:
			relative = ".env"
		case slices.Contains(Operators, part):
			relative = "step-ca/" + f.Name
		default:
			continue
		}
		file := placed{item: relative, path: filepath.Join(checkout, filepath.FromSlash(relative)), data: c.data[f.Name], mode: f.Mode}
		outcome, err := durable.Compare(file.path, file.data, file.mode)
		if err == nil && outcome == durable.Updated && part != Env {
			// Git and umask decide the mode of what is in the repository.
			if info, e := os.Stat(file.path); e == nil {
				outcome, err = durable.Compare(file.path, file.data, info.Mode().Perm())
			}
		}
		if err != nil || outcome == durable.Updated {
			differ = append(differ, relative)
		}
		file.there = outcome == durable.Unchanged
		p.files = append(p.files, file)
	}
	if len(differ) > 0 {
		return oneshot.WithHint(fmt.Errorf("other files are there already: %s", strings.Join(differ, ", ")),
			"nothing was changed; move them away, and put back what you need of them after the restore")
	}
	return p.apply(ctx, dryRun, Target{Log: log}.report)
}
