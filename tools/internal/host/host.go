// Package host is the record of what "pkictl join" did to this machine. join writes
// it, renew works through it, status reports on it, and leave undoes what it says.
//
// The record holds no secret. It is JSON, so that a person can read it.
package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
)

// Dir is where the record and the trust anchors of a host lie.
const Dir = "/etc/infra-pki"

// Files in Dir, or in the directory that --dir names instead.
const (
	recordName = "host.json"
	rootName   = "root_ca.crt"     // the CA's roots, PEM
	userCAName = "ssh_user_ca.pub" // TrustedUserCAKeys of sshd
)

// Record is what a host is to its CA.
type Record struct {
	CAURL       string `json:"ca_url"`
	Fingerprint string `json:"fingerprint"` // of the root: SHA-256 of its DER, lower hex
	Trust       bool   `json:"trust"`       // join installed the root into the machine's trust stores
	SSH         *SSH   `json:"ssh,omitempty"`
	TLS         []TLS  `json:"tls,omitempty"`
	Schedule    string `json:"schedule,omitempty"` // what runs renew: "systemd", "cron", or nothing
}

// SSH is the part of sshd.
type SSH struct {
	Names  []string `json:"names"`            // principals of the host certificates
	Keys   []string `json:"keys"`             // private host keys; the certificate of KEY is KEY-cert.pub
	DropIn string   `json:"drop_in"`          // in sshd_config.d
	Config string   `json:"config,omitempty"` // of sshd; its own default if empty
}

// TLS is one TLS certificate with its key.
type TLS struct {
	Names  []string `json:"names"` // SANs
	Cert   string   `json:"cert"`  // chain, leaf first, PEM
	Key    string   `json:"key"`
	Owner  string   `json:"owner,omitempty"`  // of both files, USER or USER:GROUP; root if empty
	Mode   string   `json:"mode,omitempty"`   // of the key, octal; 0600 if empty
	Reload string   `json:"reload,omitempty"` // shell command to run when they changed
	// ReloadPending: "join" has still to run it.
	ReloadPending bool `json:"reload_pending,omitempty"`
}

// ErrNotJoined says that there is no record.
var ErrNotJoined = errors.New("this host has not joined a CA")

// Load reads the record in dir. Without one the error is ErrNotJoined.
func Load(dir string) (Record, error) {
	var r Record
	path := filepath.Join(dir, recordName)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, fmt.Errorf("reading %q: %w", path, ErrNotJoined)
	}
	if err != nil {
		return r, fmt.Errorf("reading the host's record: %w", err)
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("reading %q: %w", path, err)
	}
	return r, nil
}

// Encode is the content of the record's file.
func (r Record) Encode() ([]byte, error) {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("writing the host's record: %w", err)
	}
	return append(data, '\n'), nil
}

// Save writes the record to dir, whole or not at all.
func (r Record) Save(dir string) (durable.Outcome, error) {
	data, err := r.Encode()
	if err != nil {
		return "", err
	}
	return durable.WriteIfChanged(Path(dir), data, 0o644)
}

// Path is where the record lies, Root the CA's roots, UserCA the keys that sign user
// certificates.
func Path(dir string) string   { return filepath.Join(dir, recordName) }
func Root(dir string) string   { return filepath.Join(dir, rootName) }
func UserCA(dir string) string { return filepath.Join(dir, userCAName) }

// Cert is the certificate of an SSH host key.
func (s SSH) Cert(key string) string { return key + "-cert.pub" }
