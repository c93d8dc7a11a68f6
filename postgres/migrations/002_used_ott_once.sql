-- A one-time token is used once, however many requests race.
--
-- step-ca's compare-and-swap locks the row that it looks for, which locks nothing
-- while there is none, and then says INSERT ... ON CONFLICT DO UPDATE: every one of
-- several concurrent requests with the same token wins (nosql v0.8.0,
-- postgresql/postgresql.go, cmpAndSwap). step-ca never updates this table for any
-- other reason, so an update is always the second use of a token.
--
-- SELECT ... FOR UPDATE fires no trigger. The loser's request fails with 401 or 500.
--
-- The function is in a schema where step-ca's role may create nothing, and the
-- table is not its own, so it can neither replace the one nor disable the other.
create function infra_pki.refuse_overwrite() returns trigger
language plpgsql as $$
begin
  raise exception 'row already exists in %', tg_table_name using errcode = 'unique_violation';
end
$$;

-- Firing a trigger needs no privilege on its function; calling it has no use.
revoke all on function infra_pki.refuse_overwrite() from public;

create trigger used_ott_once
  before update on public.used_ott
  for each row execute function infra_pki.refuse_overwrite();
