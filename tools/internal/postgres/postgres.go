// Package postgres is step-ca's database as the programs here see it: how to log
// in, whether waiting helps, what the schema must be, and which root it belongs to.
package postgres

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

// RuntimeDSN is the data source in ca.json. It holds no password: step-ca's driver
// takes that from passfile, which PassfileLine fills.
//
// The driver prepares statements by default, and another client of the pooler would
// find them, or not find its own: "exec" prepares none.
func RuntimeDSN(db config.Database, passfile string) string {
	return dsn(db, config.RuntimeRole, url.Values{
		"application_name": {"step-ca"}, "passfile": {passfile}, "default_query_exec_mode": {"exec"},
	})
}

// PassfileLine is the line by which RuntimeDSN finds the password.
func PassfileLine(db config.Database, password config.Secret) string {
	escape := strings.NewReplacer(`\`, `\\`, ":", `\:`).Replace
	return strings.Join([]string{
		escape(db.Host), strconv.Itoa(int(db.Port)), escape(db.Name), config.RuntimeRole, escape(password.Reveal()),
	}, ":") + "\n"
}

func dsn(db config.Database, role string, params url.Values) string {
	params.Set("sslmode", db.SSLMode)
	// The driver has no limit of its own; a step-ca that starts while the host is
	// gone would hang.
	params.Set("connect_timeout", "5")
	u := url.URL{
		Scheme:   "postgresql",
		User:     url.User(role),
		Host:     net.JoinHostPort(db.Host, strconv.Itoa(int(db.Port))),
		Path:     "/" + db.Name,
		RawQuery: params.Encode(),
	}
	return u.String()
}

// Login is a role with its password.
type Login struct {
	db       config.Database
	role     string
	password config.Secret
	params   map[string]string
	pooled   bool
}

// Runtime is the login of step-ca's role at the server itself: what a session has (a
// lock, a prepared statement) holds.
func Runtime(db config.Database, password config.Secret) Login {
	return Login{db: db, role: config.RuntimeRole, password: password}
}

// Pooled is the login of step-ca, through the pooler and with step-ca's own parameters.
func Pooled(db config.Database, password config.Secret) Login {
	return Login{db: db.Pooler(), role: config.RuntimeRole, password: password, pooled: true}
}

// Reports is the login of the role that may only read, at the server itself.
func Reports(db config.Database, password config.Secret) Login {
	return Login{db: db, role: config.ReportsRole, password: password}
}

// Owner is the login of the owner, who waits for a lock no longer than lockTimeout.
func Owner(db config.Database, password config.Secret, lockTimeout time.Duration) Login {
	return Login{db: db, role: db.Owner, password: password, params: map[string]string{
		// step-ca's role may create objects in schema public. Looked up there, a
		// function of its making would run with the owner's rights (CVE-2018-1058).
		"search_path": "pg_catalog",
		// A statement that waits for a table makes step-ca's queries wait behind it.
		"lock_timeout": strconv.FormatInt(lockTimeout.Milliseconds(), 10),
	}}
}

// Connect logs in, once. The caller closes the connection.
func (l Login) Connect(ctx context.Context) (*pgx.Conn, error) {
	conn, err := l.dial(ctx)
	if err != nil {
		return nil, l.refused(l.explain(err))
	}
	return conn, nil
}

func (l Login) dial(ctx context.Context) (*pgx.Conn, error) {
	cfg, err := l.config()
	if err != nil {
		return nil, err
	}
	return pgx.ConnectConfig(ctx, cfg)
}

func (l Login) config() (*pgx.ConnConfig, error) {
	params := url.Values{"application_name": {"infra-pki"}}
	if l.pooled {
		params.Set("default_query_exec_mode", "exec")
	}
	cfg, err := pgx.ParseConfig(dsn(l.db, l.role, params))
	if err != nil {
		return nil, err
	}
	cfg.Password = l.password.Reveal() // never part of a string that an error may quote
	for name, value := range l.params {
		cfg.RuntimeParams[name] = value
	}
	return cfg, nil
}

// String names the way in, without the password.
func (l Login) String() string {
	where := "at"
	if l.pooled {
		where = "through pgbouncer at"
	}
	return fmt.Sprintf("database %q %s %s as %q", l.db.Name, where, net.JoinHostPort(l.db.Host, strconv.Itoa(int(l.db.Port))), l.role)
}
