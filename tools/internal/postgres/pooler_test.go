package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

func pooled(t *testing.T, sizes config.Sizes) (*postgrestest.Server, *postgrestest.Database, *postgrestest.Pooler) {
	t.Helper()
	server := postgrestest.Start(t)
	d := server.Database()
	d.Migrate(t)
	return server, d, d.Pooler(t, sizes, "")
}

// openPooled is step-ca as it is in the stack.
func openPooled(t *testing.T, d *postgrestest.Database) stepCA {
	t.Helper()
	passfile := filepath.Join(t.TempDir(), "pgpass")
	require.NoError(t, os.WriteFile(passfile, []byte(postgres.PassfileLine(d.Database.Pooler(), d.RuntimePassword)), 0o600))
	return open(t, postgres.RuntimeDSN(d.Database.Pooler(), passfile))
}

// The password of this test has every character that some layer could take for its own.
func TestStepCAThroughThePooler(t *testing.T) {
	_, d, pooler := pooled(t, postgrestest.PoolerSizes)
	ca := openPooled(t, d)
	used, err := ca.UseToken("id", "token")
	require.NoError(t, err)
	require.True(t, used)
	used, err = ca.UseToken("id", "token")
	require.NoError(t, err)
	require.False(t, used)

	conn, err := postgres.Pooled(d.Database, d.RuntimePassword).Connect(t.Context())
	require.NoError(t, err)
	defer conn.Close(t.Context()) //nolint:errcheck // nothing is pending
	for setting, want := range map[string]string{
		"search_path": "public", "statement_timeout": "30s", "idle_in_transaction_session_timeout": "1min",
	} {
		var value string
		require.NoError(t, conn.QueryRow(t.Context(), "select current_setting($1)", setting).Scan(&value))
		require.Equal(t, want, value, "the settings of the role hold behind the pooler: %s", setting)
	}
	require.NotContains(t, pooler.Log(t), "WARNING")
}

// More requests at once than there are connections to the server, many times over.
func TestPoolIsNeverExceeded(t *testing.T) {
	_, d, _ := pooled(t, config.Sizes{Pool: 4, Clients: 500})
	ca := openPooled(t, d)
	var most atomic.Int64
	watch, stop := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	owner := d.Owner(t)
	watching.Go(func() {
		for watch.Err() == nil {
			var n int64
			if owner.QueryRow(watch, "select count(*) from pg_stat_activity where usename = 'stepca'").Scan(&n) == nil {
				most.Store(max(most.Load(), n))
			}
		}
	})
	var racing sync.WaitGroup
	var failed atomic.Int64
	for i := range 200 {
		racing.Go(func() {
			for j := range 5 {
				if ok, err := ca.UseToken(fmt.Sprint(i, "-", j), "token"); err != nil || !ok {
					failed.Add(1)
				}
			}
		})
	}
	racing.Wait()
	stop()
	watching.Wait()
	require.Zero(t, failed.Load())
	require.Equal(t, int64(4), most.Load())
}

// The server is restarted, the pooler is killed; each under load. What was acknowledged
// is there, and it goes on by itself.
func TestPathComesBack(t *testing.T) {
	server, d, pooler := pooled(t, postgrestest.PoolerSizes)
	ca := openPooled(t, d)
	load, stop := context.WithCancel(t.Context())
	defer stop()
	var acknowledged sync.Map
	var running sync.WaitGroup
	var last atomic.Int64 // when a request succeeded
	for worker := range 16 {
		running.Go(func() {
			for n := 0; load.Err() == nil; n++ {
				id := fmt.Sprint(worker, "-", n)
				if ok, err := ca.UseToken(id, "token"); err == nil && ok {
					acknowledged.Store(id, true)
					last.Store(time.Now().UnixNano())
				} else {
					time.Sleep(10 * time.Millisecond)
				}
			}
		})
	}
	goesOn := func(what string) {
		t.Helper()
		begin := time.Now()
		require.Eventually(t, func() bool { return last.Load() > begin.UnixNano() }, 10*time.Second, 10*time.Millisecond, what)
		t.Logf("%s: goes on after %v", what, time.Unix(0, last.Load()).Sub(begin).Round(time.Millisecond))
	}
	goesOn("at first")
	server.Restart(t)
	goesOn("server restarted")
	pooler.Signal(t, syscall.SIGKILL)
	pooler.Start(t)
	goesOn("pooler killed")
	pooler.Signal(t, syscall.SIGINT)
	pooler.Start(t)
	goesOn("pooler stopped in good order")
	stop()
	running.Wait()
	owner := d.Owner(t)
	stored := map[string]bool{}
	rows, err := owner.Query(t.Context(), "select convert_from(nkey, 'UTF8') from public.used_ott")
	require.NoError(t, err)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	for _, id := range ids {
		stored[id] = true
	}
	count := 0
	acknowledged.Range(func(id, _ any) bool {
		count++
		require.True(t, stored[id.(string)], id)
		return true
	})
	require.Positive(t, count)
}

