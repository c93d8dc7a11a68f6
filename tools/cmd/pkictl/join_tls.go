package main

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.step.sm/crypto/pemutil"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/enrol"
	"github.com/infra-pki/infra-pki/tools/internal/host"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/renewal"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

// asked says whether this run is about a TLS certificate.
func (j *joiner) asked() bool { return j.tlsToken != nil || j.tls.Cert+j.tls.Key != "" }

func (j *joiner) checkTLS() []error {
	var problems []error
	if !j.asked() {
		if j.tls.Owner+j.tls.Mode+j.tls.Reload != "" {
			problems = append(problems, errors.New("--tls-owner, --tls-mode and --tls-reload need a token for TLS, or --tls-cert and --tls-key"))
		}
		return problems
	}
	j.tls.Cert = cmp.Or(j.tls.Cert, filepath.Join(j.dir, "tls.crt"))
	j.tls.Key = cmp.Or(j.tls.Key, filepath.Join(j.dir, "tls.key"))
	for _, f := range []struct{ name, value, example string }{
		{"--tls-cert", j.tls.Cert, "/etc/nginx/web.crt"}, {"--tls-key", j.tls.Key, "/etc/nginx/web.key"},
	} {
		info, err := os.Stat(filepath.Dir(f.value))
		switch {
		case !filepath.IsAbs(f.value):
			problems = append(problems, fmt.Errorf("%s: %q is not an absolute path; a good value: %s", f.name, f.value, f.example))
		case filepath.Dir(f.value) == filepath.Clean(j.dir): // which is made
		case err != nil || !info.IsDir():
			problems = append(problems, fmt.Errorf("%s: there is no directory %q", f.name, filepath.Dir(f.value)))
		}
	}
	if j.tls.Cert == j.tls.Key {
		problems = append(problems, errors.New("--tls-cert and --tls-key are the same file"))
	}
	if _, _, err := tlsOwner(j.tls); err != nil {
		problems = append(problems, fmt.Errorf("--tls-owner: %w; a good value: www-data:www-data", err))
	}
	if _, err := tlsMode(j.tls); err != nil {
		problems = append(problems, fmt.Errorf("--tls-mode: %w; a good value: 0640", err))
	}
	return problems
}

// tlsOwner is that of both files, -1 where it is to stay as it is.
func tlsOwner(t host.TLS) (uid, gid int, err error) {
	uid, gid = -1, -1
	if t.Owner == "" {
		return uid, gid, nil
	}
	name, group, grouped := strings.Cut(t.Owner, ":")
	u, err := user.Lookup(name)
	if err != nil {
		return uid, gid, fmt.Errorf("there is no user %q", name)
	}
	if uid, err = strconv.Atoi(u.Uid); err != nil {
		return uid, gid, err
	}
	if !grouped {
		return uid, gid, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return uid, gid, fmt.Errorf("there is no group %q", group)
	}
	gid, err = strconv.Atoi(g.Gid)
	return uid, gid, err
}

// tlsMode is that of the key.
func tlsMode(t host.TLS) (fs.FileMode, error) {
	if t.Mode == "" {
		return 0o600, nil
	}
	m, err := strconv.ParseUint(t.Mode, 8, 32)
	if err != nil || m > 0o777 || m&0o400 == 0 {
		return 0, fmt.Errorf("%q is not a mode that lets the owner read", t.Mode)
	}
	if m&0o007 != 0 {
		return 0, fmt.Errorf("%q lets everybody at the key", t.Mode)
	}
	return fs.FileMode(m), nil
}

