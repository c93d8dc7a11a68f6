package backup_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/backup"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

// journaled is a CA whose database has a journal.
type journaled struct {
	server   *postgrestest.Server
	d        *postgrestest.Database
	source   backup.Source
	identity age.Identity
	dir      string
	follower *backup.Follower
	said     *lockedBuffer
	stop     func()

	migrations string // of the release that restores
}

func newJournaled(t *testing.T) *journaled {
	t.Helper()
	server := postgrestest.Start(t)
	d, source, identity := sourceOn(t, server.Database())
	j := &journaled{server: server, d: d, source: source, identity: identity, dir: t.TempDir(), said: &lockedBuffer{}, stop: func() {}, migrations: postgrestest.Migrations()}
	j.follower = &backup.Follower{
		Owner: source.Owner, Dir: j.dir, Recipients: source.Recipients, Interval: 100 * time.Millisecond,
		State: filepath.Join(t.TempDir(), "state"), Log: slog.New(slog.NewTextHandler(j.said, nil)),
	}
	t.Cleanup(func() {
		j.stop()
		if t.Failed() {
			t.Log(j.said.String())
		}
	})
	return j
}

type lockedBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.String()
}

// start runs the follower until stop, and waits until it follows.
func (j *journaled) start(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	before := strings.Count(j.said.String(), "msg=following")
	go func() { ended <- j.follower.Run(ctx) }()
	j.stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(t, <-ended)
	})
	j.await(t, func() bool { return strings.Count(j.said.String(), "msg=following") > before })
}

func (j *journaled) await(t *testing.T, what func() bool) {
	t.Helper()
	require.Eventually(t, what, 20*time.Second, 20*time.Millisecond)
}

// caughtUp waits until all that is committed now is on disk.
func (j *journaled) caughtUp(t *testing.T) {
	t.Helper()
	owner := j.d.Owner(t)
	var now string
	require.NoError(t, owner.QueryRow(t.Context(), "select pg_current_wal_insert_lsn()::text").Scan(&now))
	j.await(t, func() bool {
		var done bool
		require.NoError(t, owner.QueryRow(t.Context(), "select coalesce(bool_or(confirmed_flush_lsn >= $1::text::pg_lsn), false) from pg_replication_slots", now).Scan(&done))
		return done
	})
}

func (j *journaled) segments(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(j.dir, "journal-*"))
	require.NoError(t, err)
	slices.Sort(files)
	return files
}

// backup returns an archive.
func (j *journaled) backup(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	_, err := backup.Create(t.Context(), &out, j.source)
	require.NoError(t, err)
	return out.Bytes()
}

// restore brings an archive and the journal into another database and returns it.
func (j *journaled) restore(t *testing.T, archive []byte) (*postgrestest.Database, error) {
	t.Helper()
	name := "restored_" + strings.ToLower(rand.Text()[:10])
	_, err := j.d.Owner(t).Exec(t.Context(), "create database "+name)
	require.NoError(t, err)
	d := *j.d
	d.Name = name
	return &d, j.restoreInto(t, &d, archive, t.TempDir())
}

func (j *journaled) restoreInto(t *testing.T, d *postgrestest.Database, archive []byte, volumes string) error {
	t.Helper()
	target := backup.Target{
		Owner: postgres.Owner(d.Database, d.OwnerPassword, time.Minute), Parts: map[string]string{}, Migrations: j.migrations, Journal: j.dir,
		Log: j.follower.Log,
	}
	for _, part := range backup.Volumes {
		target.Parts[part] = filepath.Join(volumes, part)
		require.NoError(t, os.MkdirAll(target.Parts[part], 0o700))
	}
	_, err := backup.Restore(t.Context(), bytes.NewReader(archive), []age.Identity{j.identity}, target)
	return err
}

// contents is every row of every table that a backup has.
func contents(t *testing.T, d *postgrestest.Database) string {
	t.Helper()
	conn := d.Owner(t)
	rows, err := conn.Query(t.Context(), `select schemaname || '.' || tablename from pg_tables where schemaname in ('public', 'infra_pki') and tablename <> 'x509_crl' order by 1`)
	require.NoError(t, err)
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	var out strings.Builder
	for _, table := range tables {
		schema, name, _ := strings.Cut(table, ".")
		var all string
		err := conn.QueryRow(t.Context(), "select coalesce(string_agg(md5(t::text), ' ' order by t::text), '') from "+pgx.Identifier{schema, name}.Sanitize()+" t").Scan(&all)
		require.NoError(t, err)
		fmt.Fprintf(&out, "%s: %s\n", table, all)
	}
	return out.String()
}

