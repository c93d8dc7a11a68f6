package backup

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// replay does to the tables what the journal says. They have to be as the archive is, so
// each change has to find exactly the row that it changed. migrate brings the schema to
// a version.
func (j *Journal) replay(ctx context.Context, tx pgx.Tx, migrate func(version int32) error) error {
	p := &replayer{conn: tx.Conn().PgConn(), prepared: map[string]string{}}
	var at time.Time
	var migrated bool
	return j.each(func(r *record) error {
		if r.Op == opBegin {
			at, migrated = *r.Time, false
			if version, ok := j.schemas[r.LSN]; ok {
				migrated = true
				return migrate(version)
			}
		}
		if migrated {
			return nil // what the migration did to the rows, it has done again
		}
		if err := p.apply(ctx, r); err != nil {
			return fmt.Errorf("replaying what was committed at %s: %w", at.UTC().Format(time.RFC3339), err)
		}
		return nil
	})
}

// replayer runs one statement for each record. Values go to the server as the text that
// they came as.
type replayer struct {
	conn     *pgconn.PgConn
	prepared map[string]string // names, by statement
}

func (p *replayer) apply(ctx context.Context, r *record) error {
	schema, relation, _ := strings.Cut(r.Table, ".")
	into := pgx.Identifier{schema, relation}.Sanitize()
	s := &statement{}
	switch r.Op {
	case opInsert:
		names := columns(r.Row)
		s.text = "insert into " + into + " (" + quoted(names) + ") values (" + strings.Join(s.values(names, r.Row), ", ") + ")"
	case opUpdate:
		names := columns(r.Row)
		var set []string
		for i, value := range s.values(names, r.Row) {
			set = append(set, quoted(names[i:i+1])+" = "+value)
		}
		s.text = "update " + into + " set " + strings.Join(set, ", ") + " where " + s.row(into, r.Key)
	case opDelete:
		s.text = "delete from " + into + " where " + s.row(into, r.Key)
	case opTruncate:
		var names []string
		for _, t := range r.Tables {
			schema, relation, _ := strings.Cut(t, ".")
			names = append(names, pgx.Identifier{schema, relation}.Sanitize())
		}
		_, err := p.conn.Exec(ctx, "truncate "+strings.Join(names, ", ")).ReadAll()
		return err
	default:
		return nil
	}
	name, ok := p.prepared[s.text]
	if !ok {
		name = "replay" + strconv.Itoa(len(p.prepared))
		if _, err := p.conn.Prepare(ctx, name, s.text, nil); err != nil {
			return fmt.Errorf("table %s: %w", r.Table, err)
		}
		p.prepared[s.text] = name
	}
	result := p.conn.ExecPrepared(ctx, name, s.parameters, nil, nil).Read()
	if result.Err != nil {
		return fmt.Errorf("table %s: %w", r.Table, result.Err)
	}
	if n := result.CommandTag.RowsAffected(); n != 1 {
		return fmt.Errorf("table %s: %s found %d rows, where there was one", r.Table, r.Op, n)
	}
	return nil
}

// statement is SQL with its parameters.
type statement struct {
	text       string
	parameters [][]byte
}

// values returns the places of the values of columns.
func (s *statement) values(names []string, row map[string]*string) (places []string) {
	for _, name := range names {
		var value []byte // null
		if text := row[name]; text != nil {
			value = []byte(*text)
		}
		s.parameters = append(s.parameters, value)
		places = append(places, "$"+strconv.Itoa(len(s.parameters)))
	}
	return places
}

// row finds a row by its key; where a table has none the key is the whole row, and one
// like it is as good.
func (s *statement) row(of string, key map[string]*string) string {
	var known, null []string
	for _, name := range columns(key) {
		if key[name] == nil {
			null = append(null, quoted([]string{name})+" is null")
		} else {
			known = append(known, name)
		}
	}
	var conditions []string
	for i, place := range s.values(known, key) {
		conditions = append(conditions, quoted(known[i:i+1])+" = "+place)
	}
	return "ctid = (select ctid from " + of + " where " + strings.Join(slices.Concat(conditions, null), " and ") + " limit 1)"
}
