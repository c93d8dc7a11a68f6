//go:build unix

package backup

import (
	"os"
	"syscall"
)

// lock takes what one process has at a time, until it is closed.
func lock(f *os.File) error {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}