// Whatever is committed while backups are made, connections break and the journal stops
// and starts: each backup with the journal becomes the database as it was at last.
func TestBackupAndJournalAreTheDatabase(t *testing.T) {
	j := newJournaled(t)
	j.start(t)
	const workers = 8
	var commits atomic.Int64
	working, enough := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for worker := range workers {
		conn := j.d.Owner(t)
		group.Go(func() {
			for working.Err() == nil {
				if err := scribble(working, conn, worker); err == nil {
					commits.Add(1)
				}
			}
		})
	}
	var archives [][]byte
	owner := j.d.Owner(t)
	for range 2 {
		time.Sleep(200 * time.Millisecond)
		archives = append(archives, j.backup(t))
		// Its connection breaks, as when the server or the network does.
		_, err := owner.Exec(t.Context(), "select pg_terminate_backend(active_pid) from pg_replication_slots where active")
		require.NoError(t, err)
		archives = append(archives, j.backup(t))
		j.stop()
		time.Sleep(100 * time.Millisecond)
		j.start(t)
	}
	enough()
	group.Wait()
	j.caughtUp(t)
	j.stop()
	t.Logf("%d transactions in %d segments", commits.Load(), len(j.segments(t)))
	require.Positive(t, commits.Load())
	want := contents(t, j.d)
	for _, archive := range archives {
		d, err := j.restore(t, archive)
		require.NoError(t, err)
		require.Equal(t, want, contents(t, d))
	}
}

// dice is one of 0 to n-1.
func dice(n int) int { return mathrand.IntN(n) } //nolint:gosec // G404: for a test

// scribble is a transaction of one to three changes; one in five is rolled back.
func scribble(ctx context.Context, conn *pgx.Conn, worker int) error {
	tables := []string{"public.x509_certs_data", "public.ssh_hosts", "public.acme_challenges", "infra_pki.eab_required", "infra_pki.backups"}
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) //nolint:errcheck // after a commit there is nothing to roll back
	for range 1 + dice(3) {
		table := tables[dice(len(tables))]
		key := fmt.Sprintf("key %d", dice(20)) // of all workers
		value := make([]byte, dice(9000))      // large ones are stored apart
		_, _ = rand.Read(value)                // never fails
		switch table {
		case "infra_pki.backups":
			_, err = tx.Exec(ctx, "insert into infra_pki.backups (bytes, certificates) values ($1, $2)", 1+dice(2), worker)
			if dice(4) == 0 { // no key, and several rows that are alike
				_, err = tx.Exec(ctx, "update infra_pki.backups set taken_at = '2026-01-01' where ctid in (select ctid from infra_pki.backups where bytes = 1 limit 3)")
			} else if dice(4) == 0 {
				_, err = tx.Exec(ctx, "delete from infra_pki.backups where ctid in (select ctid from infra_pki.backups where bytes = 2 limit 3)")
			}
		case "infra_pki.eab_required":
			_, err = tx.Exec(ctx, "insert into infra_pki.eab_required (provisioner) values ($1) on conflict (provisioner) do update set since = now()", key)
		default:
			switch dice(6) {
			case 0:
				_, err = tx.Exec(ctx, "delete from "+table+" where nkey = $1", []byte(key))
			case 1: // the key alone: the value is not sent
				_, err = tx.Exec(ctx, "update "+table+" set nkey = $2 where nkey = $1 and not exists (select from "+table+" where nkey = $2)", []byte(key), fmt.Appendf(nil, "moved %d %d", worker, dice(5)))
			case 2:
				_, err = tx.Exec(ctx, "update "+table+" set nvalue = null where nkey = $1", []byte(key))
			default:
				_, err = tx.Exec(ctx, "insert into "+table+" values ($1, $2) on conflict (nkey) do update set nvalue = excluded.nvalue", []byte(key), value)
			}
		}
		if err != nil {
			return err
		}
	}
	if dice(50) == 0 {
		if _, err := tx.Exec(ctx, "truncate public.ssh_hosts"); err != nil {
			return err
		}
	}
	if dice(5) == 0 {
		return tx.Rollback(ctx)
	}
	return tx.Commit(ctx)
}

