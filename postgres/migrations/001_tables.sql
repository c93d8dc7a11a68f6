-- step-ca's tables, in exactly the shape that step-ca v0.30.2 would give them.
--
-- step-ca says CREATE TABLE IF NOT EXISTS at every start. Made here first, they
-- belong to the owner, so that step-ca's role can neither alter nor drop them nor
-- take the guards off; and two replicas that start on an empty database do not
-- race (one would die with SQLSTATE 23505 on pg_type).
--
-- There are no "down" migrations. Down means dropping the record of certificates
-- that were issued; the way back is a backup.
--
-- Names are qualified throughout: db-migrate works with search_path = pg_catalog,
-- because step-ca's role may create objects in schema public, and an unqualified
-- name could find one of those.
do $$
declare
  name text;
  shape text;
begin
  foreach name in array array[
    -- db/db.go
    'revoked_x509_certs', 'x509_certs', 'used_ott', 'ssh_certs', 'ssh_hosts',
    'ssh_host_principals', 'ssh_users', 'revoked_ssh_certs', 'x509_certs_data', 'x509_crl',
    -- acme/db/nosql/nosql.go; made even where no provisioner is an ACME one
    'acme_accounts', 'acme_keyID_accountID_index', 'acme_authzs', 'acme_challenges',
    'nonces', 'acme_orders', 'acme_account_orders_index', 'acme_certs',
    'acme_serial_certs_index', 'acme_external_account_keys',
    'acme_external_account_keyID_reference_index',
    'acme_external_account_keyID_provisionerID_index',
    'wire_acme_dpop_token', 'wire_acme_oidc_token'
  ] loop
    execute format(
      'create table if not exists public.%I (nkey bytea check (octet_length(nkey) <= 255), nvalue bytea, primary key (nkey))',
      name);

    -- A table that was there before (an older installation, a restored backup) is
    -- adopted, unless it is something else under the same name.
    select string_agg(
             attname || ' ' || format_type(atttypid, atttypmod)
               || case when attnotnull then ' not null' else '' end,
             ', ' order by attnum)
      into shape
      from pg_attribute join pg_class on pg_class.oid = attrelid
     where attrelid = format('public.%I', name)::regclass
       and relkind = 'r' and attnum > 0 and not attisdropped;
    if shape is distinct from 'nkey bytea not null, nvalue bytea'
       or not exists (
         select from pg_constraint
          where conrelid = format('public.%I', name)::regclass
            and contype = 'p' and conkey = array[1::smallint]) then
      raise exception 'table public.% is there and is not one of step-ca: %', name, coalesce(shape, 'not a table')
        using errcode = 'invalid_table_definition';
    end if;
    if (select relowner from pg_class where oid = format('public.%I', name)::regclass) <> current_user::regrole then
      execute format('alter table public.%I owner to current_user', name);
    end if;
  end loop;
end
$$;
