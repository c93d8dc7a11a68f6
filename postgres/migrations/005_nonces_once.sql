-- An ACME nonce is consumed once, however many requests race (RFC 8555, section 6.5).
--
-- step-ca reads the nonce without a lock and then deletes it, in one transaction at
-- READ COMMITTED, and takes a DELETE that removed nothing for success: every one of
-- several concurrent requests with the same nonce passes (certificates v0.30.2,
-- acme/db/nosql/nonce.go, DeleteNonce; nosql v0.8.0, postgresql/postgresql.go, Update).
-- It deletes from this table for no other reason and not without having seen the row,
-- so a DELETE of its that finds none has lost a race. The request fails with 500; a
-- nonce that was gone before is badNonce, as ever.
--
-- A row trigger does not fire where there is no row. Other roles may find nothing to
-- delete: whoever prunes old nonces.
create function infra_pki.refuse_used_nonce() returns trigger
language plpgsql set search_path = pg_catalog as $$
begin
  if not exists (select from deleted) then
    raise exception 'nonce is already used' using errcode = 'no_data_found';
  end if;
  return null;
end
$$;

revoke all on function infra_pki.refuse_used_nonce() from public;

create trigger nonces_once
  after delete on public.nonces referencing old table as deleted
  for each statement when (current_user = 'stepca')
  execute function infra_pki.refuse_used_nonce();
