package durable

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestStreamIsThereWholeOrNotAtAll(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	s, err := Begin(dir, "f")
	require.NoError(t, err)
	_, err = s.WriteString("content")
	require.NoError(t, err)
	require.NoFileExists(t, path)
	require.NoError(t, s.Publish(path, 0o640))
	require.NoError(t, s.Discard())
	requireAlone(t, path)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o640), info.Mode())

	other, err := Begin(dir, "f")
	require.NoError(t, err)
	require.ErrorIs(t, other.Publish(path, 0o640), fs.ErrExist)
	require.NoError(t, Sweep(path), "what a killed writer leaves")
	require.NoError(t, other.Discard())
	requireAlone(t, path)
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "content", string(data))

	_, err = Begin(filepath.Join(dir, "nowhere"), "f")
	require.ErrorIs(t, err, fs.ErrNotExist)
}
