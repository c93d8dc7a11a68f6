package postgrestest

import (
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

// Pooler is a throw-away PgBouncer with the stack's own configuration.
type Pooler struct {
	db      *Database
	to      config.Database
	dir     string
	sizes   config.Sizes
	tls     string
	process *exec.Cmd
	exited  chan struct{}
}

// PoolerSizes are those of a pooler that a test has nothing to say about.
var PoolerSizes = config.Sizes{Pool: 10, Clients: 200}

// Pooler runs a PgBouncer in front of a migrated database of Start, for the length of
// the test, at db.Pooler(). If tls is not empty, it has its certificates there.
func (db *Database) Pooler(tb testing.TB, sizes config.Sizes, tls string) *Pooler {
	tb.Helper()
	return db.poolerTo(tb, db.Database, sizes, tls)
}

// poolerTo leads to another server or database than it should.
func (db *Database) poolerTo(tb testing.TB, to config.Database, sizes config.Sizes, tls string) *Pooler {
	tb.Helper()
	if _, err := os.Stat("/usr/sbin/pgbouncer"); err != nil {
		const advice = "PgBouncer is missing: apt-get install pgbouncer"
		if os.Getenv("CI") != "" {
			tb.Fatal(advice)
		}
		tb.Skip(advice)
	}
	base, err := os.MkdirTemp("", "postgrestest-") //nolint:usetesting // TempDir's parent is closed to whom it runs as
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, os.RemoveAll(base)) })
	p := &Pooler{db: db, to: to, dir: base, sizes: sizes, tls: tls}
	require.NoError(tb, os.Mkdir(p.run(), 0o700))
	conf, err := os.ReadFile(stack("postgres", "pgbouncer", "pgbouncer.ini"))
	require.NoError(tb, err)
	for old, replacement := range map[string]string{
		"/pooler/": base + "/", "listen_addr = *": "listen_addr = 127.0.0.1",
	} {
		require.Contains(tb, string(conf), old)
		conf = []byte(strings.ReplaceAll(string(conf), old, replacement))
	}
	require.NoError(tb, os.WriteFile(p.config(), conf, 0o600))
	tb.Cleanup(func() {
		p.Signal(tb, syscall.SIGKILL)
		if tb.Failed() {
			tb.Logf("the pooler's log:\n%s", p.Log(tb))
		}
	})
	p.Users(tb)
	p.Start(tb)
	return p
}

// Users writes the pooler's files anew, as db-migrate does.
func (p *Pooler) Users(tb testing.TB) {
	tb.Helper()
	require.NoError(tb, postgres.WritePoolerFiles(tb.Context(), p.db.Owner(tb), p.dir, p.to, p.sizes, p.db.RuntimePassword, slog.New(slog.DiscardHandler)))
	if p.tls != "" {
		settings := filepath.Join(p.dir, "settings.ini")
		data, err := os.ReadFile(settings)
		require.NoError(tb, err)
		require.NoError(tb, os.Remove(settings)) // it is read-only
		require.NoError(tb, os.WriteFile(settings, []byte(strings.ReplaceAll(string(data), "/database-tls", p.tls)), 0o600))
	}
	giveAway(tb, p.dir)
	giveAway(tb, p.run())
}

// Start runs it until Signal ends it.
func (p *Pooler) Start(tb testing.TB) {
	tb.Helper()
	p.process = exec.Command("/usr/sbin/pgbouncer", p.config()) //nolint:noctx // the test ends it itself
	p.process.SysProcAttr = &syscall.SysProcAttr{Credential: unprivileged(tb), Pdeathsig: syscall.SIGKILL}
	log, err := os.OpenFile(p.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(tb, err)
	defer log.Close() //nolint:errcheck // the pooler has its own handle
	p.process.Stdout, p.process.Stderr = log, log
	require.NoError(tb, p.process.Start())
	exited := make(chan struct{})
	p.exited = exited
	go func() {
		_ = p.process.Wait() // the log tells why
		close(exited)
	}()
	require.Eventually(tb, func() bool {
		conn, err := net.Dial("tcp", net.JoinHostPort(p.db.PoolerHost, strconv.Itoa(int(p.db.PoolerPort)))) //nolint:noctx // loopback
		if err == nil {
			_ = conn.Close() // nothing was sent
		}
		return err == nil
	}, 10*time.Second, 10*time.Millisecond, "the pooler does not come up, its log is %s", p.logFile())
}

// Signal ends it and waits for that.
func (p *Pooler) Signal(tb testing.TB, signal os.Signal) {
	tb.Helper()
	if p.process == nil {
		return
	}
	_ = p.process.Process.Signal(signal) // it may have ended by itself
	select {
	case <-p.exited:
	case <-time.After(20 * time.Second):
		_ = p.process.Process.Kill() // as above
		tb.Errorf("the pooler did not end with %v", signal)
	}
	p.process = nil
}

// Health is what its health check says.
func (p *Pooler) Health(tb testing.TB) (string, error) {
	tb.Helper()
	check := exec.Command("bash", stack("postgres", "pgbouncer", "health.sh")) //nolint:noctx // has a limit of its own
	pid := "none"
	if p.process != nil {
		pid = strconv.Itoa(p.process.Process.Pid)
	}
	check.Env = []string{
		"PATH=" + os.Getenv("PATH"), "PGBOUNCER_PID=" + pid, "POOLER=" + p.dir, "PGBOUNCER_RUN=" + p.run(),
		"POSTGRES_SSLMODE=" + p.db.SSLMode, "DATABASE_TLS=" + p.tls,
	}
	check.SysProcAttr = &syscall.SysProcAttr{Credential: unprivileged(tb)}
	out, err := check.CombinedOutput()
	return string(out), err
}

// Log is what it has logged so far.
func (p *Pooler) Log(tb testing.TB) string {
	tb.Helper()
	data, err := os.ReadFile(p.logFile())
	require.NoError(tb, err)
	return string(data)
}

func (p *Pooler) config() string  { return filepath.Join(p.dir, "pgbouncer.ini") }
func (p *Pooler) run() string     { return filepath.Join(p.dir, "run") }
func (p *Pooler) logFile() string { return filepath.Join(p.dir, "log") }

// Readable copies the files of a directory to where the throw-away programs can read it, as their own.
func Readable(tb testing.TB, dir string) string {
	tb.Helper()
	base, err := os.MkdirTemp("", "postgrestest-") //nolint:usetesting // TempDir's parent is closed to whom they run as
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, os.RemoveAll(base)) })
	files, err := os.ReadDir(dir)
	require.NoError(tb, err)
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(dir, file.Name()))
		require.NoError(tb, err)
		require.NoError(tb, os.WriteFile(filepath.Join(base, file.Name()), data, 0o600))
	}
	giveAway(tb, base)
	return base
}
