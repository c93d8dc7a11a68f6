package postgrestest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"
)

// Scripts are testscripts with a server and an empty database each. The environment
// is that of a one-shot in the stack; the passwords are in the files owner-password,
// stepca-password and reports-password. Further commands:
//
//	migrate                     what db-migrate does, without running it
//	sql QUERY                   as owner; prints the rows
//	until QUERY                 as owner, again and again until the answer is true
//	hold TABLE                  locks a table until "release"
//	release
//	server stop|start|standby|recovery|primary|tls|log
//	pooler start [POSTGRES_DB=NAME] [POSTGRES_PORT=PORT], pooler stop
//	ends-with FILE              what the program said last (its error and hint lines)
//	                            is FILE, in which $VARIABLES are replaced
func Scripts(dir string) testscript.Params {
	return testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               setUpScript,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"migrate":   func(ts *testscript.TestScript, _ bool, _ []string) { of(ts).db.Migrate(of(ts).tb) },
			"sql":       sqlCommand,
			"until":     untilCommand,
			"hold":      holdCommand,
			"release":   releaseCommand,
			"server":    serverCommand,
			"pooler":    poolerCommand,
			"ends-with": endsWithCommand,
		},
	}
}

type script struct {
	tb     testing.TB
	server *Server
	pooler *Pooler
	db     *Database
	held   *pgx.Conn
}

type scriptKey struct{}

func of(ts *testscript.TestScript) *script { return ts.Value(scriptKey{}).(*script) } // set in setUpScript

func setUpScript(env *testscript.Env) error {
	tb := env.T().(testing.TB) // documented for testscript.Run
	s := &script{tb: tb, server: Start(tb)}
	s.db = s.server.Database()
	env.Values[scriptKey{}] = s
	for file, password := range map[string]string{
		"owner-password": s.db.OwnerPassword.Reveal(), "stepca-password": s.db.RuntimePassword.Reveal(), "reports-password": s.db.ReportsPassword.Reveal(),
	} {
		if err := os.WriteFile(filepath.Join(env.WorkDir, file), []byte(password), 0o600); err != nil {
			return err
		}
	}
	for name, value := range map[string]string{
		"POSTGRES_HOST": s.db.Host, "POSTGRES_PORT": strconv.Itoa(int(s.db.Port)), "POSTGRES_SSLMODE": s.db.SSLMode,
		"PGBOUNCER_HOST": s.db.PoolerHost, "PGBOUNCER_PORT": strconv.Itoa(int(s.db.PoolerPort)),
		"POSTGRES_DB": s.db.Name, "POSTGRES_USER": s.db.Database.Owner,
		"POSTGRES_PASSWORD_FILE":   filepath.Join(env.WorkDir, "owner-password"),
		"STEP_CA_DB_PASSWORD_FILE": filepath.Join(env.WorkDir, "stepca-password"),
		"REPORTS_DB_PASSWORD_FILE": filepath.Join(env.WorkDir, "reports-password"),
		"MIGRATIONS":               Migrations(),
	} {
		env.Setenv(name, value)
	}
	return nil
}

func sqlCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: sql QUERY")
	}
	out, err := query(of(ts), args[0])
	ts.Check(err)
	_, err = fmt.Fprint(ts.Stdout(), out)
	ts.Check(err)
}

// query returns the rows of one statement, with a "|" between columns.
func query(s *script, statement string) (string, error) {
	conn := s.db.Owner(s.tb)
	defer conn.Close(s.tb.Context()) //nolint:errcheck // nothing is pending
	rows, err := conn.Query(s.tb.Context(), statement, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	var out strings.Builder
	for rows.Next() {
		for i, column := range rows.RawValues() {
			if i > 0 {
				out.WriteByte('|')
			}
			out.Write(column)
		}
		out.WriteByte('\n')
	}
	return out.String(), rows.Err()
}

func untilCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: until QUERY")
	}
	require.Eventually(of(ts).tb, func() bool {
		out, err := query(of(ts), args[0])
		ts.Check(err)
		return out == "t\n"
	}, 20*time.Second, 50*time.Millisecond, args[0])
}

func holdCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: hold TABLE")
	}
	s := of(ts)
	s.held = s.db.Owner(s.tb)
	for _, statement := range []string{"begin", "lock table " + args[0]} {
		_, err := s.held.Exec(s.tb.Context(), statement)
		ts.Check(err)
	}
}

func releaseCommand(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(of(ts).held.Close(context.Background()))
}

func serverCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: server stop|start|standby|recovery|primary|tls|log")
	}
	s := of(ts)
	switch args[0] {
	case "stop":
		s.server.Stop(s.tb)
	case "start":
		s.server.Restart(s.tb)
	case "standby":
		s.server.Standby(s.tb)
	case "recovery":
		s.server.Recovery(s.tb)
	case "primary":
		s.server.Primary(s.tb)
	case "tls":
		s.server.TLS(s.tb)
	case "log":
		_, err := fmt.Fprint(ts.Stdout(), s.server.Log(s.tb))
		ts.Check(err)
	default:
		ts.Fatalf("server: unknown %q", args[0])
	}
}

func poolerCommand(ts *testscript.TestScript, neg bool, args []string) {
	s := of(ts)
	switch {
	case !neg && len(args) > 0 && args[0] == "start":
		to := s.db.Database
		for _, setting := range args[1:] {
			switch name, value, _ := strings.Cut(setting, "="); name {
			case "POSTGRES_DB":
				to.Name = value
			case "POSTGRES_PORT":
				port, err := strconv.ParseUint(value, 10, 16)
				ts.Check(err)
				to.Port = uint16(port)
			default:
				ts.Fatalf("pooler: unknown %q", setting)
			}
		}
		s.pooler = s.db.poolerTo(s.tb, to, PoolerSizes, "")
	case !neg && len(args) == 1 && args[0] == "stop":
		s.pooler.Signal(s.tb, syscall.SIGTERM)
	default:
		ts.Fatalf("usage: pooler start [POSTGRES_DB=NAME] [POSTGRES_PORT=PORT] | pooler stop")
	}
}

// endsWithCommand compares all that a program says after its log, so that one
// line more is a difference too.
func endsWithCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: ends-with FILE")
	}
	var last strings.Builder
	for line := range strings.Lines(ts.ReadFile("stderr")) {
		if !strings.Contains(line, ": level=") {
			last.WriteString(line)
		}
	}
	want := os.Expand(ts.ReadFile(args[0]), ts.Getenv)
	if got := last.String(); got != want {
		ts.Fatalf("the end differs\n--- got\n%s--- want\n%s", got, want)
	}
}

// TLS restarts the server with a certificate that nobody trusts.
func (s *Server) TLS(tb testing.TB) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(tb, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(tb, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(tb, err)
	for name, block := range map[string]*pem.Block{
		"server.crt": {Type: "CERTIFICATE", Bytes: cert}, "server.key": {Type: "PRIVATE KEY", Bytes: der},
	} {
		require.NoError(tb, os.WriteFile(filepath.Join(s.dir, name), pem.EncodeToMemory(block), 0o600))
	}
	giveAway(tb, s.dir)
	s.Restart(tb, "ssl=on")
}

// ServeTLS restarts the server with postgres.crt and postgres.key of dir.
func (s *Server) ServeTLS(tb testing.TB, dir string) {
	tb.Helper()
	certificates := Readable(tb, dir)
	s.Restart(tb, "ssl=on", "ssl_cert_file="+filepath.Join(certificates, "postgres.crt"), "ssl_key_file="+filepath.Join(certificates, "postgres.key"))
}
