package backup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

// Follower writes a journal: it reads what is committed from a replication slot, and
// tells the slot so when it is on disk and not before. Whatever is killed when, the slot
// hands over again what was not.
type Follower struct {
	Owner      postgres.Login
	Dir        string
	Recipients []age.Recipient
	// Interval is how old a change may get before it is written.
	Interval time.Duration
	// State is a file whose time is when all that is older than Interval was written.
	State string
	Log   *slog.Logger
}

const (
	// The server gives up on whom it has not heard of for a minute (wal_sender_timeout).
	statusInterval = 5 * time.Second
	// What could not be done may be possible after that.
	retryInterval = 3 * time.Second
	gather        = time.Second
	// A segment ends with the transaction that reaches this.
	maxSegment = 64 << 20
)

// Run writes segments until ctx is done. Only what is wrong with the directory at the
// start is an error; anything else passes, or somebody makes it pass.
func (f *Follower) Run(ctx context.Context) error {
	if err := f.writable(); err != nil {
		return err
	}
	trouble := ""
	for {
		err := f.session(ctx, func() { trouble = "" })
		if ctx.Err() != nil {
			return nil //nolint:nilerr // it was told to end, and has written what it had
		}
		if reason := err.Error(); reason != trouble {
			attrs := []slog.Attr{slog.String("reason", reason)}
			for _, hint := range oneshot.Hints(err) {
				attrs = append(attrs, slog.String("hint", hint))
			}
			f.Log.LogAttrs(ctx, slog.LevelError, "not written", attrs...)
			trouble = reason
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryInterval):
		}
	}
}

func (f *Follower) writable() error {
	probe, err := durable.Begin(f.Dir, temporary)
	if err == nil {
		err = probe.Discard()
	}
	if err != nil {
		return oneshot.WithHint(err, "JOURNAL_DIR is the directory that the journal is written to: on the host, as root, install -d -o %d -g %d JOURNAL_DIR",
			os.Getuid(), os.Getgid())
	}
	return nil
}

// Follows refuses if the journal has fallen behind: state was not touched for as long as
// a few rounds take.
func Follows(state string, now time.Time) error {
	info, err := os.Stat(state)
	if err != nil {
		return oneshot.WithHint(errors.New("the journal has not been written yet"), `"docker compose logs journal" has the reason`)
	}
	if age := now.Sub(info.ModTime()); age > 6*statusInterval {
		return oneshot.WithHint(fmt.Errorf("the journal was last in step %s ago", age.Round(time.Second)), `"docker compose logs journal" has the reason`)
	}
	return nil
}

// session follows the database until something fails.
func (f *Follower) session(ctx context.Context, inStep func()) (err error) {
	conn, err := f.Owner.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing is pending
	repl, err := f.Owner.Replicate(ctx)
	if err != nil {
		return err
	}
	defer repl.Close(context.WithoutCancel(ctx)) //nolint:errcheck // what was not confirmed comes again
	begin, err := f.slot(ctx, conn, repl)
	if err != nil {
		return err
	}
	if err := conn.Close(ctx); err != nil {
		return err
	}
	err = pglogrepl.StartReplication(ctx, repl, slotOf(begin.Chain), pglogrepl.LSN(begin.From), pglogrepl.StartReplicationOptions{
		Mode: pglogrepl.LogicalReplication, PluginArgs: []string{"proto_version '1'", "publication_names '" + postgres.JournalPublication + "'"},
	})
	if err != nil {
		return fmt.Errorf("following the database: %w", err)
	}
	// The slot is ours alone, so nobody else writes these.
	if err := durable.Sweep(filepath.Join(f.Dir, temporary)); err != nil {
		return err
	}
	f.Log.LogAttrs(ctx, slog.LevelInfo, "following", slog.String("journal", begin.Chain), slog.String("from", begin.From.String()))
	s := &stream{Follower: f, conn: repl, begin: begin, confirmed: begin.From, relations: map[uint32]*pglogrepl.RelationMessage{}, inStep: inStep}
	err = s.follow(ctx)
	if ctx.Err() != nil && !s.inside { // stopped: what is there is written
		err = s.cut(context.WithoutCancel(ctx))
	}
	if s.segment != nil {
		err = errors.Join(err, s.segment.discard())
	}
	return err
}

