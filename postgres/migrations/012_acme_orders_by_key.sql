-- The guard of 011_acme_orders_kept.sql, at a cost that does not grow with the table.
--
-- The join in there can be planned as a scan, and was, with thousands of orders: each new
-- order had the server read and parse those of all accounts. Here what the list lacks, which is
-- seldom more than one order, is found first and then looked up by its key.
create or replace function infra_pki.refuse_lost_order() returns trigger
language plpgsql set search_path = pg_catalog as $$
declare
  dropped text;
begin
  for dropped in
    select json_array_elements_text(convert_from(old.nvalue, 'UTF8')::json)
    except
    select json_array_elements_text(coalesce(convert_from(new.nvalue, 'UTF8'), '[]')::json)
  loop
    if exists (
      select from public.acme_orders
       where nkey = convert_to(dropped, 'UTF8')
         and convert_from(nvalue, 'UTF8')::json ->> 'status' = 'pending'
    ) then
      raise exception 'list of orders has changed' using errcode = 'serialization_failure';
    end if;
  end loop;
  return new;
end
$$;
