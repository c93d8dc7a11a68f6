package main

import "io/fs"

// owned: files here have no owner that a number names.
func owned(fs.FileInfo, int, int) bool { return true }

// keepOwner does nothing: files have the owner of their directory.
func keepOwner(string, fs.FileInfo) error { return nil }