func slotOf(chain string) string { return postgres.JournalSlots + strings.ToLower(chain) }

// slot finds the slot that this journal goes on with, and what its next segment begins
// with; or it begins a new journal, if there is none that has everything.
func (f *Follower) slot(ctx context.Context, conn *pgx.Conn, repl *pgconn.PgConn) (*segmentBegin, error) {
	begin := &segmentBegin{Journal: journalFormat}
	var level string
	var published bool
	var now pglogrepl.LSN
	err := conn.QueryRow(ctx, `select current_setting('wal_level'), coalesce((select fingerprint from infra_pki.root), ''), `+databaseQuery+`,
		exists (select from pg_publication where pubname = $1), pg_current_wal_flush_lsn()`, postgres.JournalPublication).
		Scan(&level, &begin.Root, &begin.Database, &published, &now)
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the database: %w", err)
	case level != "logical":
		return nil, oneshot.WithHint(fmt.Errorf("following the database: its wal_level is %q", level), "docker compose restart postgres: it has not read postgresql.conf since it says logical")
	case begin.Root == "":
		return nil, oneshot.WithHint(errors.New("there is no CA yet: the database knows no root"), "provisioner-init makes one")
	}
	if err := publish(ctx, conn, published); err != nil {
		return nil, err
	}
	// A run that was killed may have given a segment its name, and not more.
	if err := durable.SyncDir(f.Dir); err != nil {
		return nil, err
	}
	rows, _ := conn.Query(ctx, `select slot_name::text, coalesce(wal_status, 'lost') = 'lost' from pg_replication_slots
		where starts_with(slot_name, $1) and database = current_database() order by slot_name`, postgres.JournalSlots) // CollectRows returns its error
	slots, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct {
		Name string
		Lost bool
	}])
	if err != nil {
		return nil, fmt.Errorf("looking for the journal's slot: %w", err)
	}
	why := "there is none of this database"
	for i, slot := range slots {
		chain := strings.ToUpper(strings.TrimPrefix(slot.Name, postgres.JournalSlots))
		last, err := f.last(chain)
		switch {
		case err != nil:
			return nil, err
		case slot.Lost:
			why = "it was away for so long that the server dropped what it lacks (max_slot_wal_keep_size)"
		case !published:
			why = "its publication is gone"
		case last == 0:
			why = "its last segment is not in the directory"
		case last > lsn(now):
			why = "the database is older than its last segment"
		case i < len(slots)-1:
			why = "there is a later one"
		default:
			begin.Chain, begin.From = chain, last
			return begin, number(ctx, conn, begin)
		}
		if _, err := conn.Exec(ctx, "select pg_drop_replication_slot($1)", slot.Name); err != nil {
			return nil, oneshot.WithHint(fmt.Errorf("dropping the journal's slot: %w", err), "if it is in use: does another journal follow this database?")
		}
	}
	return begin, f.start(ctx, conn, repl, begin, why)
}

// last is where the last segment of a chain ends, 0 if there is none.
func (f *Follower) last(chain string) (lsn, error) {
	entries, err := os.ReadDir(f.Dir)
	if err != nil {
		return 0, fmt.Errorf("looking for the last segment: %w", err)
	}
	var last uint64
	for _, e := range entries {
		if m := segmentName.FindStringSubmatch(e.Name()); m != nil && m[1] == chain {
			end, err := strconv.ParseUint(m[3], 16, 64)
			if err != nil {
				return 0, fmt.Errorf("looking for the last segment: %w", err)
			}
			last = max(last, end)
		}
	}
	return lsn(last), nil
}

// number notes which transactions may be in earlier segments: all that have a number yet.
func number(ctx context.Context, conn *pgx.Conn, begin *segmentBegin) error {
	err := conn.QueryRow(ctx, "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint").Scan(&begin.Above)
	if err != nil {
		return fmt.Errorf("reading the database: %w", err)
	}
	return nil
}

