#!/bin/bash
# The health check of step-ca: that it answers, and that it reaches its database, of which
# its own /health knows nothing (smallstep/nosql#23). It also mends what step-ca cannot mend by itself: an OIDC
# provider that did not answer when the configuration was read is a dead provisioner
# until the next reload (smallstep/certificates#2724). GET /provisioners tells; once the
# provider answers again, step-ca is made to read its configuration once more.
set -euo pipefail
cd "$STEPPATH"
ask() { curl -fsS --max-time 2 "$@"; }
ca() { ask --cacert certs/root_ca.crt "https://localhost:9000$1" "${@:2}"; }

ca /health >/dev/null

# For reload.sh: what this process has started with. The time is that of the container's start.
at_start=/tmp/at-start-$(stat -c %Y .)
config=$(tr '\0' '\n' </proc/1/cmdline | grep -x '.*\.json')
if [[ ! -e $at_start && ! $config -nt . ]]; then
  jq -cS '[.db, .insecureAddress, .metricsAddress, .crl]' "$config" >"$at_start.new"
  mv "$at_start.new" "$at_start"
fi

# One read by key. step-ca logs it, so it is asked once in 15 s, and each time while it fails.
reached=/tmp/database-reached
if (($(date +%s) - $(stat -c %Y "$reached" 2>/dev/null || echo 0) >= 15)); then
  ca /ssh/check-host --json '{"type":"host","principal":"health.invalid"}' >/dev/null ||
    { echo "step-ca: it does not reach its database: docker compose ps pgbouncer postgres" && exit 1; }
  touch "$reached"
fi

# Twice a minute: step-ca logs the request, and a provider that it would refuse even now
# must not cost a reload each time.
looked=/tmp/oidc-looked
grep -qi '"type": "oidc"' config/ca.json || exit 0
(($(date +%s) - $(stat -c %Y "$looked" 2>/dev/null || echo 0) >= 30)) || exit 0
touch "$looked"

# One provider at a time, so that this ends in time whatever they do.
provider=$(ca '/provisioners?limit=100' |
  jq -r '.provisioners[] | select(.state == "Uninitialized") | .configurationEndpoint // empty' | shuf -n 1)
[[ -n $provider ]] || exit 0
echo "step-ca: an OIDC provider did not answer when the configuration was read: $provider"

# Trusting what step-ca trusts; a file that is not there is trusted by neither.
cat /etc/ssl/certs/ca-certificates.crt certs/root_ca.crt trusted-roots/*.crt >/tmp/trusted.crt 2>/dev/null || true
if ask --cacert /tmp/trusted.crt "$provider" | jq -e .jwks_uri >/dev/null; then
  # kill is the shell's own here. Whoever holds the lock is reloading.
  if flock -n /tmp/reload.lock bash -c 'kill -HUP 1; sleep 1'; then
    echo "step-ca: it answers again: reloading"
  fi
fi
