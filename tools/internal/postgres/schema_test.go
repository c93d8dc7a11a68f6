package postgres_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

// The migrated schema is, catalog row for catalog row, what step-ca itself makes
// on an empty database; and step-ca finds nothing to add to it.
func TestTablesAreThoseOfStepCA(t *testing.T) {
	const shape = `
		select c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attstorage::text,
		       (select jsonb_agg(jsonb_build_array(conname, pg_get_constraintdef(k.oid)) order by conname)
		          from pg_constraint k where conrelid = c.oid)::text,
		       (select jsonb_agg(pg_get_indexdef(indexrelid) order by indexrelid::regclass::text)
		          from pg_index where indrelid = c.oid)::text,
		       c.reloptions::text
		  from pg_class c join pg_attribute a on a.attrelid = c.oid
		 where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and a.attnum > 0
		 order by c.relname, a.attnum`
	read := func(d *postgrestest.Database) (rows [][]any) {
		found, err := d.Owner(t).Query(t.Context(), shape)
		require.NoError(t, err)
		rows, err = pgx.CollectRows(found, func(row pgx.CollectableRow) ([]any, error) { return row.Values() })
		require.NoError(t, err)
		return rows
	}
	// Their own ends first: on TEST_DATABASE_URL two databases of one test would wait for each other.
	var theirs [][]any
	require.True(t, t.Run("step-ca's own", func(t *testing.T) {
		d := postgrestest.New(t)
		openAsItsOwn(t, d)
		theirs = read(d)
	}))
	require.Len(t, theirs, 24*2)

	ours := postgrestest.New(t)
	ours.Migrate(t)
	require.Equal(t, theirs, read(ours))
	openAsStepCA(t, ours)
	require.Equal(t, theirs, read(ours))
}

func TestRuntimeRoleCannot(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	openAsStepCA(t, d)
	_, err := d.Owner(t).Exec(t.Context(), "insert into infra_pki.root (fingerprint) values (repeat('a', 64))")
	require.NoError(t, err)
	const denied, duplicate = "42501", "23505"
	tests := map[string]struct{ statement, code string }{
		"drop the guard":                      {"drop trigger used_ott_once on used_ott", denied},
		"switch the guard off":                {"alter table used_ott disable trigger used_ott_once", denied},
		"switch all triggers off":             {"set session_replication_role = replica", denied},
		"replace the guard's function":        {"create or replace function infra_pki.refuse_overwrite() returns trigger language plpgsql as 'begin return new; end'", denied},
		"drop the guard's function":           {"drop function infra_pki.refuse_overwrite()", denied},
		"overwrite a token in spite of it":    {"insert into used_ott values ('k', 'a'); insert into used_ott values ('k', 'b') on conflict (nkey) do update set nvalue = excluded.nvalue", duplicate},
		"overwrite a revocation":              {"insert into revoked_ssh_certs values ('k', '{}'); update revoked_ssh_certs set nvalue = '{}'", duplicate},
		"put a trigger on a table":            {"create trigger t before insert on x509_certs execute function suppress_redundant_updates_trigger()", denied},
		"put a rule on a table":               {"create rule r as on update to used_ott do instead nothing", denied},
		"alter a table":                       {"alter table x509_certs add column x int", denied},
		"drop a table":                        {"drop table x509_certs", denied},
		"forget a used token":                 {"delete from used_ott", denied},
		"forget a certificate":                {"delete from x509_certs", denied},
		"take a revocation back":              {"delete from revoked_x509_certs", denied},
		"delete an external account key":      {"delete from acme_external_account_keys", denied},
		"date the demand for keys":            {"insert into infra_pki.eab_required values ('acme', 'infinity')", denied},
		"pretend a backup":                    {"insert into infra_pki.backups (bytes, certificates) values (1, 1)", denied},
		"empty a table past the row triggers": {"truncate used_ott", denied},
		"change the root's fingerprint":       {"update infra_pki.root set fingerprint = repeat('b', 64)", denied},
		"remove the root's record":            {"delete from infra_pki.root", denied},
		"empty the root's record":             {"truncate infra_pki.root", denied},
		"record a second root":                {"insert into infra_pki.root (fingerprint) values (repeat('b', 64))", duplicate},
		"record a second root beside it":      {"insert into infra_pki.root (singleton, fingerprint) values (false, repeat('b', 64))", denied},
		"date the record back":                {"insert into infra_pki.root (fingerprint, recorded_at) values (repeat('b', 64), 'epoch')", denied},
		"create in our schema":                {"create table infra_pki.x ()", denied},
		"read the schema's version":           {"select * from infra_pki.version", denied},
		"create a schema":                     {"create schema x", denied},
		"create a temporary table":            {"create temporary table x ()", denied},
		"create a role":                       {"create role x", denied},
		"create a database":                   {"create database x", denied},
		"read passwords":                      {"select rolpassword from pg_authid", denied},
		"become the owner":                    {"set role " + d.Database.Owner, denied},
		"read the server's files":             {"select pg_read_file('/etc/passwd')", denied},
		"run programs":                        {"copy x509_certs to program 'true'", denied},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := d.Runtime(t).Exec(t.Context(), tc.statement, pgx.QueryExecModeSimpleProtocol)
			var refused *pgconn.PgError
			require.ErrorAs(t, err, &refused)
			require.Equal(t, tc.code, refused.Code, refused.Message)
		})
	}
}

