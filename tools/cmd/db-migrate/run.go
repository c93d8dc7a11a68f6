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

const usage = `Usage: db-migrate [--timeout 60s] [--migrations /migrations] [--pooler DIR] [--journal]

Brings the database to what step-ca needs, as its owner: step-ca's tables, the
guards on them, the record of the root CA, and the roles that step-ca and reports
log in as, with their privileges and passwords. It may be run any number of times;
what is as it should be is reported as unchanged and not touched.

Flags:
  --timeout DURATION    how long to wait for the server, and then for a lock (60s)
  --migrations DIR      where the SQL files are (/migrations)
  --pooler DIR          where to put what pgbouncer has to know of the roles:
                        settings.ini, users.txt and pgpass (none)
  --journal             a journal follows the database (postgres/journal.yml). Without it,
                        what one that was switched off left there is dropped: its slot
                        would keep write-ahead log that nobody fetches

Environment:
  POSTGRES_HOST, POSTGRES_PORT, POSTGRES_SSLMODE      the server
  PGBOUNCER_PORT                                      where the pooler listens
  DB_POOL_SIZE, DB_MAX_CLIENTS                        its connections, on its two sides
  POSTGRES_DB, POSTGRES_USER                          the database and its owner
  POSTGRES_PASSWORD or POSTGRES_PASSWORD_FILE         the owner's password
  STEP_CA_DB_PASSWORD or STEP_CA_DB_PASSWORD_FILE     the password that step-ca's role gets
  REPORTS_DB_PASSWORD or REPORTS_DB_PASSWORD_FILE     the password of the role for reports
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
	pooler := fs.String("pooler", "", "")
	journal := fs.Bool("journal", false, "")
	if err := oneshot.Parse(fs, args, usage); err != nil {
		return err
	}
	if *timeout <= 0 {
		return oneshot.Usage(fmt.Errorf("--timeout %s is not a length of time", *timeout))
	}
	settings := config.NewReader()
	db, sizes := settings.Database(), settings.Sizes()
	owner := settings.OwnerPassword()
	passwords := postgres.Passwords{Runtime: settings.RuntimePassword(), Reports: settings.ReportsPassword()}
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
	if err := postgres.Migrate(ctx, conn, *dir, passwords, log); err != nil {
		return err
	}
	if !*journal {
		if err := postgres.DropJournal(ctx, conn, log); err != nil {
			return err
		}
	}
	if *pooler == "" {
		return nil
	}
	return postgres.WritePoolerFiles(ctx, conn, *pooler, db, sizes, passwords.Runtime, log)
}
