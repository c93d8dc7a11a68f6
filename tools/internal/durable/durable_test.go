package durable

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestWriteIfChanged(t *testing.T) {
	long := time.Now().Add(-time.Hour).Truncate(time.Second)
	tests := map[string]struct {
		before   func(t *testing.T, path string)
		want     Outcome
		keepTime bool
	}{
		"a missing file is created":               {func(*testing.T, string) {}, Created, false},
		"an equal file is not touched":            {put("new", 0o640), Unchanged, true},
		"another content is replaced":             {put("old", 0o640), Updated, false},
		"a half-written file is replaced":         {put("ne", 0o640), Updated, false},
		"an empty file is replaced":               {put("", 0o640), Updated, false},
		"another mode alone is put right":         {put("new", 0o600), Updated, false},
		"what a killed writer left is cleared up": {half, Created, false},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "f")
			tc.before(t, path)
			if _, err := os.Stat(path); err == nil {
				require.NoError(t, os.Chtimes(path, long, long))
			}
			planned, err := Compare(path, []byte("new"), 0o640)
			require.NoError(t, err)
			require.Equal(t, tc.want, planned)

			got, err := WriteIfChanged(path, []byte("new"), 0o640)
			require.NoError(t, err)
			require.Equal(t, tc.want, got)
			data, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, "new", string(data))
			info, err := os.Stat(path)
			require.NoError(t, err)
			require.Equal(t, fs.FileMode(0o640), info.Mode())
			require.Equal(t, tc.keepTime, info.ModTime().Equal(long))
			requireAlone(t, path)
		})
	}
}

func TestWriteRefusesWhatIsNotARegularFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "link")
	require.NoError(t, os.Symlink("/etc/passwd", path))
	_, err := WriteIfChanged(path, []byte("x"), 0o600)
	require.EqualError(t, err, `comparing: "`+path+`" is not a regular file`)
}

func TestCreateExclusive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	require.NoError(t, CreateExclusive(path, []byte("first"), 0o400))
	require.ErrorIs(t, CreateExclusive(path, []byte("second"), 0o400), fs.ErrExist)
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "first", string(data))
	requireAlone(t, path)
}

// A leftover may be a hard link to the key itself (killed between link and
// unlink), so clearing it up must unlink it and never open it for writing.
func TestLeftoverThatIsALinkToTheKeyDoesNotHarmTheKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(path, []byte("key"), 0o600))
	require.NoError(t, os.Link(path, filepath.Join(filepath.Dir(path), ".key.1.tmp")))
	require.ErrorIs(t, CreateExclusive(path, []byte("other"), 0o400), fs.ErrExist)
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "key", string(data))
	requireAlone(t, path)
}

func TestFailedWriteChangesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "d")
	require.NoError(t, os.MkdirAll(filepath.Join(path, "full"), 0o700))
	require.Error(t, CreateExclusive(path, []byte("x"), 0o600))
	requireAlone(t, path)
}

func put(content string, mode fs.FileMode) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		t.Helper()
		require.NoError(t, os.WriteFile(path, []byte(content), mode))
	}
}

func half(t *testing.T, path string) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(filepath.Dir(path), ".f.123.tmp"), []byte("half"), 0o600))
}

func requireAlone(t *testing.T, path string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, entries, 1)
	require.Equal(t, filepath.Base(path), entries[0].Name())
}
