package postgrestest

import (
	"context"
	"crypto/rand"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

// Database is an empty database of the test's own.
type Database struct {
	config.Database
	OwnerPassword   config.Secret
	RuntimePassword config.Secret
	ReportsPassword config.Secret
}

// New makes an empty database that lives as long as the test.
func New(tb testing.TB) *Database {
	tb.Helper()
	if address := os.Getenv("TEST_DATABASE_URL"); address != "" {
		return shared(tb, address)
	}
	return Start(tb).Database()
}

// Database is the server's one database, empty at first.
func (s *Server) Database() *Database {
	return &Database{
		Database: config.Database{
			Host: "127.0.0.1", Port: s.port, PoolerHost: "127.0.0.1", PoolerPort: s.poolerPort,
			SSLMode: "disable", Name: "postgres", Owner: owner,
		},
		OwnerPassword: ownerPassword, RuntimePassword: runtimePassword, ReportsPassword: reportsPassword,
	}
}

const namePrefix = "infra_pki_test_"

// shared makes a database on a server that other tests use at the same time. The
// role of step-ca belongs to the whole server, so the tests take turns, and each
// one finds the server without the role.
func shared(tb testing.TB, address string) *Database {
	tb.Helper()
	u, err := url.Parse(address)
	require.NoError(tb, err, "TEST_DATABASE_URL")
	cfg, err := pgx.ParseConfig(address)
	require.NoError(tb, err, "TEST_DATABASE_URL")
	db := &Database{
		Database:      config.Database{Host: cfg.Host, Port: cfg.Port, SSLMode: "disable", Name: cfg.Database, Owner: cfg.User},
		OwnerPassword: config.Secret(cfg.Password), RuntimePassword: runtimePassword, ReportsPassword: reportsPassword,
	}
	if mode := u.Query().Get("sslmode"); mode != "" {
		db.SSLMode = mode
	}
	ctx := tb.Context()
	turn := db.Owner(tb)
	_, err = turn.Exec(ctx, "select pg_advisory_lock(20150115)")
	require.NoError(tb, err)
	clear := func() {
		ctx := context.WithoutCancel(ctx) // the test's own is over when it cleans up
		rows, err := turn.Query(ctx, "select datname from pg_database where starts_with(datname, $1)", namePrefix)
		require.NoError(tb, err)
		left, err := pgx.CollectRows(rows, pgx.RowTo[string])
		require.NoError(tb, err)
		for _, name := range left {
			_, err := turn.Exec(ctx, "drop database "+name+" with (force)")
			require.NoError(tb, err)
		}
		_, err = turn.Exec(ctx, "drop role if exists "+config.RuntimeRole+", "+config.ReportsRole)
		require.NoError(tb, err)
	}
	clear()
	tb.Cleanup(clear)
	name := namePrefix + strings.ToLower(rand.Text()[:12])
	_, err = turn.Exec(ctx, "create database "+name+" template template0")
	require.NoError(tb, err)
	db.Name = name
	return db
}

// Address is HOST:PORT.
func (db *Database) Address() string {
	return net.JoinHostPort(db.Host, strconv.Itoa(int(db.Port)))
}

// Owner connects as the owner, with the owner's usual search path.
func (db *Database) Owner(tb testing.TB) *pgx.Conn {
	tb.Helper()
	conn, err := postgres.Owner(db.Database, db.OwnerPassword, time.Minute).Connect(tb.Context())
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = conn.Close(context.WithoutCancel(tb.Context())) }) // the server may be gone by now
	return conn
}

// Runtime connects as step-ca's role.
func (db *Database) Runtime(tb testing.TB) *pgx.Conn {
	tb.Helper()
	conn, err := postgres.Runtime(db.Database, db.RuntimePassword).Connect(tb.Context())
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = conn.Close(context.WithoutCancel(tb.Context())) }) // the server may be gone by now
	return conn
}

// Reports connects as the role that may only read.
func (db *Database) Reports(tb testing.TB) *pgx.Conn {
	tb.Helper()
	conn, err := postgres.Reports(db.Database, db.ReportsPassword).Connect(tb.Context())
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = conn.Close(context.WithoutCancel(tb.Context())) }) // the server may be gone by now
	return conn
}

// Migrate does what db-migrate does, with the stack's own migrations.
func (db *Database) Migrate(tb testing.TB) {
	tb.Helper()
	passwords := postgres.Passwords{Runtime: db.RuntimePassword, Reports: db.ReportsPassword}
	err := postgres.Migrate(tb.Context(), db.Owner(tb), Migrations(), passwords, slog.New(slog.DiscardHandler))
	require.NoError(tb, err)
}

// Migrations is the directory of the stack's SQL files.
func Migrations() string { return stack("postgres", "migrations") }
