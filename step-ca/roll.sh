#!/bin/bash
# Takes each replica of step-ca through a reload or a restart, one at a time and out of
# the edge meanwhile, so that no request fails. Run by "make init", "make up" (reload)
# and "make restart", on the host, with the compose command in COMPOSE.
# Exit codes: 0 done, 1 a replica refused or did not come back: the others are as they were.
set -euo pipefail
action=$1
read -ra command <<<"$COMPOSE"
compose() { "${command[@]}" "$@" </dev/null; }
edge() { compose exec -T caddy caddy "$@"; }

die() { # error, hint
  printf 'step-ca: error: %s\nstep-ca: hint: %s\n' "$1" "$2" >&2
  exit 1
}

# Two of these at once would take out two replicas.
project=$(compose config --format json | sed -n 's/^  "name": "\(.*\)",*$/\1/p')
mkdir -p .cache
exec 9>".cache/roll-$project"
flock 9

# Its address may change with a restart.
address() {
  docker inspect --format '{{range $name, $net := .NetworkSettings.Networks}}{{$name}} {{$net.IPAddress}}{{println}}{{end}}' "$1" |
    sed -n "s/^${project}_ca //p"
}

# out CONTAINER: no new connections for it. Its clients have 20 s to end theirs.
out() {
  local code=0 ip said
  ip=$(address "$1")
  for ((i = 0; ; i++)); do
    code=0
    said=$(edge drain "$ip" --wait 20s 2>&1) || code=$?
    case $code in
      0) return ;;
      3) ((replicas > 1)) || return 0 ;; # alone: a few requests may fail
      *) die "taking $1 out of the edge: $said" "is caddy running? make status" ;;
    esac
    ((i < 30)) || die "taking a replica out of the edge: no other one is ready" "docker compose exec caddy caddy upstreams"
    sleep 2
  done
}

back() { # container, address before
  local ip
  ip=$(address "$1")
  [[ $2 == "$ip" ]] || edge undrain "$2" --wait 0s >/dev/null # somebody else's, or nobody's
  edge undrain "$ip" --wait 90s >/dev/null && echo "step-ca: $ip is back in service"
}

restart() { docker restart -t 65 "$1" >/dev/null; }

roll() { # service
  local service=$1 containers container before began code
  mapfile -t containers < <(compose ps --quiet --status running "$service")
  replicas=${#containers[@]}
  for container in "${containers[@]}"; do
    code=3
    if [[ $action == reload ]]; then
      code=0
      docker exec "$container" reload "$service" --due || code=$?
      ((code)) || continue
    fi
    before=$(address "$container")
    if [[ $service == step-ca ]]; then out "$container"; fi
    began=$(date +%s)
    if ((code == 4)); then
      code=0
      docker exec "$container" reload "$service" || code=$?
    fi
    if ((code == 3)); then
      code=0
      restart "$container" || code=$?
    fi
    if [[ $service == step-ca ]]; then
      back "$container" "$before" || die "$service did not come back" "docker compose logs --tail 20 $service"
    fi
    if ((code)); then
      docker logs --since "$began" "$container" 2>&1 | grep -m1 'error reloading' >&2
      exit 1
    fi
  done
}

for service in $(compose ps --services --status running | grep -x -e step-ca -e crl); do
  roll "$service"
done
