-- The key of the provisioner ssh-host-jwk revokes nothing.
--
-- It is handed to whatever enrols hosts, so that it may sign SSH host certificates
-- and do nothing else. To step-ca the key of any JWK provisioner is good for the
-- revocation of any serial, of TLS and SSH certificates alike, and no claim,
-- policy or template has a say in that (certificates v0.30.2,
-- authority/provisioner/jwk.go, AuthorizeRevoke and AuthorizeSSHRevoke;
-- authority/tls.go, Revoke). With a certificate revoked its owner can no longer
-- renew: one enrolment key could stop every service.
--
-- A JWK provisioner's id is its name, a colon and its key's id; no other
-- provisioner's id can begin like that, as names have no colon. What is not JSON
-- step-ca never writes here, and the cast refuses it. The search path is fixed,
-- since step-ca's role could put functions and operators of these names into public.
create function infra_pki.refuse_revocation() returns trigger
language plpgsql set search_path = pg_catalog as $$
begin
  if starts_with(convert_from(new.nvalue, 'UTF8')::json ->> 'ProvisionerID', 'ssh-host-jwk:') then
    raise exception 'provisioner ssh-host-jwk may not revoke certificates' using errcode = 'insufficient_privilege';
  end if;
  return new;
end
$$;

revoke all on function infra_pki.refuse_revocation() from public;

create trigger revoked_x509_certs_by
  before insert or update on public.revoked_x509_certs
  for each row execute function infra_pki.refuse_revocation();

create trigger revoked_ssh_certs_by
  before insert or update on public.revoked_ssh_certs
  for each row execute function infra_pki.refuse_revocation();
