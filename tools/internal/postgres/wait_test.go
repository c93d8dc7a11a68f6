package postgres

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

// What a test with a real server cannot bring about at will. The rest is in the
// scripts of db-wait.
func TestExplain(t *testing.T) {
	dial := func(err error) error {
		return fmt.Errorf("dial: %w", &net.OpError{Op: "dial", Net: "tcp", Err: err})
	}
	tests := map[string]struct {
		err     error
		reason  string
		passing bool
	}{
		"no route":                      {dial(os.NewSyscallError("connect", syscall.EHOSTUNREACH)), "no route to host", true},
		"no network yet":                {dial(os.NewSyscallError("connect", syscall.ENETUNREACH)), "network is unreachable", true},
		"a reset":                       {dial(os.NewSyscallError("read", syscall.ECONNRESET)), "connection reset by peer", true},
		"a silent end":                  {fmt.Errorf("receive: %w", io.ErrUnexpectedEOF), "the server closed the connection", true},
		"a name server that is away":    {dial(&net.DNSError{Err: "server misbehaving", Name: "postgres", IsTemporary: true}), `host name "postgres" cannot be resolved`, true},
		"a name that is not known":      {dial(&net.DNSError{Err: "no such host", Name: "postgres", IsNotFound: true}), `host name "postgres" cannot be resolved`, true},
		"no answer":                     {fmt.Errorf("receive: %w", context.DeadlineExceeded), "no answer in time", true},
		"starting up":                   {&pgconn.PgError{Code: "57P03", Message: "the database system is starting up"}, "the database system is starting up (SQLSTATE 57P03)", true},
		"too many connections":          {&pgconn.PgError{Code: "53300", Message: "sorry, too many clients already"}, "sorry, too many clients already (SQLSTATE 53300)", true},
		"out of memory":                 {&pgconn.PgError{Code: "53200", Message: "out of memory"}, "out of memory (SQLSTATE 53200)", true},
		"a standby that refuses":        {&pgconn.PgError{Code: "25006", Message: "read-only"}, "read-only (SQLSTATE 25006)", true},
		"no line in pg_hba.conf":        {&pgconn.PgError{Code: "28000", Message: "no pg_hba.conf entry"}, "no pg_hba.conf entry (SQLSTATE 28000)", false},
		"an answer never seen":          {&pgconn.PgError{Code: "XX000", Message: "odd"}, "odd (SQLSTATE XX000)", false},
		"a wrong password behind more":  {errors.Join(dial(syscall.ECONNREFUSED), &pgconn.PgError{Code: "28P01", Message: "no"}), "no (SQLSTATE 28P01)", false},
		"a certificate for another one": {&tls.CertificateVerificationError{Err: x509.HostnameError{Host: "postgres", Certificate: &x509.Certificate{DNSNames: []string{"db"}}}}, "x509: certificate is valid for db, not postgres", false},
		"a TLS alert":                   {&net.OpError{Op: "remote error", Err: tls.AlertError(42)}, "tls: bad certificate", false},
		"something that is not TLS":     {tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}, "tls: first record does not look like a TLS handshake", false},
		"anything else":                 {errors.New("never seen"), "never seen", false},
	}
	login := Runtime(config.Database{Name: "ca", SSLMode: "disable"}, "secret")
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			f := login.explain(tc.err)
			require.Equal(t, tc.reason, f.reason)
			require.Equal(t, tc.passing, f.passing)
		})
	}
}

func TestDelayGrowsToItsLimit(t *testing.T) {
	for attempt := range 40 {
		require.Less(t, delay(attempt), min(longestDelay, firstDelay<<min(attempt, 10))+1)
		require.GreaterOrEqual(t, int64(delay(attempt)), int64(0))
	}
}
