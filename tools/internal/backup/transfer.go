package backup

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

// An archive leaves the container that reads the volumes over its standard output and
// is stored by another one, which runs as the operator. The two do not see whether the
// other one ends well, so the archive travels in pieces, and its digest comes last.
const (
	piece = "piece"
	end   = "end"
)

// Receipt is what is said of an archive that is stored.
type Receipt struct {
	Name         string    `json:"name"` // of the file
	Taken        time.Time `json:"taken"`
	Root         string    `json:"root"`
	Certificates int64     `json:"certificates"`
	Bytes        int64     `json:"bytes"`
	SHA256       string    `json:"sha256"`
}

// Sender packs an archive for the way to Store.
type Sender struct {
	tar    *tar.Writer
	buffer *bufio.Writer
	sum    hash.Hash
	size   int64
}

// NewSender returns a Sender that writes to w.
func NewSender(w io.Writer) *Sender {
	s := &Sender{tar: tar.NewWriter(w), sum: sha256.New()}
	s.buffer = bufio.NewWriterSize(writerFunc(func(p []byte) (int, error) {
		if err := s.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: piece, Size: int64(len(p))}); err != nil {
			return 0, err
		}
		return s.tar.Write(p)
	}), 1<<20)
	return s
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func (s *Sender) Write(p []byte) (int, error) {
	s.sum.Write(p)
	s.size += int64(len(p))
	return s.buffer.Write(p)
}

// End says that the archive is whole. Without it nothing is stored.
func (s *Sender) End(m *Manifest) error {
	data, err := json.Marshal(Receipt{
		Name:  "infra-pki-" + m.Taken.Format("20060102T150405Z") + ".age",
		Taken: m.Taken, Root: m.Root, Certificates: m.Certificates, Bytes: s.size, SHA256: hex.EncodeToString(s.sum.Sum(nil)),
	})
	if err != nil {
		return err
	}
	if err := s.buffer.Flush(); err != nil {
		return err
	}
	if err := s.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: end, Size: int64(len(data))}); err != nil {
		return err
	}
	if _, err := s.tar.Write(data); err != nil {
		return err
	}
	return s.tar.Close()
}

// Store writes what a Sender sends into a new file in dir, whole or not at all.
func Store(r io.Reader, dir string) (receipt *Receipt, err error) {
	handle, err := os.Open(dir)
	if err != nil {
		return nil, oneshot.WithHint(fmt.Errorf("storing the backup: %w", err), "BACKUP_DIR is the directory that backups are written to: make it, for yourself alone")
	}
	defer handle.Close() //nolint:errcheck // nothing was written through this handle
	if err := lock(handle); err != nil {
		return nil, oneshot.WithHint(fmt.Errorf("storing the backup: another one is being written to %q", dir), "wait until it is done")
	}
	const temporary = "infra-pki"
	if err := durable.Sweep(filepath.Join(dir, temporary)); err != nil {
		return nil, err
	}
	tmp, err := durable.Begin(dir, temporary)
	if err != nil {
		return nil, fmt.Errorf("storing the backup: %w", err)
	}
	defer func() { err = errors.Join(err, tmp.Discard()) }()
	receipt, err = receive(r, tmp)
	if err != nil {
		return nil, err
	}
	if err := tmp.Sync(); err != nil {
		return nil, fmt.Errorf("storing the backup: %w", err)
	}
	if err := receipt.check(tmp.File); err != nil {
		return nil, err
	}
	if err := tmp.Publish(filepath.Join(dir, receipt.Name), 0o600); err != nil {
		return nil, fmt.Errorf("storing the backup: %w", err)
	}
	return receipt, nil
}

func receive(r io.Reader, w io.Writer) (*Receipt, error) {
	tooEarly := oneshot.WithHint(errors.New("storing the backup: what makes it ended too early, so nothing was stored"), "its own last lines say why")
	stream := tar.NewReader(r)
	for {
		header, err := stream.Next()
		switch {
		case err != nil:
			return nil, tooEarly
		case header.Name == piece:
			into := writerFunc(func(p []byte) (int, error) {
				n, err := w.Write(p)
				if err != nil {
					err = &storeError{err}
				}
				return n, err
			})
			if _, err := io.Copy(into, stream); err != nil { //nolint:gosec // G110: nothing is compressed here
				var ours *storeError
				if errors.As(err, &ours) {
					return nil, fmt.Errorf("storing the backup: %w", ours.err)
				}
				return nil, tooEarly
			}
		case header.Name == end:
			receipt := &Receipt{}
			if err := json.NewDecoder(stream).Decode(receipt); err != nil || filepath.Base(receipt.Name) != receipt.Name {
				return nil, tooEarly
			}
			if _, err := stream.Next(); !errors.Is(err, io.EOF) { // the sender writes to its end, too
				return nil, tooEarly
			}
			return receipt, nil
		default:
			return nil, tooEarly
		}
	}
}

// storeError is of the file and not of the stream.
type storeError struct{ err error }

func (e *storeError) Error() string { return e.err.Error() }

// check reads the file back.
func (r *Receipt) check(f *os.File) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("reading the backup back: %w", err)
	}
	sum := sha256.New()
	size, err := io.Copy(sum, f)
	if err != nil {
		return fmt.Errorf("reading the backup back: %w", err)
	}
	if size != r.Bytes || hex.EncodeToString(sum.Sum(nil)) != r.SHA256 {
		return errors.New("reading the backup back: it is not what was written")
	}
	return nil
}

// Record tells the database that a backup is stored, for whoever watches its age.
func Record(ctx context.Context, owner postgres.Login, r *Receipt) error {
	conn, err := owner.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // everything is committed or given up
	if _, err := conn.Exec(ctx, "insert into infra_pki.backups (taken_at, bytes, certificates) values ($1, $2, $3)", r.Taken, r.Bytes, r.Certificates); err != nil {
		return fmt.Errorf("recording the backup: %w", err)
	}
	return nil
}
