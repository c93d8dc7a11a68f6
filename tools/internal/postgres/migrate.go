package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/tern/v2/migrate"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const (
	created   = "created"
	updated   = "updated"
	unchanged = "unchanged"

	// Where migrations are counted. Not in schema public, where step-ca's role may
	// create a table of any name first.
	versionTable = "infra_pki.version"
	// The one file that is run every time.
	roleFile = "roles.sql"
)

// Passwords are those of the roles that db-migrate makes.
type Passwords struct {
	Runtime config.Secret // step-ca's
	Reports config.Secret // of the one that may only read
}

// Migrate brings schema, roles and their passwords to what the files in dir and the
// settings declare. conn is the owner's. Each step is a transaction of its own, so that
// a run that is killed can be run again.
func Migrate(ctx context.Context, conn *pgx.Conn, dir string, passwords Passwords, log *slog.Logger) error {
	report := func(outcome, item string) {
		log.LogAttrs(ctx, slog.LevelInfo, outcome, slog.String("item", item))
	}
	for _, step := range []func() error{
		func() error { return migrateSchema(ctx, conn, dir, report) },
		func() error { return migrateRoles(ctx, conn, dir, report) },
		func() error { return setPassword(ctx, conn, config.RuntimeRole, passwords.Runtime, report) },
		func() error { return setPassword(ctx, conn, config.ReportsRole, passwords.Reports, report) },
		func() error { return readBack(ctx, conn) },
	} {
		if err := step(); err != nil {
			return explainMigration(err)
		}
	}
	return nil
}

func migrateSchema(ctx context.Context, conn *pgx.Conn, dir string, report func(outcome, item string)) error {
	files := os.DirFS(dir)
	if found, err := migrate.FindMigrations(files); err != nil || len(found) == 0 {
		return oneshot.WithHint(fmt.Errorf("reading migrations: %q holds none, or not all", dir),
			"--migrations names the directory, postgres/migrations in the repository")
	}
	if _, err := conn.Exec(ctx, "create schema if not exists infra_pki"); err != nil {
		return fmt.Errorf("creating schema infra_pki: %w", said(err))
	}
	m, err := migrate.NewMigrator(ctx, conn, versionTable)
	if err != nil {
		return fmt.Errorf("preparing table %s: %w", versionTable, said(err))
	}
	if err := m.LoadMigrations(files); err != nil {
		return fmt.Errorf("reading migrations: %w", err)
	}
	version, err := m.GetCurrentVersion(ctx)
	if err != nil {
		return fmt.Errorf("reading table %s: %w", versionTable, said(err))
	}
	if known := len(m.Migrations); int(version) > known {
		return oneshot.WithHint(fmt.Errorf("the schema is at version %d, this release knows %d", version, known),
			"run the release that made it or a later one; the way back is a backup")
	}
	for _, one := range m.Migrations {
		if one.Sequence <= version {
			report(unchanged, one.Name)
			continue
		}
		if err := m.MigrateTo(ctx, one.Sequence); err != nil {
			return fmt.Errorf("applying migration %s: %w", one.Name, said(err))
		}
		report(created, one.Name)
	}
	return nil
}

// What roles.sql may change, in an order that does not depend on when a privilege was
// granted.
const privilegesQuery = `
select jsonb_build_object(
  'roles', (select jsonb_agg(to_jsonb(r) - 'rolconfig' order by rolname) from pg_roles r where rolname = any($1)),
  'settings', (select jsonb_agg(concat_ws(' ', rolname, s) order by rolname, s) from pg_roles, unnest(rolconfig) s where rolname = any($1)),
  'memberships', (select jsonb_agg(concat_ws(' ', member, roleid) order by member, roleid) from pg_auth_members m
                    join pg_roles r on r.oid = m.member where rolname = any($1)),
  'grants', (select jsonb_agg(concat_ws(' ', kind, object, part, a) order by kind, object, part, a::text) from (
      select 'database', oid, 0, coalesce(datacl, acldefault('d', datdba))
        from pg_database where datname = current_database()
      union all
      select 'schema', oid, 0, coalesce(nspacl, acldefault('n', nspowner))
        from pg_namespace where nspname in ('public', 'infra_pki')
      union all
      select 'table', oid, 0, coalesce(relacl, acldefault('r', relowner))
        from pg_class where relkind = 'r'
         and relnamespace in (to_regnamespace('public'), to_regnamespace('infra_pki'))
      union all
      select 'column', attrelid, attnum, attacl
        from pg_attribute join pg_class c on c.oid = attrelid
       where attacl is not null
         and relnamespace in (to_regnamespace('public'), to_regnamespace('infra_pki'))
    ) as p (kind, object, part, acl), unnest(acl) a)
)::text`

