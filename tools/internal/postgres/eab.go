package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// EABRequired lists the ACME provisioners whose accounts the database lets order only
// if an external account key names them, in the order of their names.
func EABRequired(ctx context.Context, conn *pgx.Conn) ([]string, error) {
	rows, err := conn.Query(ctx, "select provisioner from infra_pki.eab_required order by provisioner")
	if err == nil {
		var names []string
		if names, err = pgx.CollectRows(rows, pgx.RowTo[string]); err == nil {
			return names, nil
		}
	}
	return nil, fmt.Errorf("reading which provisioners demand an external account key: %w", said(err))
}

// RequireEAB makes EABRequired exactly these. For one that was there before, nothing
// changes: accounts from before it demanded a key may still order.
func RequireEAB(ctx context.Context, conn *pgx.Conn, provisioners []string) error {
	if provisioners == nil {
		provisioners = []string{} // nil is NULL, and equals nothing
	}
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "delete from infra_pki.eab_required where provisioner <> all($1)", provisioners); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "insert into infra_pki.eab_required (provisioner) select unnest($1::text[]) on conflict do nothing", provisioners)
		return err
	})
	if err != nil {
		return fmt.Errorf("recording which provisioners demand an external account key: %w", said(err))
	}
	return nil
}
