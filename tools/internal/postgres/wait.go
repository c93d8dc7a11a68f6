package postgres

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const (
	// A try that takes longer than this will not succeed; the next one may.
	tryTimeout = 10 * time.Second
	// Delays double from the first to the longest.
	firstDelay   = 100 * time.Millisecond
	longestDelay = 3 * time.Second
	// The same reason is logged again after this long, as a sign of life.
	remindAfter = 5 * time.Second
)

// fault is why the database cannot be used.
type fault struct {
	reason  string
	hint    string
	passing bool // waiting may help
}

func (f *fault) Error() string { return f.reason }

// Wait connects until every one of ready accepts the connection, and returns it.
// What time will not heal (a wrong password, say) ends the wait at once; for
// anything else it tries again until timeout has passed.
func (l Login) Wait(ctx context.Context, timeout time.Duration, log *slog.Logger, ready ...func(context.Context, *pgx.Conn) error) (*pgx.Conn, error) {
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	start := time.Now()
	var last *fault
	var said time.Time
	for attempt := 0; ; attempt++ {
		conn, f := l.try(limited, ready)
		switch {
		case f == nil:
			return conn, nil
		case ctx.Err() != nil:
			return nil, fmt.Errorf("waiting for %s: interrupted", l)
		case !f.passing:
			return nil, l.refused(f)
		}
		// A try that the deadline cut short tells less than the one before it.
		if last == nil || limited.Err() == nil {
			if last == nil || f.reason != last.reason || time.Since(said) >= remindAfter {
				log.LogAttrs(ctx, slog.LevelInfo, "waiting", slog.String("reason", f.reason),
					slog.Duration("elapsed", time.Since(start).Round(100*time.Millisecond)))
				said = time.Now()
			}
			last = f
		}
		select {
		case <-limited.Done():
		case <-time.After(delay(attempt)):
		}
		if limited.Err() != nil && ctx.Err() == nil {
			return nil, hinted(fmt.Errorf("waiting for %s: not ready after %s: %w", l, timeout, last), last.hint)
		}
	}
}

func (l Login) try(ctx context.Context, ready []func(context.Context, *pgx.Conn) error) (*pgx.Conn, *fault) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	conn, err := l.dial(ctx)
	if err != nil {
		return nil, l.explain(err)
	}
	for _, check := range ready {
		if err := check(ctx, conn); err != nil {
			_ = conn.Close(ctx) // the reason is err
			return nil, l.explain(err)
		}
	}
	return conn, nil
}

// delay is "full jitter": replicas that lost the database at the same moment do
// not come back at the same moment.
func delay(attempt int) time.Duration {
	ceiling := min(longestDelay, firstDelay<<min(attempt, 10))
	return rand.N(ceiling) //nolint:gosec // spreads load, hides nothing
}

func (l Login) refused(f *fault) error {
	return hinted(fmt.Errorf("connecting to %s: %w", l, f), f.hint)
}

func hinted(err error, hint string) error {
	if hint == "" {
		return err
	}
	return oneshot.WithHint(err, "%s", hint)
}

// Writable refuses a standby, which answers reads and would fail step-ca's first write.
func Writable(ctx context.Context, conn *pgx.Conn) error {
	var standby, readOnly bool
	if err := conn.QueryRow(ctx, "select pg_is_in_recovery(), current_setting('transaction_read_only')::bool").Scan(&standby, &readOnly); err != nil {
		return err
	}
	switch {
	case standby:
		return &fault{reason: "the server is a read-only standby", hint: hintPrimary, passing: true}
	case readOnly:
		return &fault{reason: "the server is read-only (default_transaction_read_only)", hint: hintPrimary, passing: true}
	}
	return nil
}

const (
	hintPrimary = "POSTGRES_HOST must name the primary"
	hintServer  = `is the server running? "docker compose ps postgres" and "docker compose logs postgres" tell; POSTGRES_HOST and POSTGRES_PORT say where it is looked for`
	hintDB      = "POSTGRES_DB is read once, when the database is first made: put the old name back, or create a database of the new name"
	hintPooler  = `PostgreSQL itself is ready; "docker compose ps pgbouncer" and "docker compose logs pgbouncer" tell why it is not passed on, PGBOUNCER_HOST and PGBOUNCER_PORT say where pgbouncer is looked for`
	hintTLS     = "POSTGRES_SSLMODE says how the connection is protected, and the server must be set up for the same"
)

// explain turns whatever came out of the driver into a reason, a verdict and a way out.
func (l Login) explain(err error) *fault {
	var known *fault
	if errors.As(err, &known) {
		return known
	}
	f := l.explainFailure(err)
	if l.pooled && f.hint == hintServer {
		f.hint = hintPooler
	}
	return f
}

