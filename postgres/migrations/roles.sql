-- The roles that log in besides the owner, and all that they may do: stepca, which
-- step-ca runs as, and reports, which may only read.
--
-- Not a numbered migration: db-migrate runs this file every time, in a transaction
-- that it rolls back if nothing differs afterwards. A role belongs to the server
-- and not to the database, so that a dump does not carry it; a database that is
-- restored elsewhere gets roles and privileges back here, and what somebody granted
-- by hand goes away. Passwords are set separately (their plain text never comes to
-- the server).
do $$
declare
  target regclass;
  is_deleted_from boolean;
  grantee name;
  granted name;
begin
  foreach grantee in array array['stepca', 'reports'] loop
    if not exists (select from pg_roles where rolname = grantee) then
      execute format('create role %I', grantee);
    end if;
  end loop;

  -- Attributes. 85 and 5 of the server's 100 connections, so that these two leave some to
  -- db-migrate, the backup and the operator: for step-ca a full pool (DB_POOL_SIZE is at
  -- most 80) and what goes past the pool (see postgres/pgbouncer/pgbouncer.ini).
  alter role stepca with login nosuperuser nocreatedb nocreaterole noreplication nobypassrls
    connection limit 85 valid until 'infinity';
  alter role reports with login nosuperuser nocreatedb nocreaterole noreplication nobypassrls
    connection limit 5 valid until 'infinity';
  for grantee, granted in
    select pg_get_userbyid(m.member), pg_get_userbyid(m.roleid) from pg_auth_members m
     where m.member in ('stepca'::regrole, 'reports'::regrole)
       -- Granted again below, it would be a new row each time.
       and not (m.member = 'reports'::regrole and m.roleid = 'pg_monitor'::regrole and not m.admin_option)
  loop
    execute format('revoke %I from %I', granted, grantee);
  end loop;
  -- What the server does for whom: pg_stat_activity, sizes, settings. It may not end a session.
  if not pg_has_role('reports', 'pg_monitor', 'member') then
    grant pg_monitor to reports;
  end if;

  -- Neither owns anything, not even a database that it made itself: an owner can take
  -- every guard off.
  reassign owned by stepca, reports to current_user;

  -- Settings. step-ca gives no query a time limit of its own.
  alter role stepca reset all;
  -- "$user" in the default would prefer a schema called stepca, if there ever is one.
  alter role stepca set search_path = 'public';
  -- step-ca's own HTTP server gives up after 15 s; only the listing of revocations may take longer.
  alter role stepca set statement_timeout = '30s';
  -- A replica that hangs inside a transaction holds the row locks that the others wait for.
  alter role stepca set idle_in_transaction_session_timeout = '60s';
  alter role reports reset all;
  alter role reports set search_path = 'public';
  -- Whatever a report is, it is not a certificate: it writes nothing, waits for no lock that
  -- step-ca holds, and its old snapshot does not keep vacuum from its work for long.
  alter role reports set default_transaction_read_only = on;
  alter role reports set statement_timeout = '60s';
  alter role reports set lock_timeout = '5s';
  alter role reports set idle_in_transaction_session_timeout = '60s';

  -- Database. PUBLIC has CONNECT and TEMPORARY on every new one.
  execute format('revoke all on database %I from public, stepca, reports', current_database());
  execute format('grant connect on database %I to stepca, reports', current_database());

  -- Schema public. CREATE, because CREATE TABLE IF NOT EXISTS asks for it even
  -- where the table exists. A database that comes from before PostgreSQL 15 lets
  -- everybody create there.
  revoke all on schema public from public, stepca, reports;
  grant usage, create on schema public to stepca;
  grant usage on schema public to reports;

  -- Tables. Schema public holds step-ca's tables and nothing else; ours are in
  -- infra_pki. No TRUNCATE, which row triggers do not see, and no TRIGGER or
  -- REFERENCES, which would let the role hang code onto a table of the owner.
  --
  -- DELETE only where step-ca v0.30.2 deletes: a consumed nonce, and what it takes back
  -- when it cannot finish (acme/db/nosql: nonce.go, order.go, account.go); and where a guard
  -- does in its name (007_acme_orders_null.sql). It has code for the deletion of external
  -- account keys, behind an API that is not in ca.json (authority/admin/api/acme.go). A
  -- record of what was issued, revoked or used up is for good.
  --
  -- The keys of accounts to be are for step-ca alone: who reads one can register with it.
  for target, is_deleted_from in
    select oid::regclass, relname in ('nonces', 'acme_orders', 'acme_keyID_accountID_index', 'acme_account_orders_index')
      from pg_class
     where relnamespace = 'public'::regnamespace and relkind = 'r' and relowner = current_user::regrole
     order by relname
  loop
    execute format('revoke all on %s from public, stepca, reports', target);
    execute format('grant select, insert, update on %s to stepca', target);
    if is_deleted_from then
      execute format('grant delete on %s to stepca', target);
    end if;
    if target <> 'public.acme_external_account_keys'::regclass then
      execute format('grant select on %s to reports', target);
    end if;
  end loop;

  -- Our own schema. The role may record the root's fingerprint, once: the primary
  -- key refuses a second row, and it can neither update, delete nor date one back.
  revoke all on schema infra_pki from public, stepca, reports;
  revoke all on all tables in schema infra_pki from public, stepca, reports;
  grant usage on schema infra_pki to stepca, reports;
  grant select, insert (fingerprint) on infra_pki.root to stepca;
  -- provisioner-init works with this role, too; what ca.json says is written here.
  grant select, insert (provisioner), delete on infra_pki.eab_required to stepca;
  grant select on all tables in schema infra_pki to reports;
end
$$;