// start makes a slot, and an empty segment by which a later run knows that it has
// everything since.
func (f *Follower) start(ctx context.Context, conn *pgx.Conn, repl *pgconn.PgConn, begin *segmentBegin, why string) error {
	at := time.Now().UTC()
	begin.Chain = at.Format(chainLayout)
	slot, err := pglogrepl.CreateReplicationSlot(ctx, repl, slotOf(begin.Chain), "pgoutput",
		pglogrepl.CreateReplicationSlotOptions{Mode: pglogrepl.LogicalReplication, SnapshotAction: "NOEXPORT_SNAPSHOT"})
	if err != nil {
		return fmt.Errorf("making the journal's slot: %w", err)
	}
	if err := begin.From.UnmarshalText([]byte(slot.ConsistentPoint)); err != nil {
		return fmt.Errorf("making the journal's slot: %w", err)
	}
	if err := number(ctx, conn, begin); err != nil {
		return err
	}
	w, err := newSegment(f.Dir, f.Recipients, *begin)
	if err != nil {
		return err
	}
	w.end.Through = at.Truncate(time.Second)
	if err := w.publish(); err != nil {
		return errors.Join(err, w.discard())
	}
	f.Log.LogAttrs(ctx, slog.LevelWarn, "a new journal begins, which goes with the backups from now on", slog.String("journal", begin.Chain),
		slog.String("reason", why), slog.String("hint", "make backup"))
	return nil
}

// publish makes the publication that the slot reads: each table that a backup has, also
// those that come later.
func publish(ctx context.Context, conn *pgx.Conn, published bool) error {
	if !published {
		if _, err := conn.Exec(ctx, "create publication "+postgres.JournalPublication+" for tables in schema public, infra_pki"); err != nil {
			return fmt.Errorf("making the journal's publication: %w", err)
		}
	}
	// A published table that has no key would refuse each update
	// (PostgreSQL 15, section 31.1, Publication).
	rows, _ := conn.Query(ctx, `select nspname, relname from pg_class c join pg_namespace n on n.oid = relnamespace
		where relkind = 'r' and nspname in ('public', 'infra_pki') and relreplident = 'd'
		  and not exists (select from pg_index where indrelid = c.oid and indisprimary)`) // CollectRows returns its error
	tables, err := pgx.CollectRows(rows, pgx.RowToStructByPos[struct{ Schema, Relation string }])
	for i := 0; err == nil && i < len(tables); i++ {
		_, err = conn.Exec(ctx, "alter table "+pgx.Identifier{tables[i].Schema, tables[i].Relation}.Sanitize()+" replica identity full")
	}
	if err != nil {
		return fmt.Errorf("making the journal's publication: %w", err)
	}
	return nil
}

// stream is a session once it follows.
type stream struct {
	*Follower
	conn      *pgconn.PgConn
	begin     *segmentBegin // of the next segment
	segment   *segmentWriter
	confirmed lsn // all before it is on disk
	relations map[uint32]*pglogrepl.RelationMessage
	inside    bool // a transaction has begun
	written   bool // and has a change that the journal keeps
	current   pglogrepl.BeginMessage
	inStep    func()
}

func (s *stream) follow(ctx context.Context) error {
	var status time.Time // the next one
	for {
		if s.due() && !s.inside {
			if err := s.cut(ctx); err != nil {
				return err
			}
		}
		if now := time.Now(); !now.Before(status) {
			// The answer is what tells that the server is there.
			if err := s.confirm(ctx, true); err != nil {
				return err
			}
			status = now.Add(statusInterval)
		}
		wait := status
		if s.segment != nil && !s.inside {
			if due := s.segment.since.Add(s.Interval); due.Before(wait) {
				wait = due
			}
		}
		waiting, cancel := context.WithDeadline(ctx, wait)
		message, err := s.conn.ReceiveMessage(waiting)
		cancel()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && pgconn.Timeout(err):
			continue
		case err != nil:
			return fmt.Errorf("following the database: %w", err)
		}
		if err := s.receive(ctx, message); err != nil {
			return err
		}
	}
}

// due tells whether the segment has to be written.
func (s *stream) due() bool {
	if s.segment == nil {
		return false
	}
	info, err := s.segment.file.Stat()
	return err != nil || info.Size() >= maxSegment || time.Since(s.segment.since) >= s.Interval
}

