package backup

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

// Source is what a backup is made of.
type Source struct {
	Owner      postgres.Login
	Parts      map[string]string // directories, by part
	Env        []byte            // the content of .env
	Recipients []age.Recipient
	Now        time.Time
}

// Create writes an archive to w. What it writes is opened again while it is written,
// and verified as Verify does.
func Create(ctx context.Context, w io.Writer, s Source) (*Manifest, error) {
	lock, err := s.Owner.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.Close(context.WithoutCancel(ctx)) //nolint:errcheck // the lock ends with the connection either way
	conn, err := s.Owner.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing was written through it
	// From here on nobody makes keys or renders files.
	if err := postgres.Lock(ctx, lock, postgres.Provisioning); err != nil {
		return nil, err
	}
	tx, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return nil, fmt.Errorf("reading the database: %w", err)
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) //nolint:errcheck // it only read
	if err := keepTables(ctx, lock, tx); err != nil {
		return nil, err
	}

	var fileKey []byte
	recipients := make([]age.Recipient, 0, len(s.Recipients))
	for _, r := range s.Recipients {
		recipients = append(recipients, listening{r, &fileKey})
	}
	reader, writer := io.Pipe()
	verified := make(chan error, 1)
	go func() {
		_, err := Verify(reader, []age.Identity{heard{&fileKey}})
		_ = reader.CloseWithError(err) // ends the writing, too
		verified <- err
	}()
	m, err := s.write(ctx, io.MultiWriter(w, writer), recipients, tx, func() error { return lock.Close(ctx) })
	_ = writer.CloseWithError(err) // a pipe always closes
	if failed := <-verified; failed != nil && (err == nil || errors.Is(err, failed)) {
		return nil, fmt.Errorf("verifying what was written: %w", failed)
	}
	return m, err
}

// keepTables keeps everybody from truncating or rewriting a table until tx is over. It has
// to come before tx takes its snapshot: whoever looks later finds such a table empty,
// whatever the snapshot (PostgreSQL 15, section 13.6, Caveats).
func keepTables(ctx context.Context, conn *pgx.Conn, tx pgx.Tx) error {
	rows, _ := conn.Query(ctx, `select quote_ident(nspname) || '.' || quote_ident(relname) from pg_class c join pg_namespace n on n.oid = relnamespace
		where relkind in ('r', 'p') and nspname in ('public', 'infra_pki')`) // CollectRows returns its error
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err == nil && len(names) > 0 {
		_, err = tx.Exec(ctx, "lock table "+strings.Join(names, ", ")+" in access share mode")
	}
	if err != nil {
		return fmt.Errorf("reading the database: %w", err)
	}
	return nil
}