// use commits a row.
func (j *journaled) use(t *testing.T, token string) {
	t.Helper()
	_, err := j.d.Owner(t).Exec(t.Context(), "insert into public.used_ott values (convert_to($1, 'UTF8'), 'used')", token)
	require.NoError(t, err)
}

func used(t *testing.T, d *postgrestest.Database) string {
	t.Helper()
	var all string
	require.NoError(t, d.Owner(t).QueryRow(t.Context(), "select coalesce(string_agg(convert_from(nkey, 'UTF8'), ' ' order by nkey), '') from public.used_ott").Scan(&all))
	return all
}

func TestNothingIsWrittenWhenNothingChanges(t *testing.T) {
	j := newJournaled(t)
	j.start(t)
	require.Len(t, j.segments(t), 1, "the empty one that a journal begins with")
	// The CRL is made anew each minute.
	_, err := j.d.Owner(t).Exec(t.Context(), "insert into public.x509_crl values ('crl', 'a list'); update public.x509_crl set nvalue = 'another'")
	require.NoError(t, err)
	j.caughtUp(t)
	// What no backup would have, and refuses.
	_, err = j.d.Owner(t).Exec(t.Context(), `create table public.notes (id int); insert into public.notes values (1); truncate public.notes; drop table public.notes`)
	require.NoError(t, err)
	j.caughtUp(t)
	require.Len(t, j.segments(t), 1)
	j.use(t, "a")
	j.caughtUp(t)
	require.Len(t, j.segments(t), 2)
	info, err := os.Stat(j.segments(t)[1])
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o644), info.Mode())
	require.NoError(t, backup.Follows(j.follower.State, time.Now()))
	require.ErrorContains(t, backup.Follows(j.follower.State, time.Now().Add(time.Minute)), "the journal was last in step 1m")
}

// PostgreSQL waits at its end until the journal has everything: it must not wait for the interval.
func TestServerThatStopsIsNotHeldUp(t *testing.T) {
	j := newJournaled(t)
	j.follower.Interval = time.Hour
	j.start(t)
	archive := j.backup(t)
	j.use(t, "a")
	time.Sleep(200 * time.Millisecond) // it may also be on its way, that is as good
	require.Len(t, j.segments(t), 1)
	begin := time.Now()
	j.server.Stop(t)
	require.Less(t, time.Since(begin), 10*time.Second)
	require.Len(t, j.segments(t), 2)
	j.server.Restart(t)
	j.await(t, func() bool { return strings.Count(j.said.String(), "msg=following") == 2 })
	j.use(t, "b")
	time.Sleep(200 * time.Millisecond)
	j.stop() // writes what it has
	require.Len(t, j.segments(t), 3)
	d, err := j.restore(t, archive)
	require.NoError(t, err)
	require.Equal(t, "a b", used(t, d))
}

// A journal that is switched off leaves nothing; one that runs is left alone.
func TestDropJournal(t *testing.T) {
	j := newJournaled(t)
	j.start(t)
	drop := func() string {
		var said bytes.Buffer
		require.NoError(t, postgres.DropJournal(t.Context(), j.d.Owner(t), slog.New(slog.NewTextHandler(&said, nil))))
		return said.String()
	}
	require.Contains(t, drop(), `level=WARN msg="a journal is being written, and COMPOSE_FILE names none"`)
	j.use(t, "a")
	j.caughtUp(t)
	j.stop()
	j.await(t, func() bool { return strings.Contains(drop(), `level=INFO msg=removed item="slot infra_pki_journal_`) })
	require.Empty(t, drop())
	var left int
	require.NoError(t, j.d.Owner(t).QueryRow(t.Context(), "select (select count(*) from pg_replication_slots) + (select count(*) from pg_publication)").Scan(&left))
	require.Zero(t, left)
}