func migrateRoles(ctx context.Context, conn *pgx.Conn, dir string, report func(outcome, item string)) (err error) {
	const item = "roles " + config.RuntimeRole + " and " + config.ReportsRole
	roles := []string{config.RuntimeRole, config.ReportsRole}
	script, err := os.ReadFile(filepath.Join(dir, roleFile))
	if err != nil {
		return fmt.Errorf("reading migrations: %w", err)
	}
	tx, err := conn.Begin(ctx)
	if err != nil {
		return fmt.Errorf("setting up %s: %w", item, said(err))
	}
	defer tx.Rollback(ctx) //nolint:errcheck // after a commit there is nothing to roll back
	var existed bool
	var before, after string
	if err := tx.QueryRow(ctx, "select count(*) = cardinality($1::text[]) from pg_roles where rolname = any($1)", roles).Scan(&existed); err != nil {
		return fmt.Errorf("looking for %s: %w", item, said(err))
	}
	if err := tx.QueryRow(ctx, privilegesQuery, roles).Scan(&before); err != nil {
		return fmt.Errorf("reading privileges: %w", said(err))
	}
	if _, err := tx.Exec(ctx, string(script)); err != nil {
		return fmt.Errorf("applying %s: %w", roleFile, said(err))
	}
	if err := tx.QueryRow(ctx, privilegesQuery, roles).Scan(&after); err != nil {
		return fmt.Errorf("reading privileges: %w", said(err))
	}
	if before == after {
		report(unchanged, item)
		return nil
	}
	if err := tx.Commit(ctx); err != nil {
		return fmt.Errorf("applying %s: %w", roleFile, said(err))
	}
	report(map[bool]string{false: created, true: updated}[existed], item)
	return nil
}

// setPassword stores a verifier, only where the one that is there does not fit.
func setPassword(ctx context.Context, conn *pgx.Conn, role string, password config.Secret, report func(outcome, item string)) error {
	item := "password of role " + role
	stored, err := storedVerifier(ctx, conn, role)
	if err != nil {
		return err
	}
	if matches(stored, password) {
		report(unchanged, item)
		return nil
	}
	fresh, err := newVerifier(password)
	if err != nil {
		return err
	}
	// DDL takes no parameters; a verifier consists of letters, digits and "$:/+=-".
	if _, err := conn.Exec(ctx, "alter role "+role+" password '"+fresh+"'"); err != nil {
		return fmt.Errorf("setting the %s: %w", item, said(err))
	}
	report(map[bool]string{true: created, false: updated}[stored == ""], item)
	return nil
}

// storedVerifier is what the server verifies a role's password with, "" if it has none.
func storedVerifier(ctx context.Context, conn *pgx.Conn, role string) (string, error) {
	var stored string
	err := conn.QueryRow(ctx, "select coalesce(rolpassword, '') from pg_authid where rolname = $1", role).Scan(&stored)
	if err != nil {
		return "", fmt.Errorf("reading the verifier of role %s: %w", role, said(err))
	}
	return stored, nil
}

// readBack proves what the version table claims.
func readBack(ctx context.Context, conn *pgx.Conn) error {
	problem, err := firstProblem(ctx, conn)
	if err != nil {
		return fmt.Errorf("reading the schema back: %w", said(err))
	}
	if problem == "" {
		return nil
	}
	return oneshot.WithHint(fmt.Errorf("reading the schema back: %s", problem),
		"every migration was applied, so somebody changed the schema since: restore it from a backup, or undo the change by hand")
}

// explainMigration knows a way out of two of the server's answers.
func explainMigration(err error) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return err
	}
	switch pg.Code {
	case "55P03":
		return oneshot.WithHint(err, "another session holds a table that is to be changed: run this again when it is done, or with a longer --timeout")
	case "42501":
		return oneshot.WithHint(err, "POSTGRES_USER must be the superuser that the database was made with")
	}
	return err
}