func (l Login) explainFailure(err error) *fault {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		if l.pooled && pg.Code == "08P01" {
			return explainPooler(pg)
		}
		return l.explainAnswer(pg)
	}
	var (
		dns          *net.DNSError
		errno        syscall.Errno
		verification *tls.CertificateVerificationError
		unknownCA    x509.UnknownAuthorityError
		alert        tls.AlertError
		record       tls.RecordHeaderError
		network      net.Error
	)
	switch {
	// The driver has no name for this one (pgconn, startTLS).
	case strings.Contains(err.Error(), "server refused TLS connection"):
		return &fault{reason: "the server does not speak TLS", hint: hintTLS}
	case errors.As(err, &verification), errors.As(err, &unknownCA), errors.As(err, &alert), errors.As(err, &record):
		return &fault{reason: innermost(err).Error(), hint: hintTLS}
	case errors.As(err, &dns):
		return &fault{reason: fmt.Sprintf("host name %q cannot be resolved", dns.Name), hint: hintServer, passing: true}
	case errors.Is(err, context.DeadlineExceeded), pgconn.Timeout(err):
		return &fault{reason: "no answer in time", hint: hintServer, passing: true}
	case errors.As(err, &errno):
		return &fault{reason: errno.Error(), hint: hintServer, passing: true}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &fault{reason: "the server closed the connection", hint: hintServer, passing: true}
	case errors.As(err, &network):
		return &fault{reason: innermost(err).Error(), hint: hintServer, passing: true}
	}
	return &fault{reason: innermost(err).Error()}
}

// explainPooler judges what PgBouncer 1.18 itself says. It has one code for everything,
// so the text is what there is.
func explainPooler(pg *pgconn.PgError) *fault {
	f := &fault{reason: "pgbouncer: " + pg.Message, passing: true, hint: hintPooler}
	switch {
	case strings.HasPrefix(pg.Message, "no such database"):
		f.passing, f.hint = false, `pgbouncer was started for another POSTGRES_DB: "docker compose up -d pgbouncer"`
	case strings.Contains(pg.Message, "authentication failed"), strings.HasPrefix(pg.Message, "no such user"):
		// It reads a new file of users by itself, but not at once.
		f.hint = `pgbouncer has other verifiers than PostgreSQL: db-migrate writes them, and "docker compose restart pgbouncer" has them read`
	case strings.Contains(pg.Message, "max_client_conn"):
		f.hint = "DB_MAX_CLIENTS says how many connections pgbouncer takes"
	case strings.HasPrefix(pg.Message, "query_wait_timeout"):
		f.hint = "no connection to PostgreSQL was free in time: DB_POOL_SIZE says how many pgbouncer has"
	}
	return f
}

// explainAnswer judges what the server itself said.
func (l Login) explainAnswer(pg *pgconn.PgError) *fault {
	f := &fault{reason: answer{pg}.Error()}
	switch pg.Code {
	case "28P01": // wrong password, or no such role
		f.hint = fmt.Sprintf("STEP_CA_DB_PASSWORD is not the password that role %q has: db-migrate sets it, run that first", l.role)
		if l.role != config.RuntimeRole {
			f.hint = fmt.Sprintf(`the database keeps the user and the password that it was made with, POSTGRES_USER and POSTGRES_PASSWORD are read that once: put the old values back, or set the new password with "docker compose exec postgres psql -U %s -d %s" and \password`, l.role, l.db.Name)
		}
	case "28000": // no line in pg_hba.conf, or a role that may not log in
		f.hint = fmt.Sprintf("either role %q may not log in, or pg_hba.conf has no line for it, this address and POSTGRES_SSLMODE=%s", l.role, l.db.SSLMode)
	case "3D000":
		f.hint = hintDB
	case "42501":
		f.hint = fmt.Sprintf("role %q gets its privileges from db-migrate: run that first", l.role)
		if l.role != config.RuntimeRole {
			f.hint = "POSTGRES_USER must be the superuser that the database was made with"
		}
	case "57P03", // starting up, shutting down, in recovery
		"57P01", "57P02", // shut down, or crashed, under the connection
		"57014", // cancelled, by a timeout too
		"55P03": // a lock not had in time
		f.passing, f.hint = true, `"docker compose logs postgres" tells what the server is doing`
	case "25006":
		f.passing, f.hint = true, hintPrimary
	case "53300": // of the server or of the role
		f.passing, f.hint = true, "max_connections in postgres/postgresql.conf and the limits in postgres/migrations/roles.sql say how many there may be"
	default:
		// 08 connection exceptions, 53 out of some resource
		f.passing = strings.HasPrefix(pg.Code, "08") || strings.HasPrefix(pg.Code, "53")
	}
	return f
}

// answer is a server's refusal without its severity, which is always the same.
type answer struct{ pg *pgconn.PgError }

func (a answer) Error() string { return fmt.Sprintf("%s (SQLSTATE %s)", a.pg.Message, a.pg.Code) }
func (a answer) Unwrap() error { return a.pg }

// said is err, or what the server said, without the words of the libraries between.
func said(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return answer{pg}
	}
	return err
}

// innermost is the error without what the driver says around it: addresses, which
// differ from try to try, and nothing that helps.
func innermost(err error) error {
	for {
		var inner error
		switch e := err.(type) { //nolint:errorlint // walks the layers itself
		case interface{ Unwrap() error }:
			inner = e.Unwrap()
		case interface{ Unwrap() []error }:
			if all := e.Unwrap(); len(all) > 0 {
				inner = all[0]
			}
		}
		if inner == nil {
			return err
		}
		err = inner
	}
}
