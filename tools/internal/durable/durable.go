// Package durable writes files whole or not at all.
//
// A writer that is killed at any instant, or a machine that loses power, leaves
// either the old file or the new one, never a part. The sequence is
//
//	openat(dir/.name.RANDOM.tmp, O_CREAT|O_EXCL) write fchmod fsync close
//	rename or link to dir/name
//	fsync(dir)
//
// What a killed writer leaves behind is a .tmp file, which Sweep removes; so does
// the next write of the same name. Contents live in memory: these are keys and configuration.
package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Outcome says what was done to the file.
type Outcome string

// Outcomes of WriteIfChanged, and what its callers do to files that are not due any more.
const (
	Created   Outcome = "created"
	Updated   Outcome = "updated"
	Unchanged Outcome = "unchanged"
	Removed   Outcome = "removed"
)

// Compare says what WriteIfChanged would do, and writes nothing.
func Compare(path string, data []byte, mode fs.FileMode) (Outcome, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Created, nil
	}
	if err != nil {
		return "", fmt.Errorf("comparing: %w", err)
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("comparing: %q is not a regular file", path)
	}
	if info.Mode().Perm() != mode || info.Size() != int64(len(data)) {
		return Updated, nil
	}
	old, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("comparing: %w", err)
	}
	if !bytes.Equal(old, data) {
		return Updated, nil
	}
	return Unchanged, nil
}

// WriteIfChanged brings the file at path to data and mode. A file that already is
// so keeps its modification time.
func WriteIfChanged(path string, data []byte, mode fs.FileMode) (Outcome, error) {
	if err := Sweep(path); err != nil {
		return "", err
	}
	outcome, err := Compare(path, data, mode)
	if err != nil || outcome == Unchanged {
		return outcome, err
	}
	return outcome, place(path, data, mode, os.Rename)
}

// CreateExclusive writes a new file and fails with fs.ErrExist if there is one.
// It is for keys: they are made once and never replaced.
func CreateExclusive(path string, data []byte, mode fs.FileMode) error {
	if err := Sweep(path); err != nil {
		return err
	}
	// link(2), unlike rename(2), refuses an existing target.
	return place(path, data, mode, os.Link)
}

// Sweep removes what killed writers of the file left beside it. Nobody else may be
// writing it.
func Sweep(path string) error {
	dir, name := filepath.Split(path)
	stale, err := filepath.Glob(filepath.Join(dir, leftover(name)))
	if err != nil {
		return fmt.Errorf("looking for leftovers of %q: %w", path, err)
	}
	for _, s := range stale {
		// Unlinked and never opened for writing: it may be a hard link to the file
		// itself, of a CreateExclusive that was killed before its last step.
		if err := os.Remove(s); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing a leftover: %w", err)
		}
	}
	return nil
}

func leftover(name string) string { return "." + name + ".*.tmp" }

func place(path string, data []byte, mode fs.FileMode, publish func(from, to string) error) (err error) {
	dir, name := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	tmp, err := os.CreateTemp(dir, leftover(name)) // 0600 until fchmod
	if err != nil {
		return fmt.Errorf("writing %q: %w", path, cause(err))
	}
	defer func() {
		_ = tmp.Close()                                                            // already closed unless a step failed
		if e := os.Remove(tmp.Name()); e != nil && !errors.Is(e, fs.ErrNotExist) { // renamed: gone
			err = errors.Join(err, fmt.Errorf("removing a temporary file: %w", e))
		}
	}()
	if _, err := tmp.Write(data); err != nil {
		return fmt.Errorf("writing %q: %w", path, cause(err))
	}
	if err := tmp.Chmod(mode); err != nil {
		return fmt.Errorf("writing %q: %w", path, cause(err))
	}
	if err := tmp.Sync(); err != nil {
		return fmt.Errorf("writing %q: %w", path, cause(err))
	}
	if err := tmp.Close(); err != nil {
		return fmt.Errorf("writing %q: %w", path, cause(err))
	}
	if err := publish(tmp.Name(), path); err != nil {
		return fmt.Errorf("writing %q: %w", path, cause(err))
	}
	return SyncDir(dir)
}

// Rename puts a file that is whole in the place of another one in the same directory.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("writing %q: %w", to, cause(err))
	}
	return SyncDir(filepath.Dir(to))
}

// cause leaves out the name of the temporary file, which says nothing to anyone.
func cause(err error) error {
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case errors.As(err, &path):
		return path.Err
	case errors.As(err, &link):
		return link.Err
	}
	return err
}

// SyncDir makes the names in a directory last.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing directory: %w", err)
	}
	defer d.Close() //nolint:errcheck // nothing was written through this handle
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing directory: %w", err)
	}
	return nil
}
