-- The role that step-ca logs in as, and all that it may do.
--
-- Not a numbered migration: db-migrate runs this file every time, in a transaction
-- that it rolls back if nothing differs afterwards. A role belongs to the server
-- and not to the database, so that a dump does not carry it; a database that is
-- restored elsewhere gets role and privileges back here, and what somebody granted
-- by hand goes away. The password is set separately (its plain text never comes
-- to the server).
do $$
declare
  target regclass;
  granted name;
begin
  if not exists (select from pg_roles where rolname = 'stepca') then
    create role stepca;
  end if;

  -- Attributes. 80 of the server's 100 connections: step-ca opens as many as it has
  -- requests in flight, and must not take those of db-migrate, the backup and the
  -- operator. A request beyond it fails, as it would beyond max_connections.
  alter role stepca with login nosuperuser nocreatedb nocreaterole noreplication nobypassrls
    connection limit 80 valid until 'infinity';
  for granted in select pg_get_userbyid(roleid) from pg_auth_members where member = 'stepca'::regrole loop
    execute format('revoke %I from stepca', granted);
  end loop;

  -- Settings. step-ca gives no query a time limit of its own.
  alter role stepca reset all;
  -- "$user" in the default would prefer a schema called stepca, if there ever is one.
  alter role stepca set search_path = 'public';
  -- step-ca's own HTTP server gives up after 15 s; only the listing of revocations may take longer.
  alter role stepca set statement_timeout = '30s';
  -- A replica that hangs inside a transaction holds the row locks that the others wait for.
  alter role stepca set idle_in_transaction_session_timeout = '60s';

  -- Database. PUBLIC has CONNECT and TEMPORARY on every new one.
  execute format('revoke all on database %I from public, stepca', current_database());
  execute format('grant connect on database %I to stepca', current_database());

  -- Schema public. CREATE, because CREATE TABLE IF NOT EXISTS asks for it even
  -- where the table exists. A database that comes from before PostgreSQL 15 lets
  -- everybody create there.
  revoke all on schema public from public, stepca;
  grant usage, create on schema public to stepca;

  -- Tables. Schema public holds step-ca's tables and nothing else; ours are in
  -- infra_pki. No TRUNCATE, which row triggers do not see, and no TRIGGER or
  -- REFERENCES, which would let the role hang code onto a table of the owner.
  for target in
    select oid::regclass from pg_class
     where relnamespace = 'public'::regnamespace and relkind = 'r' and relowner = current_user::regrole
     order by relname
  loop
    execute format('revoke all on %s from public, stepca', target);
    execute format('grant select, insert, update, delete on %s to stepca', target);
  end loop;

  -- Our own schema. The role may record the root's fingerprint, once: the primary
  -- key refuses a second row, and it can neither update, delete nor date one back.
  revoke all on schema infra_pki from public, stepca;
  revoke all on all tables in schema infra_pki from public, stepca;
  grant usage on schema infra_pki to stepca;
  grant select, insert (fingerprint) on infra_pki.root to stepca;
end
$$;
