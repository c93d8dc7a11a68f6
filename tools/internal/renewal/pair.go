package renewal

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/enrol"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

// Kind is the kind of a certificate.
type Kind string

// Kinds.
const (
	TLS Kind = "tls"
	SSH Kind = "ssh" // of a host
)

// Pair names the files of a certificate and its key.
type Pair struct {
	Kind      Kind
	Cert, Key string
	Reload    string // shell command to run when they changed; of TLS only, sshd is told for SSH
}

// Certificate is what a pair holds. The key is the certificate's.
type Certificate struct {
	Names       []string
	Serial      string // decimal
	From, Until time.Time

	key crypto.Signer
	tls tls.Certificate
	ssh *ssh.Certificate
}

// Due is when two thirds of its life are over.
func (c *Certificate) Due() time.Time { return c.From.Add(c.Until.Sub(c.From) / 3 * 2) }

// Read reads a pair. A key beside a certificate of another key is an error.
func (p Pair) Read() (*Certificate, error) {
	for _, path := range []string{p.Key, p.Cert} {
		info, err := os.Lstat(path)
		if err != nil {
			return nil, fmt.Errorf("reading a certificate and its key: %w", err)
		}
		if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("reading a certificate and its key: %q is not a regular file", path)
		}
	}
	return p.read(p.Cert, p.Key)
}

func (p Pair) read(certFile, keyFile string) (*Certificate, error) {
	if p.Kind == SSH {
		return readSSH(certFile, keyFile)
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("reading %q with the key %q: %w", certFile, keyFile, err)
	}
	return &Certificate{
		Names: enrol.Names(pair.Leaf), Serial: pair.Leaf.SerialNumber.String(), From: pair.Leaf.NotBefore, Until: pair.Leaf.NotAfter,
		key: pair.PrivateKey.(crypto.Signer), tls: pair, //nolint:forcetypeassert // LoadX509KeyPair has looked at its public key
	}, nil
}

// forever is the end of the year 9999. An SSH certificate may be good for longer than time.Time tells.
const forever = 253402300799

func readSSH(certFile, keyFile string) (*Certificate, error) {
	key, err := enrol.ReadKey(keyFile)
	if err != nil {
		return nil, err
	}
	cert, err := enrol.ReadSSHCertificate(certFile)
	if err != nil {
		return nil, err
	}
	public, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("reading the host key %q: %w", keyFile, err)
	}
	if string(public.Marshal()) != string(cert.Key.Marshal()) {
		return nil, fmt.Errorf("reading %q: it is not the certificate of the key %q", certFile, keyFile)
	}
	return &Certificate{
		Names: cert.ValidPrincipals, Serial: fmt.Sprint(cert.Serial),
		From: time.Unix(int64(min(cert.ValidAfter, forever)), 0), Until: time.Unix(int64(min(cert.ValidBefore, forever)), 0),
		key: key, ssh: cert,
	}, nil
}

// content is what is to be written. Without a key the old one stays.
type content struct {
	cert, key []byte
	public    []byte // of an SSH key, which lies beside it as KEY.pub
}

func tlsContent(chain []*x509.Certificate, key crypto.Signer) (c content, err error) {
	c.cert = trustbundle.PEM(chain...)
	if key == nil {
		return c, nil
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return c, fmt.Errorf("writing a key: %w", err)
	}
	c.key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return c, nil
}

func sshContent(cert *ssh.Certificate, key crypto.Signer) (c content, err error) {
	c.cert = ssh.MarshalAuthorizedKey(cert)
	if key == nil {
		return c, nil
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		return c, fmt.Errorf("writing a key: %w", err)
	}
	c.key, c.public = pem.EncodeToMemory(block), ssh.MarshalAuthorizedKey(cert.Key)
	return c, nil
}

// another makes a key like key.
func another(key crypto.Signer) (crypto.Signer, error) {
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		return ecdsa.GenerateKey(k.Curve, rand.Reader)
	case *rsa.PrivateKey:
		return rsa.GenerateKey(rand.Reader, k.N.BitLen())
	case ed25519.PrivateKey:
		_, private, err := ed25519.GenerateKey(rand.Reader)
		return private, err
	}
	return nil, fmt.Errorf("making a key: there is no way to make one of type %T", key)
}

// staged is where a file waits for its turn.
func staged(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".next")
}

// files are those of a pair, in the order in which they are staged and renamed.
func (p Pair) files() []string {
	if p.Kind == SSH {
		return []string{p.Key, p.Key + ".pub", p.Cert}
	}
	return []string{p.Key, p.Cert}
}

// replace puts c in the place of the pair's files, with their owner and mode. Two files
// cannot be renamed at once, so both lie ready before the first one is:
//
//	.KEY.next   openat(O_CREAT|O_EXCL) write fchmod fsync rename, chown, fsync(dir)
//	.CERT.next  the same; from here on the new pair is complete, and replacing can be finished
//	rename .KEY.next KEY    fsync(dir)
//	rename .CERT.next CERT  fsync(dir)
//
// What a killed run leaves is for recover: without .CERT.next nothing happened to the
// pair; with it, the rest is renamed. Between the two renames a reader sees a key
// beside the certificate of another one; if the run is killed there, until the next
// run begins. A new certificate for the same key is one rename.
func (p Pair) replace(c content) error {
	data := map[string][]byte{p.Key: c.key, p.Key + ".pub": c.public, p.Cert: c.cert}
	for _, path := range p.files() {
		if data[path] == nil {
			continue
		}
		if err := stage(path, data[path]); err != nil {
			return err
		}
	}
	return p.publish()
}

func stage(path string, data []byte) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) { // KEY.pub may be missing
		_, err = durable.WriteIfChanged(staged(path), data, 0o644)
		return err
	}
	if err != nil {
		return fmt.Errorf("writing %q: %w", path, err)
	}
	if _, err := durable.WriteIfChanged(staged(path), data, info.Mode().Perm()); err != nil {
		return err
	}
	if err := chown(staged(path), info); err != nil {
		return fmt.Errorf("writing %q: %w", path, err)
	}
	return nil
}

// publish renames what is staged.
func (p Pair) publish() error {
	for _, path := range p.files() {
		if _, err := os.Lstat(staged(path)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := durable.Rename(staged(path), path); err != nil {
			return err
		}
	}
	return nil
}

// recover finishes or drops what a killed run left, and says whether it changed the
// pair; it calls before first.
func (p Pair) recover(before func() error) (finished bool, err error) {
	for _, path := range p.files() {
		if err := durable.Sweep(staged(path)); err != nil {
			return false, err
		}
	}
	if p.complete() {
		if err := before(); err != nil {
			return false, err
		}
		return true, p.publish()
	}
	for _, path := range p.files() {
		if err := os.Remove(staged(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("removing a leftover: %w", err)
		}
	}
	return false, nil
}

// complete tells whether what is staged is a pair, and not older than the one in place:
// in the meantime "pkictl join" may have put a newer one there.
func (p Pair) complete() bool {
	key := staged(p.Key)
	if _, err := os.Lstat(key); errors.Is(err, fs.ErrNotExist) {
		key = p.Key
	}
	next, err := p.read(staged(p.Cert), key)
	if err != nil {
		return false
	}
	current, err := p.read(p.Cert, p.Key)
	return err != nil || !next.Until.Before(current.Until)
}
