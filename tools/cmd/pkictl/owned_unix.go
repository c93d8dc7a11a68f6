//go:build unix

package main

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// owned says whether a file has this owner and group; -1 stands for any.
func owned(info fs.FileInfo, uid, gid int) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && (uid < 0 || int(stat.Uid) == uid) && (gid < 0 || int(stat.Gid) == gid)
}

// keepOwner gives a file that root has replaced back to its owner.
func keepOwner(path string, before fs.FileInfo) error {
	stat, ok := before.Sys().(*syscall.Stat_t)
	if !ok || os.Getuid() != 0 {
		return nil
	}
	if err := os.Lchown(path, int(stat.Uid), int(stat.Gid)); err != nil {
		return fmt.Errorf("keeping the owner: %w", err)
	}
	return nil
}
