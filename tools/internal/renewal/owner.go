//go:build unix

package renewal

import (
	"io/fs"
	"os"
	"syscall"
)

// chown gives path the owner that info has.
func chown(path string, info fs.FileInfo) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	return os.Chown(path, int(stat.Uid), int(stat.Gid))
}
