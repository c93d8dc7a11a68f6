package main

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

// database is the server itself, past the pooler.
type database struct {
	db       config.Database
	password config.Secret
}

var (
	databaseUp     = desc("database_up", "Whether the role reports can log in to the database, past the pooler.")
	databaseSize   = desc("database_size_bytes", "Size of the database on disk.")
	databaseConns  = desc("database_connections", "Connections of clients to the database, by what they do.", "state")
	databaseMax    = desc("database_max_connections", "Connections that the server has room for.")
	databaseOldest = desc("database_oldest_transaction_seconds", "How long the oldest transaction has been open, 0 if none is.")
	databaseDamage = desc("database_checksum_failures_total", "Pages of the whole server that were read with a wrong checksum.")
	databaseWAL    = desc("database_wal_bytes", "Size of the write-ahead log on disk.")
	archiveFailing = desc("database_archive_failing", "Whether the last try to archive a segment of the write-ahead log failed.")
	databaseRows   = desc("database_rows", "Rows of a table of step-ca, as the server estimates them.", "table")
	databaseBytes  = desc("database_table_bytes", "Size of a table of step-ca on disk, with its indexes.", "table")
)

// The states that a connection of step-ca's is in, so that each is there with 0 too.
const connectionsByState = `
select s.state, count(a.pid)
from (values ('active'), ('idle'), ('idle in transaction'), ('idle in transaction (aborted)')) as s (state)
left join pg_stat_activity a on a.state = s.state and a.datname = current_database() and a.backend_type = 'client backend'
group by s.state`

// A count would read the whole table. Of the two estimates one forgets what was before a
// crash, and the other what came after the last vacuum.
const tables = `
select c.relname, greatest(s.n_live_tup, c.reltuples, 0)::float8, pg_total_relation_size(c.oid)
from pg_class c join pg_stat_user_tables s on s.relid = c.oid
where s.schemaname = 'public'`

// Before anything has been archived or has failed both times are null.
const server = `
select pg_database_size(current_database()),
  current_setting('max_connections')::int,
  coalesce((select extract(epoch from max(now() - xact_start)) from pg_stat_activity
            where backend_type = 'client backend' and pid <> pg_backend_pid()), 0)::float8,
  (select coalesce(sum(checksum_failures), 0)::bigint from pg_stat_database),
  (select coalesce(sum(size), 0)::bigint from pg_ls_waldir()),
  (select coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false) from pg_stat_archiver)`

func (d *database) collect(ctx context.Context, add emit) error {
	conn, err := postgres.Reports(d.db, d.password).Connect(ctx)
	add(databaseUp, prometheus.GaugeValue, number(err == nil))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing was written

	var size, slots, damage, wal int64
	var oldest float64
	var failing bool
	if err := conn.QueryRow(ctx, server).Scan(&size, &slots, &oldest, &damage, &wal, &failing); err != nil {
		return fmt.Errorf("reading the state of the server: %w", err)
	}
	add(databaseSize, prometheus.GaugeValue, float64(size))
	add(databaseMax, prometheus.GaugeValue, float64(slots))
	add(databaseOldest, prometheus.GaugeValue, oldest)
	add(databaseDamage, prometheus.CounterValue, float64(damage))
	add(databaseWAL, prometheus.GaugeValue, float64(wal))
	add(archiveFailing, prometheus.GaugeValue, number(failing))

	var name string
	var n int64
	rows, _ := conn.Query(ctx, connectionsByState) // ForEachRow returns its error
	if _, err := pgx.ForEachRow(rows, []any{&name, &n}, func() error {
		add(databaseConns, prometheus.GaugeValue, float64(n), name)
		return nil
	}); err != nil {
		return fmt.Errorf("counting the connections: %w", err)
	}
	var estimate float64
	rows, _ = conn.Query(ctx, tables) // as above
	if _, err := pgx.ForEachRow(rows, []any{&name, &estimate, &n}, func() error {
		add(databaseRows, prometheus.GaugeValue, estimate, name)
		add(databaseBytes, prometheus.GaugeValue, float64(n), name)
		return nil
	}); err != nil {
		return fmt.Errorf("measuring the tables: %w", err)
	}
	return nil
}

// backups is what "make backup" notes down after each success.
type backups struct {
	db       config.Database
	password config.Secret
}

var lastBackup = desc("backup_last_success_seconds", "When the last backup was taken, in seconds since 1970; 0 if there has been none.")

func (b *backups) collect(ctx context.Context, add emit) error {
	conn, err := postgres.Reports(b.db, b.password).Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing was written
	var at float64
	if err := conn.QueryRow(ctx, "select coalesce(extract(epoch from max(taken_at)), 0)::float8 from infra_pki.backups").Scan(&at); err != nil {
		return fmt.Errorf("looking for the last backup: %w", err)
	}
	add(lastBackup, prometheus.GaugeValue, at)
	return nil
}

// journal is how the journal follows the database ("pkictl backup journal").
type journal struct {
	db       config.Database
	password config.Secret
}

var (
	journalFollows = desc("journal_following", "Whether a journal follows the database.")
	journalBehind  = desc("journal_behind_bytes", "Write-ahead log that the journal has not on disk yet.")
	journalBegan   = desc("journal_began_seconds", "When the journal began, in seconds since 1970; 0 if there is none. It goes with backups since then.")
)

// The slot's name ends with when it was made. One that the server gave up has no place any more.
const journalQuery = `
select coalesce(bool_or(active), false), coalesce(min(pg_current_wal_lsn() - confirmed_flush_lsn), 0)::float8,
  coalesce(extract(epoch from max(to_timestamp(substr(slot_name, length($1) + 1), 'YYYYMMDD"t"HH24MISS"z"'))), 0)::float8
from pg_replication_slots
where starts_with(slot_name, $1) and database = current_database() and wal_status <> 'lost'`

func (j *journal) collect(ctx context.Context, add emit) error {
	conn, err := postgres.Reports(j.db, j.password).Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing was written
	var follows bool
	var behind, began float64
	if err := conn.QueryRow(ctx, journalQuery, postgres.JournalSlots).Scan(&follows, &behind, &began); err != nil {
		return fmt.Errorf("looking for the journal: %w", err)
	}
	add(journalFollows, prometheus.GaugeValue, number(follows))
	add(journalBehind, prometheus.GaugeValue, behind)
	add(journalBegan, prometheus.GaugeValue, began)
	return nil
}