// What a journal that ended in a bad moment leaves is not taken for what it is not.
func TestJournalsThatLackSomething(t *testing.T) {
	j := newJournaled(t)
	j.start(t)
	before := j.backup(t)
	for _, token := range []string{"a", "b", "c"} {
		j.use(t, token)
		j.caughtUp(t)
	}
	j.stop()
	segments := j.segments(t)
	require.Len(t, segments, 4)
	hidden := func(t *testing.T, path string) {
		t.Helper()
		away := filepath.Join(filepath.Dir(path), ".away-"+filepath.Base(path))
		require.NoError(t, os.Rename(path, away))
		t.Cleanup(func() { require.NoError(t, os.Rename(away, path)) })
	}
	base := filepath.Base
	refused := func(t *testing.T, archive []byte, why string) {
		t.Helper()
		d, err := j.restore(t, archive)
		require.EqualError(t, err, why)
		var tables int
		require.NoError(t, d.Owner(t).QueryRow(t.Context(), "select count(*) from pg_tables where schemaname in ('public', 'infra_pki')").Scan(&tables))
		require.Zero(t, tables, "nothing was changed")
	}

	t.Run("one in the middle", func(t *testing.T) {
		hidden(t, segments[2])
		refused(t, before, fmt.Sprintf("reading the journal: a segment is missing between %q and %q", base(segments[1]), base(segments[3])))
	})
	t.Run("the last one, which cannot be noticed", func(t *testing.T) {
		hidden(t, segments[3])
		d, err := j.restore(t, before)
		require.NoError(t, err)
		require.Equal(t, "a b", used(t, d))
	})
	t.Run("one that is there under another name", func(t *testing.T) {
		data, err := os.ReadFile(segments[1])
		require.NoError(t, err)
		other := filepath.Join(j.dir, strings.Replace(base(segments[1]), "-000000", "-100000", 1))
		require.NoError(t, os.WriteFile(other, data, 0o600))
		defer os.Remove(other) //nolint:errcheck // as above
		refused(t, before, fmt.Sprintf("reading the journal: %q: it is another segment than its name says", base(other)))
	})
	for name, damage := range map[string]func([]byte) []byte{
		"cut short": func(data []byte) []byte { return data[:len(data)-1] },
		"corrupted": func(data []byte) []byte { data[len(data)-40] ^= 1; return data },
	} {
		t.Run("one that is "+name, func(t *testing.T) {
			good, err := os.ReadFile(segments[2])
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(segments[2], damage(slices.Clone(good)), 0o644)) //nolint:gosec // as it is
			defer func() { require.NoError(t, os.WriteFile(segments[2], good, 0o644)) }()    //nolint:gosec // as it is
			refused(t, before, fmt.Sprintf("reading the journal: %q: it is damaged or cut short: failed to decrypt and authenticate payload chunk, file may be corrupted or tampered with", base(segments[2])))
		})
	}
	t.Run("of what is older than the backup nothing is needed", func(t *testing.T) {
		after := j.backup(t)
		for _, path := range segments[:3] {
			hidden(t, path)
		}
		d, err := j.restore(t, after)
		require.NoError(t, err)
		require.Equal(t, "a b c", used(t, d))
		refused(t, before, fmt.Sprintf("reading the journal: what was committed between the backup of %s and %q is missing",
			j.source.Now.UTC().Truncate(time.Second).Format(time.RFC3339), base(segments[3])))
	})

	t.Run("a restore that is killed goes on", func(t *testing.T) {
		volumes := t.TempDir()
		d, err := j.restore(t, before) // database and other volumes
		require.NoError(t, err)
		require.NoError(t, j.restoreInto(t, d, before, volumes))
		require.Contains(t, j.said.String(), "msg=unchanged item=database")
		j.use(t, "d")
		_, err = d.Owner(t).Exec(t.Context(), "comment on table infra_pki.root is null")
		require.NoError(t, err)
		require.ErrorContains(t, j.restoreInto(t, d, before, volumes), "the stack is not empty")
	})

	// While the journal is away the server drops what it lacks.
	owner := j.d.Owner(t)
	_, err := owner.Exec(t.Context(), "alter system set max_slot_wal_keep_size = '1MB'; ")
	require.NoError(t, err)
	_, err = owner.Exec(t.Context(), "select pg_reload_conf()")
	require.NoError(t, err)
	_, err = owner.Exec(t.Context(), "create table public.filler as select repeat(md5(i::text), 30) from generate_series(1, 20000) i")
	require.NoError(t, err)
	_, err = owner.Exec(t.Context(), "drop table public.filler")
	require.NoError(t, err)
	j.await(t, func() bool {
		_, err := owner.Exec(t.Context(), "checkpoint")
		require.NoError(t, err)
		var status string
		require.NoError(t, owner.QueryRow(t.Context(), "select wal_status from pg_replication_slots").Scan(&status))
		return status == "lost"
	})
	time.Sleep(time.Second) // a journal's name has no more than seconds
	j.start(t)
	require.Contains(t, j.said.String(), `reason="it was away for so long that the server dropped what it lacks (max_slot_wal_keep_size)" hint="make backup"`)
	j.use(t, "e")
	j.caughtUp(t)
	t.Run("it began anew after the backup", func(t *testing.T) {
		_, err := j.restore(t, before)
		require.ErrorContains(t, err, fmt.Sprintf("reading the journal: it began anew with %q, and lacks what was committed since ", base(j.segments(t)[4])))
	})
	t.Run("and before the next one", func(t *testing.T) {
		d, err := j.restore(t, j.backup(t))
		require.NoError(t, err)
		require.Equal(t, "a b c d e", used(t, d))
	})
	t.Run("of another database, which the CA was restored into", func(t *testing.T) {
		d, err := j.restore(t, before[:0])
		require.Error(t, err)
		again := *j
		again.source.Owner = postgres.Owner(d.Database, d.OwnerPassword, time.Minute)
		without := again
		without.dir = ""
		require.NoError(t, without.restoreInto(t, d, before, t.TempDir()))
		refused(t, again.backup(t), "reading the journal: it is of another database than the backup of "+j.source.Now.UTC().Truncate(time.Second).Format(time.RFC3339))
	})
	t.Run("of another CA", func(t *testing.T) {
		other := newJournaled(t)
		other.follower.Dir, other.follower.Recipients = t.TempDir(), j.source.Recipients
		other.start(t)
		other.stop()
		d, err := j.restore(t, before[:0])
		require.Error(t, err)
		other.dir, other.identity = other.follower.Dir, j.identity
		require.ErrorContains(t, other.restoreInto(t, d, before, t.TempDir()), fmt.Sprintf("reading the journal: %q is of the CA with root ", base(other.segments(t)[0])))
	})
	t.Run("none at all", func(t *testing.T) {
		d, err := j.restore(t, before[:0])
		require.Error(t, err)
		empty := *j
		empty.dir = t.TempDir()
		require.EqualError(t, empty.restoreInto(t, d, before, t.TempDir()), fmt.Sprintf("reading the journal: %q holds no segment", empty.dir))
	})
}

