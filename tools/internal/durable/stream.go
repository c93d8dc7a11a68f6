package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Stream is a new file that is too large for memory, or whose name is known last. It
// has no name until Publish gives it one, whole.
type Stream struct {
	*os.File
	dir string
}

// Begin starts a file in dir. What a killed writer leaves of it is for
// Sweep(dir/name).
func Begin(dir, name string) (*Stream, error) {
	tmp, err := os.CreateTemp(dir, leftover(name)) // 0600 until fchmod
	if err != nil {
		return nil, fmt.Errorf("writing into %q: %w", dir, cause(err))
	}
	return &Stream{File: tmp, dir: dir}, nil
}

// Publish makes it the file at path, which has to be in the same directory, and is on
// disk when it returns. It fails with fs.ErrExist if there is one already.
func (s *Stream) Publish(path string, mode fs.FileMode) error {
	for _, step := range []func() error{
		func() error { return s.Chmod(mode) },
		s.Sync,
		// link(2), unlike rename(2), refuses an existing target.
		func() error { return os.Link(s.Name(), path) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("writing %q: %w", path, cause(err))
		}
	}
	return SyncDir(s.dir)
}

// Discard takes the nameless file away; after Publish only the name that it had before.
func (s *Stream) Discard() error {
	_ = s.Close() // was synced before, if it is to stay
	if err := os.Remove(s.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing a temporary file: %w", err)
	}
	return nil
}
