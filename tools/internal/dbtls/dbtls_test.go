package dbtls_test

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/smallstep/certificates/db"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/dbtls"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

func ensure(t *testing.T, dir string, now time.Time) map[string]durable.Outcome {
	t.Helper()
	outcomes := map[string]durable.Outcome{}
	require.NoError(t, dbtls.Ensure(dir, t.TempDir(), now, func(outcome durable.Outcome, item string) { outcomes[item] = outcome }))
	return outcomes
}

func TestRenewal(t *testing.T) {
	const year = 365 * 24 * time.Hour
	start := time.Now()
	tests := map[string]struct {
		after      time.Duration
		ca, server durable.Outcome
	}{
		"at once":                               {0, durable.Unchanged, durable.Unchanged},
		"just before two of three years":        {2*year - time.Hour, durable.Unchanged, durable.Unchanged},
		"after two years":                       {2*year + time.Hour, durable.Unchanged, durable.Updated},
		"long after the servers' have ended":    {10 * year, durable.Unchanged, durable.Updated},
		"after two thirds of the CA's life":     {20*year + time.Hour, durable.Updated, durable.Updated},
		"on a machine whose clock was set back": {-year, durable.Updated, durable.Updated},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			ensure(t, dir, start)
			now := start.Add(tc.after)
			outcomes := ensure(t, dir, now)
			require.Equal(t, tc.ca, outcomes["CA of the database"])
			for _, server := range dbtls.Servers {
				require.Equal(t, tc.server, outcomes["certificate of "+server])
				verify(t, dir, server, now)
			}
		})
	}
}

func verify(t *testing.T, dir, server string, now time.Time) {
	t.Helper()
	roots := x509.NewCertPool()
	root, err := os.ReadFile(filepath.Join(dir, dbtls.File))
	require.NoError(t, err)
	require.True(t, roots.AppendCertsFromPEM(root))
	data, err := os.ReadFile(filepath.Join(dir, server+".crt"))
	require.NoError(t, err)
	block, _ := pem.Decode(data)
	leaf, err := x509.ParseCertificate(block.Bytes)
	require.NoError(t, err)
	for _, name := range []string{server, "127.0.0.1"} {
		_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: now})
		require.NoError(t, err)
	}
}

// step-ca to pgbouncer to PostgreSQL, each verified by name; and with another CA neither.
func TestStepCAOverTLS(t *testing.T) {
	dir := t.TempDir()
	ensure(t, dir, time.Now())
	server := postgrestest.Start(t)
	d := server.Database()
	server.ServeTLS(t, dir)
	d.SSLMode = "verify-full"
	t.Setenv("PGSSLROOTCERT", filepath.Join(dir, dbtls.File))
	d.Migrate(t)
	pooler := d.Pooler(t, postgrestest.PoolerSizes, postgrestest.Readable(t, dir))
	out, err := pooler.Health(t)
	require.NoError(t, err, out)

	passfile := filepath.Join(t.TempDir(), "pgpass")
	require.NoError(t, os.WriteFile(passfile, []byte(postgres.PassfileLine(d.Database.Pooler(), d.RuntimePassword)), 0o600))
	dsn := postgres.RuntimeDSN(d.Database.Pooler(), passfile)
	opened, err := db.New(&db.Config{Type: "postgresql", DataSource: dsn})
	require.NoError(t, err)
	used, err := opened.UseToken("id", "token")
	require.NoError(t, err)
	require.True(t, used)
	require.NoError(t, opened.Shutdown())
	var plain int
	require.NoError(t, d.Owner(t).QueryRow(t.Context(),
		"select count(*) from pg_stat_activity join pg_stat_ssl using (pid) where usename = 'stepca' and not ssl").Scan(&plain))
	require.Zero(t, plain)

	d.SSLMode = "disable"
	_, err = postgres.Pooled(d.Database, d.RuntimePassword).Connect(t.Context())
	require.ErrorContains(t, err, "SSL required")
	d.SSLMode = "verify-full"
	other := t.TempDir()
	ensure(t, other, time.Now())
	t.Setenv("PGSSLROOTCERT", filepath.Join(other, dbtls.File))
	for _, login := range []postgres.Login{postgres.Runtime(d.Database, d.RuntimePassword), postgres.Pooled(d.Database, d.RuntimePassword)} {
		_, err = login.Connect(t.Context())
		require.ErrorContains(t, err, "x509: certificate signed by unknown authority")
	}
}
