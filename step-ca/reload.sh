#!/bin/bash
# Makes the step-ca of this container take a changed configuration, and says
# whether it did. Run inside the container by step-ca/roll.sh, with the service's
# name; step-ca is process 1. With --due it only says what there is to do.
# Exit codes: 0 done or nothing to do, 1 refused, 3 only a restart helps, 4 a reload is due.
set -euo pipefail
cd "$STEPPATH"
service=$1 due=${2-}
case $service in
  step-ca) config=config/ca.json ;;
  *) config=config/$service.json ;;
esac

# This directory is a tmpfs, mounted at the container's start and never written to.
started=.
reloaded=/tmp/step-ca-reloaded

restart() {
  echo "$service: $1, it needs a restart"
  exit 3
}
if [[ secrets/pgpass -nt $started ]]; then
  # The running process keeps the password that it has read (smallstep/nosql opens
  # its pool once), and a reload keeps the pool.
  restart "the database password changed since its start"
fi
if [[ ! $config -nt $started ]] || [[ -e $reloaded && ! $config -nt $reloaded ]]; then
  echo "$service: unchanged"
  exit
fi
# What step-ca takes at its start alone: it refuses to reload with another database, and
# goes on with its further listeners as they were (smallstep/certificates, ca/ca.go, Reload).
at_start=/tmp/at-start-$(stat -c %Y $started)
if ! cmp -s "$at_start" <(jq -cS '[.db, .insecureAddress, .metricsAddress, .crl]' "$config"); then
  restart "its database or its listeners changed since its start"
fi
[[ $due != --due ]] || exit 4

# Nobody else's reload may be taken for this one (see health.sh).
exec 9>/tmp/reload.lock
flock -w 15 9

# A refused reload is a line in the log and nothing else. An accepted one shows in
# step-ca's own certificate, which is made anew (smallstep/certificates, ca/ca.go).
own_certificate() { step certificate fingerprint https://localhost:9000 --roots certs/root_ca.crt; }

before=$(own_certificate)
now=$(date +%s.%N) # an edit from here on is for the next reload
# It asks every OIDC provider first, and one that does not answer takes its time.
patience=10
if grep -qi '"type": "oidc"' "$config"; then patience=40; fi
SECONDS=0
kill -HUP 1
while ((SECONDS < patience)); do
  sleep 0.2
  if after=$(own_certificate) && [[ $after != "$before" ]]; then
    touch -d "@$now" "$reloaded"
    echo "$service: reloaded"
    exit
  fi
done
echo "$service: error: it has not taken the new configuration and keeps running with the old one" >&2
echo "$service: hint: its reason follows, or is in: docker compose logs --tail 20 $service" >&2
exit 1
