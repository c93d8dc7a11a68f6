-- One ACME account for one key (RFC 8555, section 7.3.1).
--
-- Of several concurrent newAccount requests with the same key each one makes an
-- account, and the index from key to account keeps the last, as with one-time tokens
-- (002_used_ott_once.sql). Who deactivates the account of a stolen key would leave the
-- others valid. step-ca inserts into this index and deletes from it, and updates it
-- for no reason (certificates v0.30.2, acme/db/nosql/account.go, CreateAccount).
--
-- The loser's request fails with 500 before its account is stored; asked again,
-- step-ca answers with the account that is there.
create trigger "acme_keyID_accountID_index_once"
  before update on public."acme_keyID_accountID_index"
  for each row execute function infra_pki.refuse_overwrite();
