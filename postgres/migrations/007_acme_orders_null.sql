-- An ACME account that asks for its orders when none is pending can order again.
--
-- step-ca then stores NULL as the account's list, which it cannot read: from there on
-- each newOrder of the account fails with 500 (certificates v0.30.2,
-- acme/db/nosql/order.go, updateAddOrderIDs, where _new = nil; nosql v0.8.0,
-- postgresql/postgresql.go, Get scans into a string). What it reads well is no row.
--
-- AFTER, since a BEFORE trigger may not delete the row that is being written.
create function infra_pki.delete_null() returns trigger
language plpgsql set search_path = pg_catalog as $$
begin
  delete from public.acme_account_orders_index where nkey = new.nkey and nvalue is null;
  return null;
end
$$;

revoke all on function infra_pki.delete_null() from public;

create trigger acme_account_orders_index_null
  after insert or update on public.acme_account_orders_index
  for each row when (new.nvalue is null) execute function infra_pki.delete_null();

-- Accounts that have it behind them. The trigger's lock keeps step-ca from adding one meanwhile.
delete from public.acme_account_orders_index where nvalue is null;
