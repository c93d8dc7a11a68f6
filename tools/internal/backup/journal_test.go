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
}

func newJournaled(t *testing.T) *journaled {
	t.Helper()
	server := postgrestest.Start(t)
	d, source, identity := sourceOn(t, server.Database())
	j := &journaled{server: server, d: d, source: source, identity: identity, dir: t.TempDir(), said: &lockedBuffer{}, stop: func() {}}
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
	files, err := filepath.Glob(filepath.Join(j.dir, "*"))
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
		Owner: postgres.Owner(d.Database, d.OwnerPassword, time.Minute), Parts: map[string]string{}, Migrations: postgrestest.Migrations(), Journal: j.dir,
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

// scribble is a transaction of one to three changes; one in five is rolled back.
func scribble(ctx context.Context, conn *pgx.Conn, worker int) error {
	tables := []string{"public.x509_certs_data", "public.ssh_hosts", "public.acme_challenges", "infra_pki.eab_required", "infra_pki.backups"}
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) //nolint:errcheck // after a commit there is nothing to roll back
	for range 1 + mathrand.IntN(3) {
		table := tables[mathrand.IntN(len(tables))]
		key := fmt.Sprintf("key %d", mathrand.IntN(20)) // of all workers
		value := make([]byte, mathrand.IntN(9000))      // large ones are stored apart
		_, _ = rand.Read(value)                         // never fails
		switch {
		case table == "infra_pki.backups":
			_, err = tx.Exec(ctx, "insert into infra_pki.backups (bytes, certificates) values ($1, $2)", 1+mathrand.IntN(2), worker)
			if mathrand.IntN(4) == 0 { // no key, and several rows that are alike
				_, err = tx.Exec(ctx, "update infra_pki.backups set taken_at = '2026-01-01' where ctid in (select ctid from infra_pki.backups where bytes = 1 limit 3)")
			} else if mathrand.IntN(4) == 0 {
				_, err = tx.Exec(ctx, "delete from infra_pki.backups where ctid in (select ctid from infra_pki.backups where bytes = 2 limit 3)")
			}
		case table == "infra_pki.eab_required":
			_, err = tx.Exec(ctx, "insert into infra_pki.eab_required (provisioner) values ($1) on conflict (provisioner) do update set since = now()", key)
		default:
			switch mathrand.IntN(6) {
			case 0:
				_, err = tx.Exec(ctx, "delete from "+table+" where nkey = $1", []byte(key))
			case 1: // the key alone: the value is not sent
				_, err = tx.Exec(ctx, "update "+table+" set nkey = $2 where nkey = $1 and not exists (select from "+table+" where nkey = $2)", []byte(key), fmt.Appendf(nil, "moved %d %d", worker, mathrand.IntN(5)))
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
	if mathrand.IntN(50) == 0 {
		if _, err := tx.Exec(ctx, "truncate public.ssh_hosts"); err != nil {
			return err
		}
	}
	if mathrand.IntN(5) == 0 {
		return tx.Rollback(ctx)
	}
	return tx.Commit(ctx)
}
