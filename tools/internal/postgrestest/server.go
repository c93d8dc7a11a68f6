// Package postgrestest gives tests a real PostgreSQL 15.
//
// New is a fresh database: on the server of TEST_DATABASE_URL (a superuser's URL)
// if that is set, else on a throw-away server of Debian's postgresql-15. Start is
// a throw-away server in any case, for tests that stop it or make it a standby.
// Throw-away servers run with the stack's own postgresql.conf.
package postgrestest

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

const (
	binaries = "/usr/lib/postgresql/15/bin"
	owner    = "step_ca_owner"
	// Every character that some layer between .env and the server might take for its own.
	ownerPassword   config.Secret = `owner "$` + "`" + `\'#@%:*/ pass`
	runtimePassword config.Secret = `stepca "$` + "`" + `\'#@%:*/?& pass`
	reportsPassword config.Secret = `reports "$` + "`" + `\'#@%:*/?& pass`
)

// Server is a throw-away server on a loopback port of its own.
type Server struct {
	port uint16
	// Where a Pooler of its database listens.
	poolerPort uint16
	dir        string // PGDATA
	settings   []string
	process    *exec.Cmd
	exited     chan struct{}
}

// Start makes a server and runs it for the length of the test.
func Start(tb testing.TB) *Server {
	tb.Helper()
	if _, err := os.Stat(filepath.Join(binaries, "initdb")); err != nil {
		const advice = "PostgreSQL 15 is missing: apt-get install postgresql-15, or set TEST_DATABASE_URL to a superuser's URL"
		if os.Getenv("CI") != "" {
			tb.Fatal(advice)
		}
		tb.Skip(advice)
	}
	// Not TempDir: its parent is closed to the user that the server runs as.
	base, err := os.MkdirTemp("", "postgrestest-") //nolint:usetesting // see above
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, os.RemoveAll(base)) })
	s := &Server{port: freePort(tb), poolerPort: freePort(tb), dir: filepath.Join(base, "data")}
	conf, err := os.ReadFile(stack("postgres", "postgresql.conf"))
	require.NoError(tb, err)
	require.NoError(tb, os.WriteFile(filepath.Join(base, "postgresql.conf"), conf, 0o600))
	require.NoError(tb, os.Mkdir(s.dir, 0o700))
	initialise(tb, s)
	tb.Cleanup(func() {
		s.end(tb, syscall.SIGQUIT) // at once, without a checkpoint
		if tb.Failed() {
			tb.Logf("the server's log:\n%s", s.Log(tb))
		}
	})
	s.Restart(tb)
	return s
}

// What initdb made, in memory: it takes seconds and makes the same every time.
var (
	pristine   fstest.MapFS
	pristineMu sync.Mutex
)

// initialise fills the empty directory of a server.
func initialise(tb testing.TB, s *Server) {
	tb.Helper()
	pristineMu.Lock()
	defer pristineMu.Unlock()
	base := filepath.Dir(s.dir)
	if pristine == nil {
		passwordFile := filepath.Join(base, "password")
		require.NoError(tb, os.WriteFile(passwordFile, []byte(ownerPassword.Reveal()), 0o600))
		giveAway(tb, base)
		// As the stock image does it, except that it is quick.
		out, err := s.command(tb, "initdb", "-D", s.dir, "-U", owner, "--pwfile", passwordFile,
			"--auth=scram-sha-256", "--data-checksums", "--encoding=UTF8", "--locale=C",
			"--wal-segsize=1", "--no-sync").CombinedOutput()
		require.NoError(tb, err, string(out))
		made := fstest.MapFS{}
		require.NoError(tb, fs.WalkDir(os.DirFS(s.dir), ".", func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			file := &fstest.MapFile{Mode: fs.ModeDir | 0o700}
			if !d.IsDir() {
				file.Mode = 0o600
				file.Data, err = os.ReadFile(filepath.Join(s.dir, path))
			}
			made[path] = file
			return err
		}))
		pristine = made
		return
	}
	require.NoError(tb, os.CopyFS(s.dir, pristine))
	giveAway(tb, base)
}

// giveAway makes everything under dir the server's, where it runs as somebody else.
func giveAway(tb testing.TB, dir string) {
	tb.Helper()
	id := unprivileged(tb)
	if id == nil {
		return
	}
	root, err := os.OpenRoot(dir)
	require.NoError(tb, err)
	defer root.Close() //nolint:errcheck // nothing is written through it
	require.NoError(tb, fs.WalkDir(root.FS(), ".", func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return root.Lchown(path, int(id.Uid), int(id.Gid))
	}))
}

