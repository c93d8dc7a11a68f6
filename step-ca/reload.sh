#!/bin/bash
# Makes the step-ca of this container take a changed configuration, and says
# whether it did. Run inside the container by "make init" and "make up"; step-ca is
# process 1. Exit codes: 0 done or nothing to do, 1 refused, 3 only a restart helps.
set -euo pipefail
cd "$STEPPATH"

# This directory is a tmpfs, mounted at the container's start and never written to.
started=.
reloaded=/tmp/step-ca-reloaded

if [[ secrets/pgpass -nt $started ]]; then
  # The running process keeps the password that it has read (smallstep/nosql opens
  # its pool once), and a reload keeps the pool.
  echo "step-ca: the database password changed since its start, it needs a restart"
  exit 3
fi
if [[ ! config/ca.json -nt $started ]] || [[ -e $reloaded && ! config/ca.json -nt $reloaded ]]; then
  echo "step-ca: unchanged"
  exit
fi

# A refused reload is a line in the log and nothing else. An accepted one shows in
# step-ca's own certificate, which is made anew (smallstep/certificates, ca/ca.go).
own_certificate() { step certificate fingerprint https://localhost:9000 --roots certs/root_ca.crt; }

before=$(own_certificate)
now=$(date +%s.%N) # an edit from here on is for the next reload
kill -HUP 1
for _ in {1..50}; do
  sleep 0.2
  if after=$(own_certificate) && [[ $after != "$before" ]]; then
    touch -d "@$now" "$reloaded"
    echo "step-ca: reloaded"
    exit
  fi
done
echo "step-ca: error: it refuses the new ca.json and keeps running with the old one" >&2
echo "step-ca: hint: its reason is in: docker compose logs --tail 20 step-ca" >&2
exit 1
