package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

const usage = `Usage: db-migrate [--timeout 60s] [--migrations /migrations]

Brings the database to what step-ca needs, as its owner: step-ca's tables, the
guards on them, the record of the root CA, and the role that step-ca logs in as,
with its privileges and its password. It may be run any number of times; what is
as it should be is reported as unchanged and not touched.

Flags:
  --timeout DURATION    how long to wait for the server, and then for a lock (60s)
  --migrations DIR      where the SQL files are (/migrations)

Environment:
  POSTGRES_HOST, POSTGRES_PORT, POSTGRES_SSLMODE      the server
  POSTGRES_DB, POSTGRES_USER                          the database and its owner
  POSTGRES_PASSWORD or POSTGRES_PASSWORD_FILE         the owner's password
  STEP_CA_DB_PASSWORD or STEP_CA_DB_PASSWORD_FILE     the password that step-ca's role gets
  LOG_FORMAT=json                                     one JSON object a line

Examples:
  docker compose run --rm db-migrate
  db-migrate --timeout 5s --migrations ./postgres/migrations

Exit codes: 0 done, 1 failed, 2 misconfigured.
`

func run(ctx context.Context, args []string, log *slog.Logger) error {
	fs := flag.NewFlagSet("db-migrate", flag.ContinueOnError)
	timeout := fs.Duration("timeout", time.Minute, "")
	dir := fs.String("migrations", "/migrations", "")
	if err := oneshot.Parse(fs, args, usage); err != nil {
		return err
	}
	if *timeout <= 0 {
		return oneshot.Usage(fmt.Errorf("--timeout %s is not a length of time", *timeout))
	}
	settings := config.NewReader()
	db := settings.Database()
	owner, runtime := settings.OwnerPassword(), settings.RuntimePassword()
	if err := settings.Err(); err != nil {
		return err
	}
	for _, w := range settings.Warnings() {
		log.LogAttrs(ctx, slog.LevelWarn, w)
	}

	conn, err := postgres.Owner(db, owner, *timeout).Wait(ctx, *timeout, log, postgres.Writable)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // everything is committed or given up
	locking, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	if err := postgres.Lock(locking, conn, postgres.Migrating); err != nil {
		return err
	}
	return postgres.Migrate(ctx, conn, *dir, runtime, log)
}
