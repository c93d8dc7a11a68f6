//go:build unix

package main

import (
	"io/fs"
	"syscall"
)

// owned says whether a file has this owner and group; -1 stands for any.
func owned(info fs.FileInfo, uid, gid int) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && (uid < 0 || int(stat.Uid) == uid) && (gid < 0 || int(stat.Gid) == gid)
}
