package postgres

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

// tables are the ones that step-ca v0.30.2 makes at its start (db/db.go and
// acme/db/nosql/nosql.go).
var tables = []string{
	"revoked_x509_certs", "x509_certs", "used_ott", "ssh_certs", "ssh_hosts",
	"ssh_host_principals", "ssh_users", "revoked_ssh_certs", "x509_certs_data", "x509_crl",
	"acme_accounts", "acme_keyID_accountID_index", "acme_authzs", "acme_challenges",
	"nonces", "acme_orders", "acme_account_orders_index", "acme_certs",
	"acme_serial_certs_index", "acme_external_account_keys",
	"acme_external_account_keyID_reference_index",
	"acme_external_account_keyID_provisionerID_index",
	"wire_acme_dpop_token", "wire_acme_oidc_token",
}

// deletedFrom are the ones that rows are deleted from in step-ca's name; the others only
// grow (see roles.sql).
var deletedFrom = []string{"nonces", "acme_orders", "acme_keyID_accountID_index", "acme_account_orders_index"}

// has_table_privilege takes "any of" a list, so each privilege is asked for.
const problemsQuery = `
with actual as (
  select name, oid, relowner
    from unnest($1::text[]) as name
    left join pg_class on relname = name and relkind = 'r'
         and relnamespace = to_regnamespace('public'))
select format('table %I is missing', name)
  from actual where oid is null
union all
select format('role %I may not use table %I', $2::text, name)
  from actual where oid is not null and not (
       has_table_privilege($2, oid, 'select') and has_table_privilege($2, oid, 'insert')
   and has_table_privilege($2, oid, 'update')
   and (name <> all($3::text[]) or has_table_privilege($2, oid, 'delete')))
union all
select format('role %I may delete from table %I', $2, name)
  from actual where name <> all($3) and has_table_privilege($2, oid, 'delete')
   and pg_get_userbyid(relowner) <> $2
union all
select format('role %I owns table %I', $2, name)
  from actual where pg_get_userbyid(relowner) = $2
union all
select format('role %I may not use schema public', $2)
 where not (has_schema_privilege($2, 'public', 'usage') and has_schema_privilege($2, 'public', 'create'))
union all
select format('the guard on %I is missing or off', guarded)
  from (values ('used_ott', 'used_ott_once'), ('nonces', 'nonces_once'),
               ('revoked_x509_certs', 'revoked_x509_certs_by'), ('revoked_x509_certs', 'revoked_x509_certs_once'),
               ('revoked_ssh_certs', 'revoked_ssh_certs_by'), ('revoked_ssh_certs', 'revoked_ssh_certs_once'),
               ('acme_account_orders_index', 'acme_account_orders_index_null'),
               ('acme_account_orders_index', 'acme_account_orders_index_kept'),
               ('acme_external_account_keys', 'acme_external_account_keys_once'),
               ('acme_orders', 'acme_orders_bound'),
               ('acme_keyID_accountID_index', 'acme_keyID_accountID_index_once')) as guards (guarded, guard)
 where not exists (
  select from pg_trigger join actual on tgrelid = actual.oid
   where name = guarded and tgname = guard and tgenabled in ('O', 'A'))
limit 1`

// Ready refuses a database whose schema is not as db-migrate leaves it: all tables
// of step-ca, usable and not owned by its role, and the guards in force.
func Ready(ctx context.Context, conn *pgx.Conn) error {
	problem, err := firstProblem(ctx, conn)
	if err != nil || problem == "" {
		return err
	}
	return &fault{reason: problem, passing: true, hint: `db-migrate makes the schema: "docker compose logs db-migrate" tells how far it came`}
}

func firstProblem(ctx context.Context, conn *pgx.Conn) (string, error) {
	var problem string
	err := conn.QueryRow(ctx, problemsQuery, tables, config.RuntimeRole, deletedFrom).Scan(&problem)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", nil
	}
	return problem, err
}
