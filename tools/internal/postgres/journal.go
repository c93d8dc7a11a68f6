package postgres

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	// JournalSlots begins the names of the replication slots of journals ("pkictl backup
	// journal"); when the journal began follows.
	JournalSlots = "infra_pki_journal_"
	// JournalPublication is the publication that they read.
	JournalPublication = "infra_pki_journal"
)

// Replicate logs in for logical replication. Values come in one way whatever the
// server's settings are. The caller closes the connection.
func (l Login) Replicate(ctx context.Context) (*pgconn.PgConn, error) {
	cfg, err := l.config()
	if err != nil {
		return nil, l.refused(l.explain(err))
	}
	for name, value := range map[string]string{
		"replication": "database", "timezone": "UTC", "datestyle": "ISO, YMD", "bytea_output": "hex", "client_encoding": "UTF8",
	} {
		cfg.RuntimeParams[name] = value
	}
	conn, err := pgconn.ConnectConfig(ctx, &cfg.Config)
	if err != nil {
		return nil, l.refused(l.explain(err))
	}
	return conn, nil
}

// DropJournal drops what a journal that was switched off leaves behind: a slot keeps the
// write-ahead log for a reader that never comes again.
func DropJournal(ctx context.Context, conn *pgx.Conn, log *slog.Logger) error {
	rows, _ := conn.Query(ctx, `select slot_name::text, active from pg_replication_slots
		where starts_with(slot_name, $1) and database = current_database() order by slot_name`, JournalSlots) // CollectRows returns its error
	slots, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct {
		Name   string
		Active bool
	}])
	if err != nil {
		return fmt.Errorf("looking for the journal's slot: %w", said(err))
	}
	for _, slot := range slots {
		if slot.Active {
			log.LogAttrs(ctx, slog.LevelWarn, "a journal is being written, and COMPOSE_FILE names none", slog.String("slot", slot.Name),
				slog.String("hint", "docker compose up -d --remove-orphans"))
			return nil
		}
		if _, err := conn.Exec(ctx, "select pg_drop_replication_slot($1)", slot.Name); err != nil {
			return fmt.Errorf("dropping the journal's slot: %w", said(err))
		}
		log.LogAttrs(ctx, slog.LevelInfo, "removed", slog.String("item", "slot "+slot.Name))
	}
	if _, err := conn.Exec(ctx, "drop publication if exists "+JournalPublication); err != nil {
		return fmt.Errorf("dropping the journal's publication: %w", said(err))
	}
	return nil
}