// Asked to stop, it lets a transaction come to its end.
func TestPoolerStopsInGoodOrder(t *testing.T) {
	_, d, pooler := pooled(t, postgrestest.PoolerSizes)
	conn, err := postgres.Pooled(d.Database, d.RuntimePassword).Connect(t.Context())
	require.NoError(t, err)
	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "insert into used_ott values ('k', 'v')")
	require.NoError(t, err)
	ended := make(chan struct{})
	go func() { pooler.Signal(t, syscall.SIGINT); close(ended) }()
	select {
	case <-ended:
		t.Fatal("it ended before the transaction")
	case <-time.After(500 * time.Millisecond):
	}
	require.NoError(t, tx.Commit(t.Context()))
	<-ended
}

func TestPoolerHealth(t *testing.T) {
	server, d, pooler := pooled(t, postgrestest.PoolerSizes)
	begin := time.Now()
	out, err := pooler.Health(t)
	require.NoError(t, err, out)
	t.Logf("a check takes %v", time.Since(begin).Round(time.Millisecond))

	server.Stop(t)
	out, err = pooler.Health(t)
	require.Error(t, err)
	require.Contains(t, out, "pgbouncer: error: no query gets through: ")
	require.NotContains(t, out, d.RuntimePassword.Reveal())
	server.Restart(t)
	require.Eventually(t, func() bool { _, err := pooler.Health(t); return err == nil }, 5*time.Second, 200*time.Millisecond)

	pooler.Signal(t, syscall.SIGKILL)
	_, err = pooler.Health(t)
	require.Error(t, err)
}

// The server is away when the pooler starts: nobody who comes then spoils it.
func TestPoolerStartsWithoutTheServer(t *testing.T) {
	server, d, pooler := pooled(t, postgrestest.PoolerSizes)
	pooler.Signal(t, syscall.SIGTERM)
	server.Stop(t)
	pooler.Start(t)
	_, err := pooler.Health(t)
	require.Error(t, err)
	server.Restart(t)
	require.Eventually(t, func() bool { _, err := pooler.Health(t); return err == nil }, 5*time.Second, 100*time.Millisecond)
	_, err = openPooled(t, d).UseToken("id", "token")
	require.NoError(t, err)
}

// A new password reaches a running pooler through its file.
func TestPoolerTakesUpANewPassword(t *testing.T) {
	_, d, pooler := pooled(t, postgrestest.PoolerSizes)
	_, err := pooler.Health(t)
	require.NoError(t, err)
	d.RuntimePassword = "another password of step-ca"
	d.Migrate(t)
	pooler.Users(t)
	require.Eventually(t, func() bool { _, err := pooler.Health(t); return err == nil }, 20*time.Second, 200*time.Millisecond)
	require.NotContains(t, pooler.Log(t), d.RuntimePassword.Reveal())
}

func TestPoolerAdminConsole(t *testing.T) {
	_, d, _ := pooled(t, postgrestest.PoolerSizes)
	console := d.Database
	console.Name = "pgbouncer"
	connect := func(login postgres.Login) (*pgx.Conn, error) { return login.Connect(t.Context()) }
	console.Host, console.Port = console.PoolerHost, console.PoolerPort
	conn, err := connect(postgres.Reports(console, d.ReportsPassword))
	require.NoError(t, err)
	defer conn.Close(t.Context()) //nolint:errcheck // nothing is pending
	rows, err := conn.Query(t.Context(), "show pools", pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	rows.Close()
	require.NoError(t, rows.Err())
	_, err = conn.Exec(t.Context(), "pause", pgx.QueryExecModeSimpleProtocol)
	require.ErrorContains(t, err, "admin access needed")
	_, err = connect(postgres.Runtime(console, d.RuntimePassword))
	require.ErrorContains(t, err, "not allowed")
}

func TestPoolerRefusals(t *testing.T) {
	server, d, pooler := pooled(t, config.Sizes{Pool: 10, Clients: 10})
	login := func(db config.Database, password config.Secret) error {
		conn, err := postgres.Pooled(db, password).Connect(t.Context())
		if err == nil {
			t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) }) // it may be gone
		}
		return err
	}
	require.ErrorContains(t, login(d.Database, "wrong"), "pgbouncer: ")
	elsewhere := d.Database
	elsewhere.Name = "elsewhere"
	require.ErrorContains(t, login(elsewhere, d.RuntimePassword), "pgbouncer: no such database: elsewhere")
	var err error
	for range 11 {
		err = errors.Join(err, login(d.Database, d.RuntimePassword))
	}
	require.ErrorContains(t, err, "pgbouncer: no more connections allowed (max_client_conn)")
	server.Stop(t)
	require.Error(t, login(d.Database, d.RuntimePassword))
	// Refusals are told, comings and goings are not.
	require.Contains(t, pooler.Log(t), "WARNING")
	require.NotContains(t, pooler.Log(t), "login attempt")
	require.NotContains(t, pooler.Log(t), d.RuntimePassword.Reveal())
}
