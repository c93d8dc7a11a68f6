#!/bin/bash
# Starts PostgreSQL, with a new database in an empty PGDATA. Keeps the part of
# the stock image's contract that this project uses.
#
# A new database grows in PGDATA/.initializing and moves up when it is whole,
# PG_VERSION last. So a kill at any instant leaves either no PG_VERSION, and the
# next start begins again, or a complete database.
set -euo pipefail

die() { # error [hint]
  printf 'postgres: error: %s\n' "$1" >&2
  [[ -z ${2-} ]] || printf 'postgres: hint: %s\n' "$2" >&2
  exit 2
}

# Sets the variable $1 from itself, from the file named in $1_FILE, or to $2.
setting() {
  local name=$1 file=${1}_FILE
  if [[ -n ${!name-} && -n ${!file-} ]]; then
    die "$name and $file are both set" "keep one of them"
  fi
  if [[ -n ${!file-} ]]; then
    [[ -r ${!file} ]] || die "reading $file: \"${!file}\" is not readable"
    printf -v "$name" '%s' "$(<"${!file}")"
  elif [[ -z ${!name-} ]]; then
    printf -v "$name" '%s' "${2-}"
  fi
}

sql() {
  psql --no-psqlrc --no-password --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" "$@"
}

run_init_files() {
  local f
  for f in /docker-entrypoint-initdb.d/*; do
    case $f in
      *.sql)
        echo "postgres: running $f"
        sql --dbname "$POSTGRES_DB" --file "$f"
        ;;
      *.sh)
        echo "postgres: running $f"
        # As in the stock image: one that is not executable is sourced.
        # shellcheck source=/dev/null
        if [[ -x $f ]]; then "$f"; else . "$f"; fi
        ;;
      */'*') ;;
      *) echo "postgres: ignoring $f" ;;
    esac
  done
}

initialize() { # server arguments
  local final=$PGDATA new=$PGDATA/.initializing

  setting POSTGRES_PASSWORD
  setting POSTGRES_USER postgres
  setting POSTGRES_DB "$POSTGRES_USER"
  setting POSTGRES_INITDB_ARGS
  export POSTGRES_USER POSTGRES_DB # for init files; the password is not passed on
  [[ -n $POSTGRES_PASSWORD ]] ||
    die "POSTGRES_PASSWORD is missing or empty" "set POSTGRES_PASSWORD_FILE to a file with the superuser's password"

  if [[ -d $new ]]; then
    echo "postgres: removing what an interrupted initialisation left in $final"
    find "$final" -mindepth 1 -delete
  elif [[ -n $(ls -A "$final") ]]; then
    die "initialising \"$final\": it is not empty and holds no database" "mount an empty volume, or restore a backup into it"
  fi
  mkdir "$new"

  # Init files that look for PGDATA find the database where it is now.
  export PGDATA=$new
  # Arguments of initdb are separated by spaces, as in the stock image.
  # shellcheck disable=SC2086
  initdb --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") $POSTGRES_INITDB_ARGS
  printf '\nhost all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"

  shift # the word "postgres"
  pg_ctl start --wait --silent --options "$(printf '%q ' "$@" -c listen_addresses= -p 5432)"
  if [[ $POSTGRES_DB != postgres ]]; then
    # Through standard input: psql does not expand variables in --command.
    sql --dbname postgres --set db="$POSTGRES_DB" <<<'CREATE DATABASE :"db";'
  fi
  run_init_files
  pg_ctl stop --wait --silent --mode fast

  export PGDATA=$final
  find "$new" -mindepth 1 -maxdepth 1 ! -name PG_VERSION -exec mv -t "$final" {} +
  sync -f "$final"
  mv "$new/PG_VERSION" "$final/"
  rmdir "$new"
  sync -f "$final"
  echo "postgres: new database is ready"
}

[[ ${1-} != -* ]] || set -- postgres "$@"
[[ ${1-} == postgres ]] || exec "$@"

mkdir -p "$PGDATA"
if [[ $(id -u) == 0 ]]; then
  mkdir -p /var/run/postgresql
  chmod 3777 /var/run/postgresql
  find "$PGDATA" /var/run/postgresql ! -user postgres -exec chown postgres:postgres {} +
  exec setpriv --reuid=postgres --regid=postgres --init-groups -- "$0" "$@"
fi
chmod 0700 "$PGDATA"

if [[ ! -s $PGDATA/PG_VERSION ]]; then
  initialize "$@"
elif [[ -d $PGDATA/.initializing ]]; then
  rmdir "$PGDATA/.initializing" # killed between the last two steps
fi
# The server has no use for it, and its environment can be read.
unset POSTGRES_PASSWORD
exec "$@"
