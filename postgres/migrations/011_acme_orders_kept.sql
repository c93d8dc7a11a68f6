-- The list of an account's orders loses none that is pending.
--
-- step-ca reads the list, drops what is no longer pending, adds the new order and writes it
-- back if it has not changed meanwhile; a lock of the process makes requests take turns,
-- which are no turns between replicas. Where there is a list, the comparison fails and the
-- request with it (500; a client orders again). Where there is none yet, the comparison
-- locks nothing, as with one-time tokens (002_used_ott_once.sql), and the second of two
-- orders overwrites the list of the first (certificates v0.30.2, acme/db/nosql/order.go,
-- updateAddOrderIDs).
--
-- What step-ca drops, it has stored as not pending before (acme/order.go, UpdateStatus). A
-- list that lacks an order which is still pending is therefore one that was written over;
-- it is refused, and step-ca takes its order back.
create function infra_pki.refuse_lost_order() returns trigger
language plpgsql set search_path = pg_catalog as $$
begin
  if exists (
    select id from json_array_elements_text(convert_from(old.nvalue, 'UTF8')::json) as listed (id)
      join public.acme_orders on nkey = convert_to(id, 'UTF8')
     where convert_from(acme_orders.nvalue, 'UTF8')::json ->> 'status' = 'pending'
       and id not in (select json_array_elements_text(coalesce(convert_from(new.nvalue, 'UTF8'), '[]')::json))
  ) then
    raise exception 'list of orders has changed' using errcode = 'serialization_failure';
  end if;
  return new;
end
$$;

revoke all on function infra_pki.refuse_lost_order() from public;

create trigger acme_account_orders_index_kept
  before update on public.acme_account_orders_index
  for each row execute function infra_pki.refuse_lost_order();