// Restart stops the server if it runs, and starts it with further settings ("name=value").
func (s *Server) Restart(tb testing.TB, settings ...string) {
	tb.Helper()
	s.Stop(tb)
	s.settings = settings
	args := []string{"-D", s.dir}
	for _, setting := range slices.Concat([]string{
		"config_file=" + filepath.Join(filepath.Dir(s.dir), "postgresql.conf"),
		"listen_addresses=127.0.0.1", "port=" + strconv.Itoa(int(s.port)), "unix_socket_directories=",
		"shared_buffers=16MB", "fsync=off", // nothing here outlives the test
	}, settings) {
		args = append(args, "-c", setting)
	}
	s.process = s.command(tb, "postgres", args...)
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(tb, err)
	defer log.Close() //nolint:errcheck // the server has its own handle
	s.process.Stdout, s.process.Stderr = log, log
	require.NoError(tb, s.process.Start())
	exited := make(chan struct{})
	s.exited = exited
	go func() {
		_ = s.process.Wait() // the log tells why
		close(exited)
	}()
	// Listening is enough: a server in recovery may refuse everybody for good.
	require.Eventually(tb, func() bool {
		conn, err := net.Dial("tcp", s.address()) //nolint:noctx // loopback
		if err == nil {
			_ = conn.Close() // nothing was sent
		}
		return err == nil && s.started()
	}, 30*time.Second, 20*time.Millisecond, "the server does not come up, its log is %s", s.logFile())
}

// started tells whether the server has come as far as it will by itself.
func (s *Server) started() bool {
	data, err := os.ReadFile(s.logFile())
	if err != nil {
		return false
	}
	log := string(data)
	log = log[strings.LastIndex(log, "starting PostgreSQL")+1:] // only what this start said
	if slices.Contains(s.settings, closed) {
		return strings.Contains(log, "entering standby mode")
	}
	return strings.Contains(log, "ready to accept")
}

// A standby with this setting refuses every login with 57P03, as a server does
// that starts up.
const closed = "hot_standby=off"

// Standby restarts the server as a standby of nobody: in recovery and read-only.
func (s *Server) Standby(tb testing.TB) {
	tb.Helper()
	s.Stop(tb)
	s.demote(tb)
	s.Restart(tb)
}

// Recovery restarts the server so that it stays at "the database system is starting up".
func (s *Server) Recovery(tb testing.TB) {
	tb.Helper()
	s.Stop(tb)
	s.demote(tb)
	s.Restart(tb, closed)
}

func (s *Server) demote(tb testing.TB) {
	tb.Helper()
	require.NoError(tb, os.WriteFile(s.signalFile(), nil, 0o644)) //nolint:gosec // the server reads it
}

// Primary makes a standby an ordinary server again.
func (s *Server) Primary(tb testing.TB) {
	tb.Helper()
	s.Stop(tb)
	require.NoError(tb, os.Remove(s.signalFile()))
	s.Restart(tb)
}

// Stop ends the server in good order, if it runs. Its connections break.
func (s *Server) Stop(tb testing.TB) {
	tb.Helper()
	s.end(tb, syscall.SIGINT)
}

func (s *Server) end(tb testing.TB, signal os.Signal) {
	tb.Helper()
	if s.process == nil {
		return
	}
	_ = s.process.Process.Signal(signal) // it may have ended by itself
	select {
	case <-s.exited:
	case <-time.After(20 * time.Second):
		_ = s.process.Process.Kill() // as above
		tb.Error("the server did not stop")
	}
	s.process = nil
}

// Log is what the server has logged so far.
func (s *Server) Log(tb testing.TB) string {
	tb.Helper()
	data, err := os.ReadFile(s.logFile())
	require.NoError(tb, err)
	return string(data)
}

// Port is the server's port on 127.0.0.1.
func (s *Server) Port() uint16 { return s.port }

func (s *Server) address() string    { return fmt.Sprintf("127.0.0.1:%d", s.port) }
func (s *Server) logFile() string    { return filepath.Join(filepath.Dir(s.dir), "log") }
func (s *Server) signalFile() string { return filepath.Join(s.dir, "standby.signal") }

// command runs one of the server's programs, as somebody other than root: they refuse root.
func (s *Server) command(tb testing.TB, name string, args ...string) *exec.Cmd {
	tb.Helper()
	cmd := exec.Command(filepath.Join(binaries, name), args...) //nolint:noctx // the test stops it itself
	cmd.Dir = filepath.Dir(s.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: unprivileged(tb),
		Pdeathsig:  syscall.SIGQUIT, // a test that is killed leaves no server behind
	}
	return cmd
}

// unprivileged is nil where the test does not run as root.
func unprivileged(tb testing.TB) *syscall.Credential {
	tb.Helper()
	if os.Geteuid() != 0 {
		return nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		u, err = user.Lookup("nobody")
	}
	require.NoError(tb, err)
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	require.NoError(tb, err)
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	require.NoError(tb, err)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func freePort(tb testing.TB) uint16 {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // loopback
	require.NoError(tb, err)
	defer l.Close()                             //nolint:errcheck // nobody connected
	return uint16(l.Addr().(*net.TCPAddr).Port) //nolint:gosec // a TCP listener has a TCP port
}

// stack is a path in the repository, which this module is a part of.
func stack(elements ...string) string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(append([]string{filepath.Dir(file), "..", "..", ".."}, elements...)...)
}
