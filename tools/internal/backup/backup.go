// Package backup makes one encrypted archive of everything that a CA consists of,
// verifies it without restoring it, and restores it into an empty stack.
//
// An archive is a tar stream, compressed with gzip and encrypted with age
// (age-encryption.org/v1) to one or more recipients, so that "age -d FILE | tar xz"
// opens it where there is no program of this project. Its entries, in this order:
//
//	infra-pki-backup                the format's number
//	files/PART/NAME                 a file of a part: .env, the volumes, the operator's files
//	tables/SCHEMA.TABLE/000000      what COPY … TO STDOUT says, in pieces
//	manifest.json                   sizes, digests and rows of all of these
//
// The manifest comes last, since it is known last: nothing is ever held in memory
// but one file or one piece. age authenticates each 64 KiB, and the end.
//
// Files and tables belong together: the files are read under the lock that
// provisioner-init writes them under, and the tables in one snapshot of that moment.
package backup

import (
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const (
	format   = 1
	marker   = "infra-pki-backup"
	manifest = "manifest.json"

	pieceSize = 4 << 20
	// Keys, certificates and settings have a few KiB each.
	maxFile  = 4 << 20
	maxFiles = 64 << 20
	maxList  = 16 << 20 // the manifest, and what is kept of a table
)

// Env is the part that consists of .env alone.
const Env = "env"

// The parts of an archive that are directories.
const (
	RootCA       = "root-ca" // the volume
	Config       = "config"  // these three are in step-ca's home
	Secrets      = "secrets"
	Certs        = "certs"
	Provisioners = "provisioners.d" // these three are the operator's
	Templates    = "templates"
	TrustedRoots = "trusted-roots"
)

// Volumes are the parts that a restore writes into volumes, in this order. As long
// as the root certificate is missing provisioner-init refuses to work with a database
// that knows its root; so certs come last, and the root certificate last of them.
var Volumes = []string{RootCA, Config, Secrets, Certs}

// Operators are the parts that lie in the checkout, or where .env says.
var Operators = []string{Provisioners, Templates, TrustedRoots}

const rootCertificate = Certs + "/root_ca.crt"

// Manifest is what an archive says of itself.
type Manifest struct {
	Format       int       `json:"format"`
	Taken        time.Time `json:"taken"`
	Root         string    `json:"root"`               // SHA-256 of the root certificate
	Schema       int32     `json:"schema"`             // number of the last migration
	Certificates int64     `json:"certificates"`       // issued, TLS and SSH
	Position     *Position `json:"position,omitempty"` // nil in archives from before there were journals
	Files        []File    `json:"files"`
	Tables       []Table   `json:"tables"`
}

// File is a file in an archive.
type File struct {
	Name   string      `json:"name"` // PART/NAME
	Mode   fs.FileMode `json:"mode"`
	Size   int64       `json:"size"`
	SHA256 string      `json:"sha256"`
}

// Table is a table in an archive.
type Table struct {
	Name    string   `json:"name"` // SCHEMA.TABLE
	Columns []string `json:"columns"`
	Rows    int64    `json:"rows"`
	Size    int64    `json:"size"` // of COPY's text
	SHA256  string   `json:"sha256"`
}

// knownTable: names that need no escaping in a path.
var knownTable = regexp.MustCompile(`^(public|infra_pki)\.[A-Za-z_][A-Za-z0-9_]*$`)

// partOf returns the part that a file belongs to, "" if that is none or the name is
// not one that a backup gives.
func partOf(name string) string {
	if name == Env {
		return Env
	}
	part, rest, _ := strings.Cut(name, "/")
	if !fs.ValidPath(name) || rest == "" || strings.ContainsAny(name, "\\\x00") {
		return ""
	}
	for _, known := range append(append([]string{}, Volumes...), Operators...) {
		if part == known {
			return part
		}
	}
	return ""
}

const (
	hintDamaged = "nothing was changed; take another copy of this backup, or an older one"
	hintForeign = "nothing was changed; a backup is what \"make backup\" wrote, infra-pki-….age"
)

func damaged(err error) error {
	var other *notOurs
	if errors.As(err, &other) {
		return other.err
	}
	var known *refusal
	if errors.As(err, &known) {
		return err
	}
	return refuse(hintDamaged, "it is damaged or cut short: %w", err)
}

// refusal is why an archive is not taken. It goes through the readers unchanged.
type refusal struct{ err error }

func (r *refusal) Error() string { return "reading the archive: " + r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func refuse(hint, format string, args ...any) error {
	return oneshot.WithHint(&refusal{fmt.Errorf(format, args...)}, "%s", hint)
}

// notOurs is an error of whoever reads the rows, and says nothing of the archive.
type notOurs struct{ err error }

func (n *notOurs) Error() string { return n.err.Error() }
