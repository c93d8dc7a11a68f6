package postgres_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

func TestRuntimeDSN(t *testing.T) {
	tests := map[string]struct {
		db   config.Database
		want string
	}{
		"in the stack": {
			config.Database{Host: "postgres", Port: 5432, SSLMode: "disable", Name: "step_ca_db", Owner: "step_ca_owner"},
			"postgresql://stepca@postgres:5432/step_ca_db?application_name=step-ca&connect_timeout=5&default_query_exec_mode=exec&passfile=%2Fhome%2Fstep%2Fconfig%2Fpgpass&sslmode=disable",
		},
		"over IPv6 with TLS": {
			config.Database{Host: "fd00::5", Port: 6432, SSLMode: "verify-full", Name: "ca"},
			"postgresql://stepca@[fd00::5]:6432/ca?application_name=step-ca&connect_timeout=5&default_query_exec_mode=exec&passfile=%2Fhome%2Fstep%2Fconfig%2Fpgpass&sslmode=verify-full",
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, tc.want, postgres.RuntimeDSN(tc.db, "/home/step/config/pgpass"))
		})
	}
}

func TestPassfileLine(t *testing.T) {
	db := config.Database{Host: "postgres", Port: 5432, Name: "step_ca_db"}
	tests := map[string]struct {
		password config.Secret
		want     string
	}{
		"plain":                          {"secret", "postgres:5432:step_ca_db:stepca:secret\n"},
		"colon and backslash":            {`a:b\c\:`, `postgres:5432:step_ca_db:stepca:a\:b\\c\\\:` + "\n"},
		"everything else stays as it is": {`'"$#@%*`, `postgres:5432:step_ca_db:stepca:'"$#@%*` + "\n"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) { require.Equal(t, tc.want, postgres.PassfileLine(db, tc.password)) })
	}
	db.Host = "fd00::5"
	require.Equal(t, `fd00\:\:5:5432:step_ca_db:stepca:secret`+"\n", postgres.PassfileLine(db, "secret"))
}

// Something listens and never says a word: a try has an end of its own.
func TestWaitEndsWhereNobodyAnswers(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // loopback
	require.NoError(t, err)
	t.Cleanup(func() { _ = silent.Close() })                                                                                  // nothing was accepted
	db := config.Database{Host: "127.0.0.1", Port: uint16(silent.Addr().(*net.TCPAddr).Port), SSLMode: "disable", Name: "ca"} //nolint:gosec // a TCP listener has a TCP port
	_, err = postgres.Runtime(db, "secret").Wait(t.Context(), time.Second, slog.New(slog.DiscardHandler))
	require.ErrorContains(t, err, "not ready after 1s: no answer in time")
	require.NotContains(t, err.Error(), "secret")
}

// The server goes away under an open connection.
func TestConnectionThatBreaksIsWaitedFor(t *testing.T) {
	server := postgrestest.Start(t)
	d := server.Database()
	tries := 0
	conn, err := postgres.Owner(d.Database, d.OwnerPassword, time.Second).Wait(t.Context(), 30*time.Second, slog.New(slog.DiscardHandler),
		func(ctx context.Context, conn *pgx.Conn) error {
			tries++
			if tries == 1 {
				server.Restart(t)
			}
			return conn.Ping(ctx)
		})
	require.NoError(t, err)
	require.NoError(t, conn.Close(t.Context()))
	require.Equal(t, 2, tries)
}

func TestUnknownFailureEndsTheWait(t *testing.T) {
	d := postgrestest.New(t)
	_, err := postgres.Owner(d.Database, d.OwnerPassword, time.Second).Wait(t.Context(), time.Minute, slog.New(slog.DiscardHandler),
		func(context.Context, *pgx.Conn) error { return errors.New("never seen before") })
	require.ErrorContains(t, err, `as "`+d.Database.Owner+`": never seen before`)
}