// The role for reports reads what there is, but for the keys of accounts to be, and
// writes nothing.
func TestReportsRole(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	_, err := d.Owner(t).Exec(t.Context(), "insert into infra_pki.backups (bytes, certificates) values (1, 0)")
	require.NoError(t, err)
	conn := d.Reports(t)
	for _, may := range []string{
		"select count(*) from x509_certs", "select fingerprint from infra_pki.root", "select max(taken_at) from infra_pki.backups",
		"select state, query from pg_stat_activity where usename = 'stepca'", "select pg_database_size(current_database())",
	} {
		_, err := conn.Exec(t.Context(), may)
		require.NoError(t, err, may)
	}
	_, err = conn.Exec(t.Context(), "set default_transaction_read_only = off")
	require.NoError(t, err, "which it may, and it does not help")
	for _, mayNot := range []string{
		"select * from acme_external_account_keys", "insert into x509_certs values ('k', 'v')", "update x509_certs set nvalue = ''",
		"delete from x509_certs", "create table x ()", "create temporary table x ()", "insert into infra_pki.backups (bytes, certificates) values (1, 1)",
		"select rolpassword from pg_authid", "select * from nonces for update", "set role stepca",
		"alter role reports connection limit 50", "select pg_terminate_backend(pg_backend_pid()) from pg_authid",
	} {
		_, err := conn.Exec(t.Context(), mayNot)
		require.Equal(t, "42501", codeOf(err), mayNot)
	}
}

func TestRuntimeRoleOwnsNothing(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	openAsStepCA(t, d)
	var owned int
	require.NoError(t, d.Owner(t).QueryRow(t.Context(),
		"select count(*) from pg_shdepend where refclassid = 'pg_authid'::regclass and refobjid = 'stepca'::regrole and deptype = 'o'").Scan(&owned))
	require.Zero(t, owned)
}

// A database that step-ca made itself, under the name of what is its role here: nothing
// that it holds is lost, and it is guarded as any other.
func TestDatabaseOfStepCAsOwnIsAdopted(t *testing.T) {
	d := postgrestest.New(t)
	owner := d.Owner(t)
	_, err := owner.Exec(t.Context(), fmt.Sprintf(`create role stepca login password 'made by hand';
		alter database %s owner to stepca; alter schema public owner to stepca`, pgx.Identifier{d.Name}.Sanitize()))
	require.NoError(t, err)
	hers := *d
	hers.Database.Owner, hers.OwnerPassword = "stepca", "made by hand"
	before := openAsItsOwn(t, &hers)
	_, err = before.UseToken("id", "token")
	require.NoError(t, err)
	account, err := before.register(t, "", "acme")
	require.NoError(t, err)
	require.NoError(t, before.order(t, account))
	const contents = `select jsonb_object_agg(relname, query_to_xml(format('select * from public.%I order by nkey', relname), true, true, '')::text)
		from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'`
	var was, is string
	require.NoError(t, owner.QueryRow(t.Context(), contents).Scan(&was))
	require.Contains(t, was, "acme_account_orders_index")

	d.Migrate(t)
	require.NoError(t, owner.QueryRow(t.Context(), contents).Scan(&is))
	require.Equal(t, was, is)
	var owned int
	require.NoError(t, owner.QueryRow(t.Context(),
		"select count(*) from pg_shdepend where refclassid = 'pg_authid'::regclass and refobjid = 'stepca'::regrole and deptype = 'o'").Scan(&owned))
	require.Zero(t, owned)
	require.NoError(t, postgres.Ready(t.Context(), d.Runtime(t)))
	after := openAsStepCA(t, d)
	used, err := after.UseToken("id", "token")
	require.NoError(t, err)
	require.False(t, used)
	require.NoError(t, after.order(t, account))
}

// Every guard is one that db-wait waits for, and no function of one can be called.
func TestEachGuardIsKnown(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	owner := d.Owner(t)
	found, err := owner.Query(t.Context(), "select format('%I', relname), format('%I', tgname), has_function_privilege('stepca', tgfoid, 'execute') from pg_trigger join pg_class c on c.oid = tgrelid where not tgisinternal")
	require.NoError(t, err)
	type guard struct {
		Table, Name string
		Callable    bool
	}
	guards, err := pgx.CollectRows(found, pgx.RowToStructByPos[guard])
	require.NoError(t, err)
	require.Len(t, guards, 11)
	runtime := d.Runtime(t)
	for _, g := range guards {
		require.False(t, g.Callable, g.Name)
		_, err := owner.Exec(t.Context(), "alter table public."+g.Table+" disable trigger "+g.Name)
		require.NoError(t, err)
		require.ErrorContains(t, postgres.Ready(t.Context(), runtime), "the guard on "+g.Table+" is missing or off", g.Name)
		_, err = owner.Exec(t.Context(), "alter table public."+g.Table+" enable trigger "+g.Name)
		require.NoError(t, err)
	}
	require.NoError(t, postgres.Ready(t.Context(), runtime))
}

// Nobody but owner and runtime role comes into the database or its schemas.
func TestPublicHasNothing(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ctx := t.Context()
	tx, err := d.Owner(t).Begin(ctx) // never committed: roles belong to the whole server
	require.NoError(t, err)
	_, err = tx.Exec(ctx, "create role bystander")
	require.NoError(t, err)
	for _, question := range []string{
		"has_database_privilege('bystander', current_database(), 'connect')",
		"has_database_privilege('bystander', current_database(), 'temporary')",
		"has_schema_privilege('bystander', 'public', 'usage')",
		"has_schema_privilege('bystander', 'public', 'create')",
		"has_schema_privilege('bystander', 'infra_pki', 'usage')",
		"has_table_privilege('bystander', 'public.x509_certs', 'select')",
	} {
		var may bool
		require.NoError(t, tx.QueryRow(ctx, "select "+question).Scan(&may))
		require.False(t, may, question)
	}
}

func codeOf(err error) string {
	var refused *pgconn.PgError
	if errors.As(err, &refused) {
		return refused.Code
	}
	return ""
}