// cut writes what was committed, and only then tells the slot.
func (s *stream) cut(ctx context.Context) error {
	if s.segment == nil {
		return nil
	}
	if err := s.segment.publish(); err != nil {
		return oneshot.WithHint(err, "JOURNAL_DIR has no room, or cannot be written; nothing is lost as long as the database keeps it")
	}
	s.begin.From, s.confirmed = s.segment.end.End, s.segment.end.End
	s.segment = nil
	return s.confirm(ctx, false)
}

func (s *stream) confirm(ctx context.Context, ask bool) error {
	err := pglogrepl.SendStandbyStatusUpdate(ctx, s.conn, pglogrepl.StandbyStatusUpdate{
		WALWritePosition: pglogrepl.LSN(s.confirmed), WALFlushPosition: pglogrepl.LSN(s.confirmed), WALApplyPosition: pglogrepl.LSN(s.confirmed), ReplyRequested: ask,
	})
	if err != nil {
		return fmt.Errorf("following the database: %w", err)
	}
	return nil
}

func (s *stream) receive(ctx context.Context, message pgproto3.BackendMessage) error {
	var data []byte
	switch m := message.(type) {
	case *pgproto3.CopyData:
		data = m.Data
	case *pgproto3.ErrorResponse:
		return fmt.Errorf("following the database: %w", pgconn.ErrorResponseToPgError(m))
	case *pgproto3.CopyDone, *pgproto3.CommandComplete:
		return errors.New("following the database: the server ends")
	default:
		return nil // notices, parameters
	}
	if len(data) == 0 {
		return errors.New("following the database: an empty message")
	}
	switch data[0] {
	case pglogrepl.PrimaryKeepaliveMessageByteID:
		alive, err := pglogrepl.ParsePrimaryKeepaliveMessage(data[1:])
		if err != nil {
			return fmt.Errorf("following the database: %w", err)
		}
		return s.alive(ctx, alive)
	case pglogrepl.XLogDataByteID:
		log, err := pglogrepl.ParseXLogData(data[1:])
		if err != nil {
			return fmt.Errorf("following the database: %w", err)
		}
		change, err := pglogrepl.Parse(log.WALData)
		if err != nil {
			return fmt.Errorf("following the database: %w", err)
		}
		return s.change(change)
	}
	return fmt.Errorf("following the database: an unknown message %q", data[0])
}

// alive takes the server's word on how far everything has been handed over.
func (s *stream) alive(ctx context.Context, m pglogrepl.PrimaryKeepaliveMessage) error {
	if m.ReplyRequested && !s.inside {
		// It asks when it shuts down, and waits until it is told that all of it is on disk.
		if err := s.cut(ctx); err != nil {
			return err
		}
	}
	if s.segment == nil && !s.inside {
		// Nothing of ours is in what came since; the server need not keep it.
		s.confirmed = max(s.confirmed, lsn(m.ServerWALEnd))
	}
	if err := os.WriteFile(s.State, nil, 0o600); err != nil {
		return fmt.Errorf("recording that the journal is in step: %w", err)
	}
	s.inStep()
	if m.ReplyRequested {
		return s.confirm(ctx, false)
	}
	return nil
}

// The CRL is made anew each minute, from revocations that the journal has.
const leftOut = "public.x509_crl"

// keeps tells whether a table is one that a backup has, too.
func (s *stream) keeps(id uint32) (*pglogrepl.RelationMessage, bool, error) {
	relation, ok := s.relations[id]
	if !ok {
		return nil, false, fmt.Errorf("following the database: a change of the unknown table %d", id)
	}
	t := table{Schema: relation.Namespace, Relation: relation.RelationName}
	for _, c := range relation.Columns {
		t.Columns = append(t.Columns, c.Name)
	}
	return relation, t.name() != leftOut && t.known(), nil
}

