package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// Root is the fingerprint of the root CA that the database belongs to, "" if it
// has never known one.
func Root(ctx context.Context, conn *pgx.Conn) (string, error) {
	var fingerprint string
	err := conn.QueryRow(ctx, "select fingerprint from infra_pki.root").Scan(&fingerprint)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return "", fmt.Errorf("reading the recorded root: %w", said(err))
	}
	return fingerprint, nil
}

// RecordRoot binds the database to a root, for good. It is called once the root's
// key is safely on disk: a record without a key would forbid making one.
func RecordRoot(ctx context.Context, conn *pgx.Conn, fingerprint string) error {
	if _, err := conn.Exec(ctx, "insert into infra_pki.root (fingerprint) values ($1) on conflict do nothing", fingerprint); err != nil {
		return fmt.Errorf("recording root %s: %w", fingerprint, said(err))
	}
	recorded, err := Root(ctx, conn)
	if err != nil {
		return err
	}
	if recorded != fingerprint {
		return oneshot.WithHint(fmt.Errorf("recording root %s: the database belongs to root %s", fingerprint, recorded),
			"keys and database must come from the same CA: restore both from the same backup")
	}
	return nil
}

// HasCertificates tells whether a certificate was ever issued over this database,
// also by a CA from before there was a record of the root.
func HasCertificates(ctx context.Context, conn *pgx.Conn) (bool, error) {
	var issued bool
	err := conn.QueryRow(ctx, "select exists (select from public.x509_certs) or exists (select from public.ssh_certs)").Scan(&issued)
	if err != nil {
		return false, fmt.Errorf("looking for issued certificates: %w", said(err))
	}
	return issued, nil
}

// Work is something that one process does at a time on a database.
type Work int32

// What Lock can be asked for.
const (
	Migrating    Work = 1
	Provisioning Work = 2
)

// The first half of the key, so that nobody else's advisory locks are ours: "PKI".
const lockClass int32 = 0x504b49

// Lock waits until no other process does the same work, and keeps others from it
// until conn is closed. It tries again and again, where a blocking call would run
// into the role's statement_timeout.
func Lock(ctx context.Context, conn *pgx.Conn, work Work) error {
	for {
		var got bool
		err := conn.QueryRow(ctx, "select pg_try_advisory_lock($1, $2)", lockClass, int32(work)).Scan(&got)
		if got {
			return nil
		}
		if err == nil {
			select {
			case <-ctx.Done():
				err = ctx.Err()
			case <-time.After(firstDelay):
				continue
			}
		}
		if errors.Is(err, context.DeadlineExceeded) {
			return oneshot.WithHint(errors.New("waiting for another run of this program: it is still at work"),
				"if there is none, look for a session that holds an advisory lock in pg_locks")
		}
		return fmt.Errorf("waiting for another run of this program: %w", said(err))
	}
}
