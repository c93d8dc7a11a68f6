-- A revocation stays as it was recorded: date, reason and who.
--
-- step-ca answers the second revocation of a serial with "already revoked", but of
-- several at once each one is told that it succeeded and overwrites the one before,
-- as with one-time tokens (002_used_ott_once.sql). It never updates these tables
-- otherwise; the CRL is made from them and written elsewhere (certificates v0.30.2,
-- db/db.go, Revoke and RevokeSSH; authority/tls.go, GenerateCertificateRevocationList).
--
-- "is already revoked" is what step-ca looks for in the error to tell an ACME client
-- alreadyRevoked (acme/api/revoke.go, wrapRevokeErr); its own API answers 500.
--
-- The order of these triggers and those of 004_revoked_by.sql does not matter, all of
-- them only refuse.
create function infra_pki.refuse_second_revocation() returns trigger
language plpgsql set search_path = pg_catalog as $$
begin
  raise exception 'certificate is already revoked' using errcode = 'unique_violation';
end
$$;

revoke all on function infra_pki.refuse_second_revocation() from public;

create trigger revoked_x509_certs_once
  before update on public.revoked_x509_certs
  for each row execute function infra_pki.refuse_second_revocation();

create trigger revoked_ssh_certs_once
  before update on public.revoked_ssh_certs
  for each row execute function infra_pki.refuse_second_revocation();
