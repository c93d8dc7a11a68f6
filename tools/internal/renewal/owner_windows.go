package renewal

import "io/fs"

// chown does nothing: files have the owner of their directory.
func chown(string, fs.FileInfo) error { return nil }
