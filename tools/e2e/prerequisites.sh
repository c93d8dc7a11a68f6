#!/usr/bin/env bash
# Makes sure that this host has what "make test" and "make lint" call. As root on
# Debian or its like, what is missing gets installed. With everything there it
# takes milliseconds.
set -euo pipefail

die() { # error, hint
  printf 'prerequisites: error: %s\n' "$1" >&2
  printf 'prerequisites: hint: %s\n' "$2" >&2
  exit 1
}

have() { command -v "$1" >/dev/null; }

have docker || die "looking for the docker command: not found" "install Docker Engine"
have go || die "looking for the go command: not found" "install Go 1.21 or newer; it fetches the version that is needed by itself"

# command:package; a path where the command is not on PATH.
needed=(
  certutil:libnss3-tools
  fish:fish
  git:git
  ip:iproute2
  openssl:openssl
  /usr/sbin/pgbouncer:pgbouncer
  keytool:default-jre-headless
  sha256sum:coreutils
  ssh-keygen:openssh-client
  /usr/sbin/sshd:openssh-server
  shellcheck:shellcheck
  systemd-analyze:systemd
  yamllint:yamllint
  zsh:zsh
  /usr/lib/postgresql/15/bin/postgres:postgresql-15
)
missing=()
for item in "${needed[@]}"; do
  have "${item%%:*}" || missing+=("${item#*:}")
done
((${#missing[@]})) || exit 0

install="apt-get install -y --no-install-recommends ${missing[*]}"
have apt-get || die "missing: ${missing[*]}" "install the packages of these Debian names"
[[ $(id -u) == 0 ]] || die "missing: ${missing[*]}" "as root: $install"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
bounded() { # seconds, command
  timeout --kill-after=10 "$1" env DEBIAN_FRONTEND=noninteractive "${@:2}" >>"$log" 2>&1
}

begin=$SECONDS
printf 'prerequisites: installing %s' "${missing[*]}"
failed() {
  printf ': failed, the log ends with:\n'
  tail -n 15 "$log" | sed 's/^/    /' >&2
  die "installing ${missing[*]}" "as root: apt-get update && $install"
}

# The tests run servers of their own; the package would make and start one more.
if [[ " ${missing[*]} " == *" postgresql-15 "* && ! -e /etc/postgresql-common ]]; then
  mkdir -p /etc/postgresql-common/createcluster.d
  echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/infra-pki.conf
fi
# Nor does a machine get a server for logins because somebody runs tests on it.
if [[ " ${missing[*]} " == *" openssh-server "* ]]; then
  mkdir -p /etc/ssh
  touch /etc/ssh/sshd_not_to_be_run
fi
# The package lists may be absent or old; asking for them costs time, so only then.
bounded 300 apt-get -o DPkg::Lock::Timeout=60 install -y --no-install-recommends "${missing[@]}" || {
  bounded 120 apt-get update || failed
  bounded 300 apt-get -o DPkg::Lock::Timeout=60 install -y --no-install-recommends "${missing[@]}" || failed
}
printf ' (%d s)\n' $((SECONDS - begin))
