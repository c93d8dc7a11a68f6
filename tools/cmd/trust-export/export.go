package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.step.sm/crypto/x509util"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

const (
	hintContent = "root_ca.crt may hold root certificates in PEM and nothing else, a .pub file one line with a public key; restore them from a backup"
	hintKey     = "take the key out of that file, which is there to be published, and replace the key wherever others could have read it"
	hintDiffers = "step-ca reads its certificates at its start: restart it and try again; if they still differ, --certs and --ca-url do not belong to the same CA"
)

// source is what lies in the CA's directory.
type source struct {
	bundle             trustbundle.Bundle
	rootPath           string
	host, user         ssh.PublicKey // nil without an SSH CA
	hostPath, userPath string
}

// read takes everything from the CA's directory and tells all problems at once.
func read(dir string, now time.Time) (source, error) {
	src := source{
		rootPath: filepath.Join(dir, "root_ca.crt"),
		hostPath: filepath.Join(dir, "ssh_host_ca_key.pub"),
		userPath: filepath.Join(dir, "ssh_user_ca_key.pub"),
	}
	var rootErr, hostErr, userErr error
	src.bundle, rootErr = trustbundle.Read(src.rootPath, now)
	src.host, hostErr = readOptional(src.hostPath)
	src.user, userErr = readOptional(src.userPath)
	err := errors.Join(rootErr, hostErr, userErr)
	switch {
	case err == nil:
		return src, nil
	case errors.Is(err, trustbundle.ErrPrivateKey):
		return src, oneshot.WithHint(err, "%s", hintKey)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		return src, oneshot.WithHint(err, "provisioner-init makes these files; the volume must be mounted here, readable for uid %d", os.Getuid())
	}
	return src, oneshot.WithHint(err, "%s", hintContent)
}

func readOptional(path string) (ssh.PublicKey, error) {
	key, err := trustbundle.ReadSSHKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return key, err
}

// compare fails on any difference between the directory and the live CA.
func compare(ctx context.Context, client *stepca.Client, src source, url string) error {
	pem, err := client.RootsPEM(ctx)
	if err != nil {
		return err
	}
	live, err := trustbundle.Parse(pem, time.Now())
	if err != nil {
		return fmt.Errorf("reading the roots that %q serves: %w", url, err)
	}
	keys, err := client.SSHRoots(ctx)
	if err != nil {
		return err
	}
	err = errors.Join(
		differences(url, "root", src.rootPath, rootNames(src.bundle), rootNames(live)),
		differences(url, "SSH host CA key", src.hostPath, keyNames(src.host), keyNames(keys.Host...)),
		differences(url, "SSH user CA key", src.userPath, keyNames(src.user), keyNames(keys.User...)),
	)
	if err != nil {
		return oneshot.WithHint(err, "%s", hintDiffers)
	}
	return nil
}

func differences(url, what, path string, local, live []string) error {
	var problems []error
	for _, name := range local {
		if !slices.Contains(live, name) {
			problems = append(problems, fmt.Errorf("comparing with %q: it does not serve %s %s of %q", url, what, name, path))
		}
	}
	for _, name := range live {
		if !slices.Contains(local, name) {
			problems = append(problems, fmt.Errorf("comparing with %q: it serves %s %s, which is not in %q", url, what, name, path))
		}
	}
	return errors.Join(problems...)
}

func rootNames(b trustbundle.Bundle) []string {
	var names []string
	for _, c := range b.Roots() {
		names = append(names, x509util.Fingerprint(c))
	}
	return names
}

func keyNames(keys ...ssh.PublicKey) []string {
	var names []string
	for _, k := range keys {
		if k != nil {
			names = append(names, ssh.FingerprintSHA256(k))
		}
	}
	return names
}

// names are all files that this program ever writes. Others are not its own.
var names = []string{
	"root_ca.crt", "root_ca.der", "roots.pem", "truststore.p12", "fingerprint",
	"ssh_host_ca.pub", "ssh_user_ca.pub", "known_hosts", "SHA256SUMS",
}

// files returns the content of each file to publish.
func (s source) files(out string) (map[string][]byte, error) {
	current := s.bundle.Current()
	store, err := s.trustStore(filepath.Join(out, "truststore.p12"))
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{
		"root_ca.crt":    trustbundle.PEM(current),
		"root_ca.der":    current.Raw,
		"roots.pem":      s.bundle.PEM(),
		"truststore.p12": store,
		"fingerprint":    []byte(x509util.Fingerprint(current) + "\n"),
	}
	if s.host != nil {
		files["ssh_host_ca.pub"] = ssh.MarshalAuthorizedKey(s.host)
		files["known_hosts"] = trustbundle.KnownHosts(s.host)
	}
	if s.user != nil {
		files["ssh_user_ca.pub"] = ssh.MarshalAuthorizedKey(s.user)
	}
	var sums strings.Builder
	for _, name := range slices.Sorted(maps.Keys(files)) {
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256(files[name]), name)
	}
	files["SHA256SUMS"] = []byte(sums.String())
	return files, nil
}

// trustStore returns the bytes of the store at path if it has the right roots in it,
// and a new store otherwise: encoding the same roots twice gives different bytes.
func (s source) trustStore(path string) ([]byte, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() && info.Size() <= trustbundle.MaxSize {
		if old, err := os.ReadFile(path); err == nil && s.bundle.SamePKCS12(old) {
			return old, nil
		}
	}
	return s.bundle.PKCS12()
}

// write brings the directory to the given files and says what it did to each.
func write(ctx context.Context, dir string, files map[string][]byte, log *slog.Logger) error {
	for _, name := range names {
		path := filepath.Join(dir, name)
		data, wanted := files[name]
		if !wanted {
			err := os.Remove(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("removing what is no longer published: %w", err)
			}
			log.LogAttrs(ctx, slog.LevelInfo, "removed", slog.String("file", path))
			continue
		}
		outcome, err := durable.WriteIfChanged(path, data, 0o644)
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrNotExist) {
			return oneshot.WithHint(err, "%q must be a directory that uid %d may write to", dir, os.Getuid())
		}
		if err != nil {
			return err
		}
		log.LogAttrs(ctx, slog.LevelInfo, string(outcome), slog.String("file", path))
	}
	return nil
}
