package backup

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// table is a table of the database.
type table struct {
	Schema, Relation string
	Columns, Key     []string
}

func (t table) name() string { return t.Schema + "." + t.Relation }

func (t table) quoted() string { return pgx.Identifier{t.Schema, t.Relation}.Sanitize() }

func quoted(columns []string) string {
	list := make([]string, 0, len(columns))
	for _, c := range columns {
		list = append(list, pgx.Identifier{c}.Sanitize())
	}
	return strings.Join(list, ", ")
}

// stepCA says that the table has the shape of step-ca's own, and can be made from its name.
func (t table) stepCA() bool {
	return t.Schema == "public" && slices.Equal(t.Columns, []string{"nkey", "nvalue"})
}

// known says that the table is one that comes back.
func (t table) known() bool {
	return knownTable.MatchString(t.name()) && (t.Schema != "public" || t.stepCA())
}

// What the migrations count is no data: a restore counts for itself.
const tablesQuery = `
select nspname, relname,
       array(select attname::text from pg_attribute
              where attrelid = c.oid and attnum > 0 and not attisdropped and attgenerated = '' order by attnum),
       array(select attname::text from pg_constraint k, unnest(conkey) with ordinality as part (number, place), pg_attribute a
              where conrelid = c.oid and contype = 'p' and attrelid = c.oid and attnum = part.number order by place)
  from pg_class c join pg_namespace n on n.oid = relnamespace
 where relkind in ('r', 'p') and nspname in ('public', 'infra_pki') and (nspname, relname) <> ('infra_pki', 'version')
 order by nspname collate "C", relname collate "C"`

// listTables finds every table of step-ca and of this project, and makes the
// transaction print values in one way whatever the server's settings are.
func listTables(ctx context.Context, tx pgx.Tx) ([]table, error) {
	for _, setting := range []string{"timezone = 'UTC'", "datestyle = 'ISO, YMD'", "bytea_output = 'hex'", "client_encoding = 'UTF8'"} {
		if _, err := tx.Exec(ctx, "set local "+setting); err != nil {
			return nil, fmt.Errorf("reading the database: %w", err)
		}
	}
	rows, err := tx.Query(ctx, tablesQuery)
	if err != nil {
		return nil, fmt.Errorf("reading the database: %w", err)
	}
	tables, err := pgx.CollectRows(rows, pgx.RowToStructByPos[table])
	if err != nil {
		return nil, fmt.Errorf("reading the database: %w", err)
	}
	for _, t := range tables {
		if !t.known() {
			return nil, oneshot.WithHint(fmt.Errorf("reading the database: table %s is not one of step-ca, and would not come back", t.name()),
				"move it to another schema or database; schema public belongs to step-ca")
		}
	}
	return tables, nil
}

// copyTo writes the rows as COPY's text, always in the same order.
func (t table) copyTo(ctx context.Context, tx pgx.Tx, w io.Writer) error {
	order := t.Key
	if len(order) == 0 {
		order = t.Columns
	}
	query := fmt.Sprintf("copy (select %s from %s order by %s) to stdout", quoted(t.Columns), t.quoted(), quoted(order))
	if _, err := tx.Conn().PgConn().CopyTo(ctx, w, query); err != nil {
		return fmt.Errorf("reading table %s: %w", t.name(), err)
	}
	return nil
}

// digest is SHA-256 of what copyTo writes.
func (t table) digest(ctx context.Context, tx pgx.Tx) (string, error) {
	sum := sha256.New()
	if err := t.copyTo(ctx, tx, sum); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// filled tells whether the table has a row.
func (t table) filled(ctx context.Context, tx pgx.Tx) (bool, error) {
	var filled bool
	err := tx.QueryRow(ctx, "select exists (select from "+t.quoted()+")").Scan(&filled)
	return filled, err
}
