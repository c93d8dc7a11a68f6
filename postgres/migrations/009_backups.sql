-- When the last backups were made, for the alarm that says there is none.
--
-- The owner inserts a row once an archive is written and verified.
create table infra_pki.backups (
  taken_at timestamptz not null default now(),
  -- size of the archive
  bytes bigint not null check (bytes > 0),
  -- rows of x509_certs and ssh_certs in it
  certificates bigint not null check (certificates >= 0)
);

create index backups_taken_at on infra_pki.backups (taken_at);
