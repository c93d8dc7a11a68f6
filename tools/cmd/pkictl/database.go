package main

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

const databaseEnvironment = `Environment, as in the stack's service pkictl:
  POSTGRES_HOST, POSTGRES_PORT, POSTGRES_SSLMODE, POSTGRES_DB, POSTGRES_USER
  STEP_CA_DB_PASSWORD or STEP_CA_DB_PASSWORD_FILE
`

// withDatabase does work as step-ca's role. check reads further settings before
// anything is tried.
func withDatabase(ctx context.Context, check func(*config.Reader), do func(conn *pgx.Conn) error) error {
	settings := config.NewReader()
	db, password := settings.Database(), settings.RuntimePassword()
	check(settings)
	if err := settings.Err(); err != nil {
		return err
	}
	conn, err := postgres.Runtime(db, password).Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // everything is committed or given up
	return do(conn)
}