// A release with another schema came between the backup and the loss.
func TestJournalGoesThroughMigrations(t *testing.T) {
	j := newJournaled(t)
	j.start(t)
	owner := j.d.Owner(t)
	archive := j.backup(t)
	j.use(t, "a")
	var version int
	require.NoError(t, owner.QueryRow(t.Context(), "select version from infra_pki.version").Scan(&version))
	migrations := t.TempDir()
	require.NoError(t, os.CopyFS(migrations, os.DirFS(postgrestest.Migrations())))
	next := filepath.Join(migrations, fmt.Sprintf("%03d_note.sql", version+1))
	require.NoError(t, os.WriteFile(next, []byte(`
		alter table infra_pki.backups add column note text not null default 'none';
		create table infra_pki.notes (note text primary key);
		insert into infra_pki.notes values ('made by a migration');
		update public.x509_certs set nvalue = 'migrated';
	`), 0o600))
	passwords := postgres.Passwords{Runtime: j.d.RuntimePassword, Reports: j.d.ReportsPassword}
	require.NoError(t, postgres.Migrate(t.Context(), owner, migrations, passwords, slog.New(slog.DiscardHandler)))
	_, err := owner.Exec(t.Context(), "insert into infra_pki.backups (bytes, certificates, note) values (1, 1, 'new'); insert into infra_pki.notes values ('another')")
	require.NoError(t, err)
	j.use(t, "b")
	j.caughtUp(t)
	j.stop()
	_, err = j.restore(t, archive)
	require.EqualError(t, err, fmt.Sprintf("the archive's schema is at version %d, this release knows %d", version+1, version))
	j.migrations = migrations
	d, err := j.restore(t, archive)
	require.NoError(t, err)
	require.Equal(t, contents(t, j.d), contents(t, d))
}
