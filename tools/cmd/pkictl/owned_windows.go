package main

import "io/fs"

// owned: files here have no owner that a number names.
func owned(fs.FileInfo, int, int) bool { return true }