func (s *stream) change(message pglogrepl.Message) error {
	switch m := message.(type) {
	case *pglogrepl.RelationMessage:
		s.relations[m.RelationID] = m
	case *pglogrepl.BeginMessage:
		s.inside, s.written, s.current = true, false, *m
	case *pglogrepl.CommitMessage:
		return s.commit(m)
	case *pglogrepl.InsertMessage:
		return s.row(opInsert, m.RelationID, nil, m.Tuple)
	case *pglogrepl.UpdateMessage:
		return s.row(opUpdate, m.RelationID, m.OldTuple, m.NewTuple)
	case *pglogrepl.DeleteMessage:
		return s.row(opDelete, m.RelationID, m.OldTuple, nil)
	case *pglogrepl.TruncateMessage:
		r := &record{Op: opTruncate}
		for _, id := range m.RelationIDs {
			relation, keeps, err := s.keeps(id)
			if err != nil {
				return err
			}
			if keeps {
				r.Tables = append(r.Tables, tableName(relation))
			}
		}
		if len(r.Tables) > 0 {
			return s.write(r)
		}
	}
	return nil // what it says of types and origins
}

func tableName(r *pglogrepl.RelationMessage) string { return r.Namespace + "." + r.RelationName }

// row writes what became of a row.
func (s *stream) row(op string, id uint32, before, after *pglogrepl.TupleData) error {
	relation, keeps, err := s.keeps(id)
	if err != nil || !keeps {
		return err
	}
	r := &record{Op: op, Table: tableName(relation)}
	if op != opDelete {
		if r.Row, err = values(relation, after, false); err != nil {
			return err
		}
	}
	if op != opInsert {
		if before == nil { // the key has not changed
			before = after
		}
		if r.Key, err = values(relation, before, true); err != nil {
			return err
		}
	}
	return s.write(r)
}

// values are the columns that a message has the values of; of the key alone, if that is asked for.
func values(relation *pglogrepl.RelationMessage, tuple *pglogrepl.TupleData, key bool) (map[string]*string, error) {
	const isKey = 1
	row := map[string]*string{}
	if tuple == nil || len(tuple.Columns) != len(relation.Columns) {
		return nil, fmt.Errorf("following the database: a row of table %s has other columns than the table", tableName(relation))
	}
	for i, column := range relation.Columns {
		if key && column.Flags&isKey == 0 {
			continue
		}
		switch value := tuple.Columns[i]; value.DataType {
		case pglogrepl.TupleDataTypeText:
			text := string(value.Data)
			row[column.Name] = &text
		case pglogrepl.TupleDataTypeNull:
			row[column.Name] = nil
		case pglogrepl.TupleDataTypeToast: // stays as it is
		default:
			return nil, fmt.Errorf("following the database: a value of kind %q", value.DataType)
		}
	}
	return row, nil
}

// write adds a change to the segment, and before the first one of a transaction that it
// begins.
func (s *stream) write(r *record) error {
	if !s.inside {
		return errors.New("following the database: a change of no transaction")
	}
	if s.segment == nil {
		w, err := newSegment(s.Dir, s.Recipients, *s.begin)
		if err != nil {
			return err
		}
		// As old as its first change. What is overdue, after a pause, is gathered for a moment.
		if gathered := time.Now().Add(min(gather, s.Interval) - s.Interval); s.current.CommitTime.Before(gathered) {
			w.since = gathered
		} else if s.current.CommitTime.Before(w.since) {
			w.since = s.current.CommitTime
		}
		s.segment = w
	}
	if !s.written {
		s.written = true
		number := widen(s.current.Xid, s.begin.Above)
		at := s.current.CommitTime.UTC()
		s.begin.Above = max(s.begin.Above, number+1)
		if err := s.segment.line(record{Op: opBegin, LSN: lsn(s.current.FinalLSN), Number: number, Time: &at}); err != nil {
			return err
		}
		s.segment.end.Through = at
	}
	return s.segment.line(r)
}

func (s *stream) commit(m *pglogrepl.CommitMessage) error {
	s.inside = false
	if !s.written {
		return nil
	}
	end := lsn(m.TransactionEndLSN)
	s.segment.end.End, s.segment.end.Transactions = end, s.segment.end.Transactions+1
	return s.segment.line(record{Op: opCommit, LSN: end})
}

// widen puts the upper half back to the number of a transaction, by one that is near.
func widen(number uint32, near uint64) uint64 {
	return uint64(int64(near) + int64(int32(number-uint32(near)))) //nolint:gosec // the difference is what counts, modulo 2^32
}
