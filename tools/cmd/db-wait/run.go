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

const usage = `Usage: db-wait [--timeout 60s]

Ends with 0 once step-ca can work with its database: its role logs in to the server,
that is a writable primary, all tables are there and usable, and the guards on them
are in force; and then the same through pgbouncer, as step-ca does, with the
parameters that stand in ca.json. The server is asked first, since pgbouncer has one
answer for whatever is wrong behind it.

It waits for what time can heal: a server that is not there yet, is starting, or is
a standby; a host name not known yet; a schema not there yet. A wrong password, a
missing database or a refusal of TLS ends it at once. step-ca itself does not wait:
it exits if the database is away when it starts.

Flags:
  --timeout DURATION    how long to wait for the server, and then for pgbouncer (60s)

Environment:
  POSTGRES_HOST, POSTGRES_PORT, POSTGRES_SSLMODE      the server
  PGBOUNCER_HOST, PGBOUNCER_PORT                      the pooler in front of it
  POSTGRES_DB, POSTGRES_USER                          the database and its owner
  STEP_CA_DB_PASSWORD or STEP_CA_DB_PASSWORD_FILE     the password of step-ca's role
  LOG_FORMAT=json                                     one JSON object a line

Examples:
  docker compose run --rm db-wait
  db-wait --timeout 5s

Exit codes: 0 ready, 1 not ready, 2 misconfigured.
`

func run(ctx context.Context, args []string, log *slog.Logger) error {
	fs := flag.NewFlagSet("db-wait", flag.ContinueOnError)
	timeout := fs.Duration("timeout", time.Minute, "")
	if err := oneshot.Parse(fs, args, usage); err != nil {
		return err
	}
	if *timeout <= 0 {
		return oneshot.Usage(fmt.Errorf("--timeout %s is not a length of time", *timeout))
	}
	settings := config.NewReader()
	db, password := settings.Database(), settings.RuntimePassword()
	if err := settings.Err(); err != nil {
		return err
	}
	for _, w := range settings.Warnings() {
		log.LogAttrs(ctx, slog.LevelWarn, w)
	}

	for _, login := range []postgres.Login{postgres.Runtime(db, password), postgres.Pooled(db, password)} {
		conn, err := login.Wait(ctx, *timeout, log, postgres.Writable, postgres.Ready)
		if err != nil {
			return err
		}
		_ = conn.Close(ctx) // nothing was written
	}
	log.LogAttrs(ctx, slog.LevelInfo, "ready", slog.String("database", db.Name), slog.String("role", config.RuntimeRole))
	return nil
}
