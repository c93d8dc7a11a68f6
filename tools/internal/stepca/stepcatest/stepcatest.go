// Package stepcatest runs a real step-ca authority for tests, in the version that
// the stack runs.
package stepcatest

import (
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
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/ca"
	"github.com/smallstep/certificates/db"
	"go.step.sm/crypto/jose"
	"go.step.sm/crypto/minica"
	"golang.org/x/crypto/ssh"
)

// Provisioner is the name of the JWK provisioner and Password opens its key.
const (
	Provisioner = "admin"
	Password    = "a provisioner's p@ss$word" //nolint:gosec // for tests
)

// Options say what the authority has beyond a root, an intermediate and a JWK provisioner.
type Options struct {
	SSH          bool                 // SSH host and user CA keys, and the provisioner may sign with them
	Served       []*x509.Certificate  // further roots, served and not in Certs
	Provisioners provisioner.List     // further ones
	DataSource   string               // of a PostgreSQL database; none if empty
	Adjust       func(*config.Config) // has the last word
}

// CA is an authority. Its directory looks like the certs directory of step-ca.
type CA struct {
	URL   string
	Certs string
	Root  *x509.Certificate

	authority *ca.CA
	address   string
	done      chan error
}

// provisionerKey makes one key for all authorities: encrypting it is slow on purpose.
var provisionerKey = sync.OnceValues(func() (*provisioner.JWK, error) { return JWK(Provisioner) })

// JWK is a further JWK provisioner, which Password opens too.
func JWK(name string) (*provisioner.JWK, error) {
	public, private, err := jose.GenerateDefaultKeyPair([]byte(Password))
	if err != nil {
		return nil, err
	}
	encrypted, err := private.CompactSerialize()
	return &provisioner.JWK{Type: "JWK", Name: name, Key: public, EncryptedKey: encrypted}, err
}

// SSHPOP is the provisioner by which SSH host certificates renew themselves. It
// wants Options.SSH.
func SSHPOP() provisioner.Interface {
	enabled := true
	return &provisioner.SSHPOP{Type: "SSHPOP", Name: "ssh-pop", Claims: &provisioner.Claims{EnableSSHCA: &enabled}}
}

// New makes keys and certificates below dir. The CA does not serve before Start.
func New(dir string, o Options) (*CA, error) {
	pki, err := minica.New(minica.WithName("Test"))
	if err != nil {
		return nil, err
	}
	secrets := filepath.Join(dir, "secrets")
	c := &CA{Certs: filepath.Join(dir, "certs"), Root: pki.Root, done: make(chan error, 1)}
	for _, d := range []string{c.Certs, secrets} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	cfg := &config.Config{
		Root:             []string{filepath.Join(c.Certs, "root_ca.crt")},
		IntermediateCert: filepath.Join(c.Certs, "intermediate_ca.crt"),
		IntermediateKey:  filepath.Join(secrets, "intermediate_ca_key"),
		DNSNames:         []string{"localhost", "127.0.0.1"},
		AuthorityConfig:  &config.AuthConfig{},
	}
	files := []error{
		writeCerts(cfg.Root[0], pki.Root),
		writeCerts(cfg.IntermediateCert, pki.Intermediate),
		writeKey(cfg.IntermediateKey, pki.Signer),
	}
	if len(o.Served) > 0 {
		cfg.Root = append(cfg.Root, filepath.Join(secrets, "served.crt"))
		files = append(files, writeCerts(cfg.Root[1], o.Served...))
	}
	if o.SSH {
		cfg.SSH = &config.SSHConfig{
			HostKey: filepath.Join(secrets, "ssh_host_ca_key"), UserKey: filepath.Join(secrets, "ssh_user_ca_key"),
		}
		files = append(files,
			writeSSH(cfg.SSH.HostKey, filepath.Join(c.Certs, "ssh_host_ca_key.pub")),
			writeSSH(cfg.SSH.UserKey, filepath.Join(c.Certs, "ssh_user_ca_key.pub")))
	}
	if err := errors.Join(files...); err != nil {
		return nil, err
	}
	key, err := provisionerKey()
	if err != nil {
		return nil, err
	}
	jwk := &provisioner.JWK{
		Type: key.Type, Name: key.Name, Key: key.Key, EncryptedKey: key.EncryptedKey,
		Claims: &provisioner.Claims{EnableSSHCA: &o.SSH},
	}
	cfg.AuthorityConfig.Provisioners = append(provisioner.List{jwk}, o.Provisioners...)
	// As in the stack (see caconfig): the start time is in whole seconds.
	cfg.AuthorityConfig.DisableIssuedAtCheck = true
	if o.DataSource != "" {
		cfg.DB = &db.Config{Type: "postgresql", DataSource: o.DataSource}
	}
	if cfg.Address, err = freeAddress(); err != nil {
		return nil, err
	}
	if o.Adjust != nil {
		o.Adjust(cfg)
	}
	c.address, c.URL = cfg.Address, "https://"+cfg.Address
	c.authority, err = ca.New(cfg, ca.WithQuiet(true))
	return c, err
}

// Start serves and returns when the CA answers.
func (c *CA) Start() error {
	go func() { c.done <- c.authority.Run() }()
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // only asks whether it listens
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		conn, err := d.DialContext(ctx, "tcp", c.address)
		if err == nil {
			return conn.Close()
		}
		select {
		case err := <-c.done:
			return fmt.Errorf("starting the CA: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("starting the CA: %w", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Stop ends a CA that was started.
func (c *CA) Stop() error { return c.authority.Stop() }

// freeAddress finds a port that nobody listens on. step-ca takes no listener.
func freeAddress() (string, error) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func writeCerts(path string, certs ...*x509.Certificate) error {
	var data []byte
	for _, c := range certs {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return os.WriteFile(path, data, 0o600)
}

func writeKey(path string, key crypto.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func writeSSH(private, public string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	pub, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return err
	}
	return errors.Join(writeKey(private, key), os.WriteFile(public, ssh.MarshalAuthorizedKey(pub), 0o600))
}
