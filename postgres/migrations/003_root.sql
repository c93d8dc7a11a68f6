-- Which root CA this database belongs to.
--
-- Once a fingerprint is here, provisioner-init makes no new CA over this database
-- and refuses the keys of another one. It is written after the keys are safely on
-- disk, once, and nobody but the owner can change or remove it.
create table infra_pki.root (
  -- true is the only value, so that there is at most one row
  singleton boolean primary key default true check (singleton),
  -- SHA-256 of the root certificate's DER, as "step certificate fingerprint" prints it
  fingerprint text not null check (fingerprint ~ '^[0-9a-f]{64}$'),
  recorded_at timestamptz not null default now()
);
