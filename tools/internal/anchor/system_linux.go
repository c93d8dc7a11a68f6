package anchor

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/smallstep/truststore"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// bundles are the files that programs read, by the directory into which truststore
// puts a root (it goes by what there is, in this order).
var bundles = map[string]string{
	"/etc/pki/ca-trust/source/anchors":          "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", // RHEL, Fedora
	"/usr/local/share/ca-certificates":          "/etc/ssl/certs/ca-certificates.crt",                // Debian, Ubuntu, Alpine
	"/usr/share/pki/trust/anchors":              "/var/lib/ca-certificates/ca-bundle.pem",            // SUSE
	"/etc/ca-certificates/trust-source/anchors": "/etc/ssl/certs/ca-certificates.crt",                // Arch
}

// system is the trust store of a Linux distribution: a directory for roots, and a
// command that makes the bundle of them.
type system struct {
	anchors, bundle string
	command         []string
}

func systemStore() store {
	dir := filepath.Dir(truststore.SystemTrustFilename)
	return system{anchors: dir, bundle: bundles[dir], command: truststore.SystemTrustCommand}
}

func (s system) where() string { return s.bundle }

func (s system) absent() error {
	const advice = "install the package ca-certificates"
	if s.bundle == "" {
		return oneshot.WithHint(errors.New("this machine has no directory for roots of its own"), advice)
	}
	if command := s.command[0]; !installed(command) {
		return oneshot.WithHint(fmt.Errorf("%s is missing", command), advice)
	}
	return nil
}

// installed finds administrators' commands too, which are not on everybody's PATH.
func installed(command string) bool {
	if _, err := exec.LookPath(command); err == nil {
		return true
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if _, err := os.Stat(filepath.Join(dir, command)); err == nil {
			return true
		}
	}
	return false
}

// find looks into the bundle, and then among what we once put into the directory.
func (s system) find(_ context.Context, fingerprint string) (*x509.Certificate, bool, error) {
	data, err := os.ReadFile(s.bundle)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, fmt.Errorf("reading the system's bundle: %w", err)
	}
	if cert, err := find(data, fingerprint); cert != nil || err != nil {
		return cert, err == nil, err
	}
	files, err := filepath.Glob(filepath.Join(s.anchors, prefix+"*"))
	if err != nil {
		return nil, false, fmt.Errorf("looking for roots: %w", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, false, fmt.Errorf("reading a root: %w", err)
		}
		if cert, err := find(data, fingerprint); cert != nil || err != nil {
			return cert, false, err
		}
	}
	return nil, false, nil
}

func (s system) install(ctx context.Context, cert *x509.Certificate) error {
	// Roots of other CAs may have the same serial number, and so the same file.
	file := fmt.Sprintf(truststore.SystemTrustFilename, nickname(cert))
	if data, err := os.ReadFile(file); err == nil {
		if same, err := find(data, x509util.Fingerprint(cert)); same == nil || err != nil {
			return fmt.Errorf("%q holds another root with the same serial number", file)
		}
	}
	return s.change(func() error { return systemInstall(ctx, cert) })
}

func (s system) uninstall(ctx context.Context, cert *x509.Certificate) error {
	return s.change(func() error {
		if err := s.unlink(cert); err != nil {
			return err
		}
		return systemUninstall(ctx, cert)
	})
}

// unlink takes away what Debian's update-ca-certificates leaves of a root whose file
// is gone: a link to it, and one by its hash. Its option --fresh would do that, too,
// but leaves programs that go by hashes without any root for seconds.
func (s system) unlink(cert *x509.Certificate) error {
	dir, name := filepath.Dir(s.bundle), nickname(cert)+".pem"
	if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
		return nil //nolint:nilerr // there is none
	}
	remove := []string{"rm", "-f", filepath.Join(dir, name)}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("looking for links: %w", err)
	}
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && target == name {
			// HASH.0, HASH.1 and so on are of roots of one subject. Rehashing makes those of
			// others anew, without a gap, at which a search would end.
			hashes, _ := filepath.Glob(filepath.Join(dir, strings.TrimSuffix(e.Name(), filepath.Ext(e.Name()))+".*")) // the pattern is good
			remove = append(remove, hashes...)
		}
	}
	for _, args := range [][]string{remove, {"openssl", "rehash", dir}} {
		cmd := truststore.CommandWithSudo(args...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return said(cmd, err, out)
		}
	}
	return nil
}

func (s system) change(do func() error) error {
	defer syscall.Umask(syscall.Umask(0o022)) // the file is for everybody to read
	path := os.Getenv("PATH")
	if err := os.Setenv("PATH", strings.Join([]string{path, "/usr/sbin", "/sbin"}, ":")); err != nil {
		return fmt.Errorf("setting PATH: %w", err)
	}
	defer os.Setenv("PATH", path) //nolint:errcheck // it was the value before
	err := do()
	if err != nil && os.Geteuid() != 0 {
		return oneshot.WithHint(err, "it takes root: run this with sudo, or leave the store out (--stores nss,java)")
	}
	return err
}
