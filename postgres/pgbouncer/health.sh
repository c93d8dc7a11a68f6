#!/bin/bash
# The health check of the pooler: a query of step-ca's role comes through it and back.
# It fails where a query of step-ca would: PostgreSQL away, no free connection in time, a
# password that is not the role's.
set -euo pipefail
pooler=${POOLER:-/pooler} # by db-migrate
run=${PGBOUNCER_RUN:-/run/pgbouncer} # a tmpfs

# PgBouncer reads its files when it is told to: db-migrate has written new ones, for a new
# password or another size. Until the first check this directory is as old as the process.
read=$run/read
[[ -e $read ]] || touch -r "$run" "$read"
if [[ $pooler/users.txt -nt $read || $pooler/settings.ini -nt $read ]]; then
  touch "$read"
  kill -HUP "${PGBOUNCER_PID:-1}"
fi

IFS=: read -r host port database user _ <"$pooler/pgpass"
# Docker's own limit is 5 s, and what it ends says nothing.
if answer=$(PGPASSFILE=$pooler/pgpass PGCONNECT_TIMEOUT=3 PGAPPNAME=health \
  PGSSLMODE=${POSTGRES_SSLMODE:-disable} PGSSLROOTCERT=${DATABASE_TLS:-/database-tls}/ca.crt timeout 4 \
  psql -XAtq -h "$host" -p "$port" -U "$user" -d "$database" -w -c 'select 1' 2>&1); then
  [[ $answer == 1 ]]
else
  echo "pgbouncer: error: no query gets through: ${answer:-no answer within 4 s}"
  echo 'pgbouncer: hint: "docker compose ps postgres" and "docker compose logs pgbouncer postgres" tell'
  exit 1
fi
