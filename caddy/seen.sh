#!/bin/bash
# Says with which source address connections from this machine arrive at the edge, over
# IPv4 and IPv6: that is what ALLOWED_IPS has to judge, and Docker rewrites some (README,
# "What the allow-list sees"). Run by "make status", with the compose command in COMPOSE.
set -euo pipefail
read -ra command <<<"$COMPOSE"

published=$("${command[@]}" port caddy 9000) || exit 0 # it does not run
port=${published##*:}
lan=$(ip -4 route get 192.0.2.1 2>/dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p')
lan6=$(ip -6 route get 2001:db8::1 2>/dev/null | sed -n 's/.* src \([0-9a-f:]*\).*/\1/p')

echo
for address in 127.0.0.1 ${lan:+"$lan"} ::1 ${lan6:+"$lan6"}; do
  printf 'a connection to %s ' "$address"
  begin=$(date +%s.%N)
  if ! timeout 3 bash -c "exec 3<>/dev/tcp/$address/$port" 2>/dev/null; then
    echo 'is not accepted'
    continue
  fi
  sleep 0.5
  # The edge logs each connection when it ends. Others may connect at the same time.
  seen=$("${command[@]}" logs --no-log-prefix --since "$begin" caddy |
    sed -n 's/.*"source":"\([^"]*\)".*/\1/p' | sort -u | paste -sd ' ')
  echo "arrives from ${seen:-nowhere: no line in caddy\'s log}"
done