// planTLS looks at the certificates that are there.
func (j *joiner) planTLS() error {
	var problems []error
	this := -1
	if j.asked() {
		this = slices.IndexFunc(j.record.TLS, func(t host.TLS) bool { return t.Cert == j.tls.Cert && t.Key == j.tls.Key })
		if this < 0 {
			for _, path := range []string{j.tls.Cert, j.tls.Key} {
				if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
					problems = append(problems, oneshot.WithHint(fmt.Errorf("%q is there already, and not from pkictl", path), "move it away, or name another file"))
				}
			}
			this = len(j.record.TLS)
			j.record.TLS = append(j.record.TLS, host.TLS{})
		}
		was := j.record.TLS[this]
		j.tls.Names, j.tls.ReloadPending = was.Names, was.ReloadPending
		if j.tlsToken != nil {
			j.tls.Names = j.tlsToken.Names
		}
		j.record.TLS[this] = j.tls
	}
	for i := range j.record.TLS {
		t := &j.record.TLS[i]
		if j.goodTLS(*t) {
			continue
		}
		token := j.tlsToken
		if i != this {
			token = nil
		}
		if err := usable(token, fmt.Sprintf("certifying %q", t.Cert), " --tls"); err != nil {
			problems = append(problems, err)
		}
		t.ReloadPending = t.Reload != ""
	}
	return errors.Join(problems...)
}

// goodTLS says whether a certificate is what it should be.
func (j *joiner) goodTLS(t host.TLS) bool {
	pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return false
	}
	var chain []*x509.Certificate
	for _, der := range pair.Certificate {
		x, err := x509.ParseCertificate(der)
		if err != nil {
			return false
		}
		chain = append(chain, x)
	}
	return j.ca.VerifyTLS(chain, chain[0].PublicKey, t.Names) == nil && sameNames(enrol.Names(chain[0]), t.Names)
}

// joinTLS makes the key, gets the certificate, and runs the reload command.
func (j *joiner) joinTLS(ctx context.Context) error {
	for i := range j.record.TLS {
		t := &j.record.TLS[i]
		key, data, err := tlsKey(t.Key)
		if err != nil {
			return err
		}
		m, err := tlsMode(*t)
		if err != nil {
			return err
		}
		if err := j.put(ctx, t.Key, data, m); err != nil {
			return err
		}
		if err := j.own(ctx, *t, t.Key); err != nil {
			return err
		}
		cert, err := os.ReadFile(t.Cert)
		switch {
		case j.goodTLS(*t):
		case j.dryRun:
			cert = nil
		default:
			chain, err := j.ca.TLSSign(ctx, j.tlsToken.Raw.Reveal(), key, t.Names)
			if err != nil {
				return err
			}
			j.keep()
			cert = trustbundle.PEM(chain...)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("reading a certificate: %w", err)
		}
		if err := j.put(ctx, t.Cert, cert, 0o644); err != nil {
			return err
		}
		if err := j.own(ctx, *t, t.Cert); err != nil {
			return err
		}
		if t.ReloadPending {
			if !j.dryRun {
				if err := renewal.Shell(ctx, t.Reload); err != nil {
					return oneshot.WithHint(err, "the certificate is in place; the same command runs it again")
				}
				t.ReloadPending = false
			}
			j.tell(ctx, "reloaded", "command", t.Reload)
		}
	}
	return nil
}

// tlsKey reads the key of a certificate, or makes one.
func tlsKey(path string) (crypto.Signer, []byte, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, fmt.Errorf("making a key: %w", err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, nil, fmt.Errorf("making a key: %w", err)
		}
		return key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("reading a key: %w", err)
	}
	key, err := pemutil.Parse(data)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the key %q: %w", path, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("reading the key %q: it cannot sign", path)
	}
	return signer, data, nil
}

// own gives a file to its owner.
func (j *joiner) own(ctx context.Context, t host.TLS, path string) error {
	uid, gid, err := tlsOwner(t)
	if err != nil {
		return err
	}
	info, err := os.Lstat(path)
	if err != nil {
		if j.dryRun {
			return nil
		}
		return fmt.Errorf("giving away: %w", err)
	}
	if owned(info, uid, gid) {
		return nil
	}
	if !j.dryRun {
		if err := os.Lchown(path, uid, gid); err != nil {
			return fmt.Errorf("giving away: %w", err)
		}
	}
	j.tell(ctx, durable.Updated, "owner", path)
	return nil
}