// write writes an archive. unlock is called as soon as the files are read.
func (s Source) write(ctx context.Context, w io.Writer, recipients []age.Recipient, tx pgx.Tx, unlock func() error) (*Manifest, error) {
	m := &Manifest{Format: format, Taken: s.Now.UTC().Truncate(time.Second)}
	tables, err := listTables(ctx, tx) // the first statement takes the snapshot
	if err != nil {
		return nil, err
	}
	if err := m.describe(ctx, tx, tables); err != nil {
		return nil, err
	}
	files, err := s.files()
	if err != nil {
		return nil, err
	}
	if err := unlock(); err != nil {
		return nil, fmt.Errorf("unlocking: %w", err)
	}

	sealed, err := age.Encrypt(w, recipients...)
	if err != nil {
		return nil, fmt.Errorf("encrypting: %w", err)
	}
	// Certificates hardly get smaller by trying harder.
	packed, err := gzip.NewWriterLevel(sealed, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	a := &archiver{tar: tar.NewWriter(packed), at: m.Taken}
	a.entry(marker, 0o600, fmt.Appendf(nil, "{\"format\":%d}\n", format))
	for _, f := range files {
		sum := sha256.Sum256(f.data)
		m.Files = append(m.Files, File{Name: f.name, Mode: f.mode, Size: int64(len(f.data)), SHA256: hex.EncodeToString(sum[:])})
		a.entry("files/"+f.name, f.mode, f.data)
	}
	for _, t := range tables {
		p := &pieces{archiver: a, name: t.name(), sum: sha256.New()}
		if err := t.copyTo(ctx, tx, p); err != nil {
			return nil, err
		}
		p.flush()
		m.Tables = append(m.Tables, Table{Name: t.name(), Columns: t.Columns, Rows: p.rows, Size: p.size, SHA256: hex.EncodeToString(p.sum.Sum(nil))})
	}
	list, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	a.entry(manifest, 0o600, list)
	if err := errors.Join(a.err, a.tar.Close(), packed.Close(), sealed.Close()); err != nil {
		return nil, fmt.Errorf("writing the archive: %w", err)
	}
	return m, nil
}

// describe fills in what the database says of the CA.
func (m *Manifest) describe(ctx context.Context, tx pgx.Tx, tables []table) error {
	for _, needed := range []string{"infra_pki.root", "public.x509_certs", "public.ssh_certs"} {
		if !slices.ContainsFunc(tables, func(t table) bool { return t.name() == needed }) {
			return oneshot.WithHint(fmt.Errorf("reading the database: table %s is missing", needed), "db-migrate makes the schema: run it first")
		}
	}
	m.Position = &Position{}
	err := tx.QueryRow(ctx, `select coalesce((select fingerprint from infra_pki.root), ''), (select version from infra_pki.version),
		(select count(*) from public.x509_certs) + (select count(*) from public.ssh_certs),
		`+databaseQuery+`, pg_catalog.pg_current_snapshot()::text`).Scan(&m.Root, &m.Schema, &m.Certificates, &m.Position.Database, &m.Position.Snapshot)
	if err != nil {
		return fmt.Errorf("reading the database: %w", err)
	}
	if m.Root == "" {
		return oneshot.WithHint(errors.New("there is no CA yet: the database knows no root"), "\"make up\" makes one")
	}
	return nil
}

type content struct {
	name string // PART/NAME
	mode fs.FileMode
	data []byte
}

// files reads everything that is not the database.
func (s Source) files() ([]content, error) {
	files := []content{{Env, 0o600, s.Env}}
	for _, part := range append(append([]string{}, Volumes...), Operators...) {
		dir := s.Parts[part]
		err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
			if err != nil || file == dir {
				return err
			}
			// Hidden are what killed writers left, and what a version control needs. The
			// READMEs are the repository's.
			if strings.HasPrefix(d.Name(), ".") || d.Name() == "README.md" {
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			if d.IsDir() {
				return nil
			}
			relative, err := filepath.Rel(dir, file)
			if err != nil {
				return err
			}
			c, err := readFile(file, path.Join(part, filepath.ToSlash(relative)))
			if err == nil {
				files = append(files, c)
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", part, err)
		}
	}
	total := 0
	for _, f := range files {
		if total += len(f.data); total > maxFiles {
			return nil, fmt.Errorf("reading files: they have more than %d bytes", maxFiles)
		}
	}
	return files, nil
}

func readFile(file, name string) (content, error) {
	f, err := os.Open(file)
	if err != nil {
		return content{}, err
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	switch {
	case err != nil:
		return content{}, err
	case !info.Mode().IsRegular():
		return content{}, fmt.Errorf("%q is not a regular file", file)
	case partOf(name) == "":
		return content{}, fmt.Errorf("%q has a name that an archive cannot hold", file)
	case info.Size() > maxFile:
		return content{}, oneshot.WithHint(fmt.Errorf("%q has more than %d bytes", file, maxFile), "move away what does not belong there")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	return content{name, info.Mode().Perm(), data}, err
}

// archiver writes entries, until one fails.
type archiver struct {
	tar *tar.Writer
	at  time.Time
	err error
}

func (a *archiver) entry(name string, mode fs.FileMode, data []byte) {
	if a.err != nil {
		return
	}
	a.err = a.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(mode), Size: int64(len(data)), ModTime: a.at, Format: tar.FormatPAX})
	if a.err == nil {
		_, a.err = a.tar.Write(data)
	}
}

// pieces is a table on its way into the archive.
type pieces struct {
	*archiver
	name   string
	number int
	buffer []byte
	sum    hash.Hash
	rows   int64
	size   int64
}

func (p *pieces) Write(data []byte) (int, error) {
	p.sum.Write(data)
	p.size += int64(len(data))
	p.rows += int64(bytes.Count(data, []byte("\n"))) // COPY writes a line end inside a value as \n
	for rest := data; len(rest) > 0; {
		n := min(pieceSize-len(p.buffer), len(rest))
		p.buffer, rest = append(p.buffer, rest[:n]...), rest[n:]
		if len(p.buffer) == pieceSize {
			p.flush()
		}
	}
	return len(data), p.err
}

func (p *pieces) flush() {
	if len(p.buffer) == 0 && p.number > 0 {
		return
	}
	p.entry(fmt.Sprintf("tables/%s/%06d", p.name, p.number), 0o600, p.buffer)
	p.number, p.buffer = p.number+1, p.buffer[:0]
}
