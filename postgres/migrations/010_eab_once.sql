-- An external account key admits one account, and an account that it did not admit
-- gets no certificate (RFC 8555, section 7.3.4).
--
-- step-ca checks that the key is unbound, stores the account, and only then binds the
-- key, each in a transaction of its own; and for the last step it reads the key anew, so
-- that its comparison finds what it has just read (certificates v0.30.2,
-- acme/api/account.go, NewAccount; acme/db/nosql/eab.go, UpdateExternalAccountKey). Of
-- several concurrent requests with one key, each stores an account, and the key names the
-- last. A step-ca that is stopped in between, or whose last step fails, leaves an account
-- that no key names, and that may order all the same.

-- First guard: what is bound, or revoked (it has the time alone), stays as it is. The
-- loser's request fails with 500.
create function infra_pki.refuse_second_binding() returns trigger
language plpgsql set search_path = pg_catalog as $$
begin
  if (convert_from(old.nvalue, 'UTF8')::json ->> 'boundAt')::timestamptz > '0001-01-01T00:00:00Z' then
    raise exception 'external account key is already bound' using errcode = 'unique_violation';
  end if;
  return new;
end
$$;

revoke all on function infra_pki.refuse_second_binding() from public;

create trigger acme_external_account_keys_once
  before update on public.acme_external_account_keys
  for each row execute function infra_pki.refuse_second_binding();

-- Second guard: where a provisioner demands a key, an account that no key names orders
-- nothing. Which ones do is in ca.json, so provisioner-init writes it here. Accounts
-- from before that were admitted without, and stay.
create table infra_pki.eab_required (
  provisioner text primary key,
  since timestamptz not null default now()
);

-- An account's id is 32 letters and digits, and a quote inside a JSON string is escaped,
-- so the bytes that are looked for are the member of the object and nothing else. It is a
-- scan of a small table: 1 ms for 2,000 keys, at each new order.
create function infra_pki.refuse_unbound_account() returns trigger
language plpgsql set search_path = pg_catalog as $$
declare
  account text;
begin
  -- Every update of an order comes by here, too: step-ca says INSERT ... ON CONFLICT.
  if not exists (select from infra_pki.eab_required)
     or exists (select from public.acme_orders where nkey = new.nkey) then
    return new;
  end if;
  account := convert_from(new.nvalue, 'UTF8')::json ->> 'accountID';
  if exists (
    select from public.acme_accounts
      join infra_pki.eab_required on provisioner = convert_from(nvalue, 'UTF8')::json ->> 'provisionerName'
     where nkey = convert_to(account, 'UTF8')
       -- step-ca writes whole seconds
       and (convert_from(nvalue, 'UTF8')::json ->> 'createdAt')::timestamptz >= date_trunc('second', since)
  ) and not exists (
    select from public.acme_external_account_keys
     where position(convert_to('"accountID":"' || account || '"', 'UTF8') in nvalue) > 0
  ) then
    raise exception 'account is not bound to an external account key' using errcode = 'insufficient_privilege';
  end if;
  return new;
end
$$;

revoke all on function infra_pki.refuse_unbound_account() from public;

create trigger acme_orders_bound
  before insert on public.acme_orders
  for each row execute function infra_pki.refuse_unbound_account();
