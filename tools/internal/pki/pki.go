// Package pki makes and keeps the keys and CA certificates of the authority: the
// root, the intermediate, the SSH host and user CA keys, and the keys of the
// JWK provisioners.
//
// Keys are made once and never replaced. They lie on disk as encrypted PKCS#8
// (PBES2, RFC 8018), those of provisioners as JWE, each under its own password. The
// files come into being in the order of Store.slots; a run that is killed leaves
// a beginning of that list, which the next run completes.
package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.step.sm/crypto/jose"
	"go.step.sm/crypto/pemutil"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// Store is where the files lie. Root is a volume of its own, which the online CA
// never sees.
type Store struct {
	Root    string // root_ca_key
	Certs   string // certificates and SSH CA public keys
	Secrets string // the online keys
}

// Passwords open the keys.
type Passwords struct {
	Root        config.Secret
	CA          config.Secret
	Provisioner config.Secret
	SSHHost     config.Secret // of the provisioner ssh-host-jwk
}

// Authority is what a Store holds. A field is nil where the file is missing.
type Authority struct {
	RootKey         crypto.Signer
	Root            *x509.Certificate
	IntermediateKey crypto.Signer
	Intermediate    *x509.Certificate
	SSHHostKey      crypto.Signer
	SSHUserKey      crypto.Signer
	Admin           *ProvisionerKey
	SSHHostJWK      *ProvisionerKey
}

// ProvisionerKey is the key of a JWK provisioner as step-ca takes it: the public
// half in clear, the private half encrypted.
type ProvisionerKey struct {
	Public    *jose.JSONWebKey `json:"key"`
	Encrypted string           `json:"encryptedKey"` // JWE, compact
}

// slot is one file of the store.
type slot struct {
	item string // in the words of the field
	path string
	mode fs.FileMode
	// read checks the file's content and puts it into the authority.
	read func(a *Authority, data []byte) error
	// write makes the content from the authority; what is missing in the authority is generated.
	write func(a *Authority) ([]byte, error)
	// added: a CA that an earlier release made does not have it.
	added bool
}

// RootKeyPath is the only file that may be absent from a complete store: a root
// key that was moved off this machine is the safer way to keep it.
func (s Store) RootKeyPath() string { return filepath.Join(s.Root, "root_ca_key") }

// RootPath and the others name the files for step-ca's configuration.
func (s Store) RootPath() string            { return filepath.Join(s.Certs, "root_ca.crt") }
func (s Store) IntermediatePath() string    { return filepath.Join(s.Certs, "intermediate_ca.crt") }
func (s Store) IntermediateKeyPath() string { return filepath.Join(s.Secrets, "intermediate_ca_key") }
func (s Store) SSHHostKeyPath() string      { return filepath.Join(s.Secrets, "ssh_host_ca_key") }
func (s Store) SSHUserKeyPath() string      { return filepath.Join(s.Secrets, "ssh_user_ca_key") }

// slots lists the files in the order in which they are made: a key always before
// the certificate that needs it, so that a certificate without its key means loss.
func (s Store) slots(p Passwords, names Names) []slot {
	const secret, public = 0o400, 0o444
	key := func(item, path, setting string, password config.Secret, field func(*Authority) *crypto.Signer) slot {
		return slot{
			item: item, path: path, mode: secret,
			read: func(a *Authority, data []byte) (err error) {
				*field(a), err = openKey(data, setting, password)
				return err
			},
			write: func(a *Authority) ([]byte, error) { return sealKey(field(a), password) },
		}
	}
	cert := func(item, path string, field func(*Authority) **x509.Certificate, issue func(*Authority) (*x509.Certificate, error)) slot {
		return slot{
			item: item, path: path, mode: public,
			read: func(a *Authority, data []byte) (err error) {
				*field(a), err = parseCA(data)
				return err
			},
			write: func(a *Authority) ([]byte, error) {
				if *field(a) == nil {
					issued, err := issue(a)
					if err != nil {
						return nil, err
					}
					*field(a) = issued
				}
				return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: (*field(a)).Raw}), nil
			},
		}
	}
	sshPublic := func(item, path string, field func(*Authority) *crypto.Signer) slot {
		return slot{
			item: item, path: path, mode: public,
			read: func(a *Authority, data []byte) error {
				if *field(a) == nil {
					return nil // reported as a missing key
				}
				want, err := authorizedKey(*field(a))
				if err == nil && !bytes.Equal(want, data) {
					return errors.New("is not the public half of its key")
				}
				return err
			},
			write: func(a *Authority) ([]byte, error) { return authorizedKey(*field(a)) },
		}
	}
	jwk := func(item, name, setting string, password config.Secret, field func(*Authority) **ProvisionerKey) slot {
		return slot{
			item: item, path: filepath.Join(s.Secrets, name), mode: secret,
			read: func(a *Authority, data []byte) (err error) {
				*field(a), err = openJWK(data, setting, password)
				return err
			},
			write: func(a *Authority) ([]byte, error) { return makeJWK(field(a), password) },
		}
	}
	sshHostJWK := jwk("SSH host provisioner key", "ssh_host_jwk.json", "SSH_HOST_PROVISIONER_PASSWORD", p.SSHHost,
		func(a *Authority) **ProvisionerKey { return &a.SSHHostJWK })
	sshHostJWK.added = true
	return []slot{
		key("root key", s.RootKeyPath(), "ROOT_CA_PASSWORD", p.Root, func(a *Authority) *crypto.Signer { return &a.RootKey }),
		cert("root certificate", s.RootPath(), func(a *Authority) **x509.Certificate { return &a.Root }, names.root),
		key("intermediate key", s.IntermediateKeyPath(), "CA_PASSWORD", p.CA, func(a *Authority) *crypto.Signer { return &a.IntermediateKey }),
		cert("intermediate certificate", s.IntermediatePath(), func(a *Authority) **x509.Certificate { return &a.Intermediate }, names.intermediate),
		key("SSH host CA key", s.SSHHostKeyPath(), "CA_PASSWORD", p.CA, func(a *Authority) *crypto.Signer { return &a.SSHHostKey }),
		sshPublic("SSH host CA public key", filepath.Join(s.Certs, "ssh_host_ca_key.pub"), func(a *Authority) *crypto.Signer { return &a.SSHHostKey }),
		key("SSH user CA key", s.SSHUserKeyPath(), "CA_PASSWORD", p.CA, func(a *Authority) *crypto.Signer { return &a.SSHUserKey }),
		sshPublic("SSH user CA public key", filepath.Join(s.Certs, "ssh_user_ca_key.pub"), func(a *Authority) *crypto.Signer { return &a.SSHUserKey }),
		jwk("admin provisioner key", "admin_jwk.json", "PROVISIONER_PASSWORD", p.Provisioner,
			func(a *Authority) **ProvisionerKey { return &a.Admin }),
		sshHostJWK,
	}
}

// Contents is a Store as it was found.
type Contents struct {
	Authority
	slots   []slot
	missing map[string]bool // by path
}

// Open reads the store and checks everything in it: each key opens with its
// password and belongs to its certificate, and the intermediate chains to the
// root at the given time. It returns all problems at once.
func (s Store) Open(p Passwords, names Names, now time.Time) (*Contents, error) {
	c := &Contents{slots: s.slots(p, names), missing: map[string]bool{}}
	if problems := c.load(); len(problems) > 0 {
		return nil, errors.Join(problems...)
	}
	return c, errors.Join(c.check(now)...)
}

// load reads all files. Opening a key costs 600,000 rounds of PBKDF2, about
// 0.1 s, so the keys are opened side by side.
func (c *Contents) load() []error {
	files := make([][]byte, len(c.slots))
	problems := make([]error, len(c.slots))
	for i, sl := range c.slots {
		data, err := os.ReadFile(sl.path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			c.missing[sl.path] = true
		case err != nil:
			problems[i] = fmt.Errorf("reading the %s: %w", sl.item, err)
		default:
			files[i] = data
		}
	}
	read := func(i int) {
		sl := c.slots[i]
		if err := sl.read(&c.Authority, files[i]); err != nil {
			problems[i] = fmt.Errorf("%s %q: %w", sl.item, sl.path, err)
		}
	}
	var wg sync.WaitGroup
	for i, sl := range c.slots {
		if files[i] != nil && sl.mode == 0o400 {
			wg.Go(func() { read(i) })
		}
	}
	wg.Wait()
	for i, sl := range c.slots { // these compare themselves with the keys
		if files[i] != nil && sl.mode != 0o400 {
			read(i)
		}
	}
	return compact(problems)
}

func (c *Contents) check(now time.Time) []error {
	var problems []error
	if c.Root != nil {
		if err := c.Root.CheckSignatureFrom(c.Root); err != nil {
			problems = append(problems, fmt.Errorf("the root certificate is not self-signed: %w", err))
		}
		problems = append(problems, belongs(c.RootKey, c.Root, "root"), alive(c.Root, "root", now))
	}
	if c.Intermediate != nil {
		problems = append(problems, belongs(c.IntermediateKey, c.Intermediate, "intermediate"), alive(c.Intermediate, "intermediate", now))
		if c.Root != nil {
			if err := c.Intermediate.CheckSignatureFrom(c.Root); err != nil {
				problems = append(problems, fmt.Errorf("the intermediate certificate is not signed by the root: %w", err))
			}
		}
	}
	return compact(problems)
}

func compact(errs []error) []error {
	return slices.DeleteFunc(errs, func(err error) bool { return err == nil })
}

func belongs(key crypto.Signer, cert *x509.Certificate, name string) error {
	if key == nil {
		return nil
	}
	if pub, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(key.Public()) {
		return fmt.Errorf("the %s key does not belong to the %s certificate", name, name)
	}
	return nil
}

func alive(cert *x509.Certificate, name string, now time.Time) error {
	switch {
	case now.After(cert.NotAfter):
		return fmt.Errorf("the %s certificate ended on %s", name, cert.NotAfter.UTC().Format(time.DateOnly))
	case now.Before(cert.NotBefore):
		return fmt.Errorf("the %s certificate begins on %s only; this machine's clock says %s", name,
			cert.NotBefore.UTC().Format(time.DateOnly), now.UTC().Format(time.DateOnly))
	}
	return nil
}

// Sweep removes what killed runs left beside the files. Nobody else may be writing.
func (c *Contents) Sweep() error {
	for _, sl := range c.slots {
		if err := durable.Sweep(sl.path); err != nil {
			return err
		}
	}
	return nil
}

// Empty says that nothing at all is there.
func (c *Contents) Empty() bool { return len(c.missing) == len(c.slots) }

// File is one file that a Contents lacks.
type File struct {
	Item string
	Path string
	slot slot
	c    *Contents
}

// Missing lists what has to be made, in order. A root key is not missing once
// there is a root certificate, as it may be kept offline, unless it was imported.
func (c *Contents) Missing() []File {
	var files []File
	for i, sl := range c.slots {
		if c.missing[sl.path] && (i > 0 || c.Root == nil || c.RootKey != nil) {
			files = append(files, File{Item: sl.item, Path: sl.path, slot: sl, c: c})
		}
	}
	return files
}

// Outdated says that nothing is missing but what a CA of an earlier release does not have.
func (c *Contents) Outdated() bool {
	return !slices.ContainsFunc(c.Missing(), func(f File) bool { return !f.slot.added })
}

// Broken reports a store in which something is missing that a killed run cannot
// have left out: a later file is there although an earlier one is not.
func (c *Contents) Broken() error {
	missing := c.Missing()
	if len(missing) == 0 {
		return nil
	}
	for i, sl := range c.slots {
		if sl.path == missing[0].Path {
			for _, later := range c.slots[i+1:] {
				if !c.missing[later.path] {
					return fmt.Errorf("the %s %q is missing while the %s is there", sl.item, sl.path, later.item)
				}
			}
		}
	}
	return nil
}

func openKey(data []byte, setting string, password config.Secret) (crypto.Signer, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, oneshot.WithHint(errors.New("is not PEM, or is cut short"), "restore the file from a backup")
	}
	key, err := pemutil.Parse(data, pemutil.WithPassword([]byte(password.Reveal())))
	if errors.Is(err, x509.IncorrectPasswordError) || (err != nil && encrypted(block)) {
		return nil, oneshot.WithHint(fmt.Errorf("%s does not open it", setting),
			"set %s to the value that the key was created with, or restore keys and .env from the same backup", setting)
	}
	if err != nil {
		return nil, oneshot.WithHint(err, "restore the file from a backup")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("is not a private key")
	}
	return signer, nil
}

func encrypted(b *pem.Block) bool {
	return b.Type == "ENCRYPTED PRIVATE KEY" || x509.IsEncryptedPEMBlock(b) //nolint:staticcheck // the format that "step ca init" writes
}

func sealKey(field *crypto.Signer, password config.Secret) ([]byte, error) {
	if *field == nil {
		key, err := newKey()
		if err != nil {
			return nil, err
		}
		*field = key
	}
	block, err := pemutil.Serialize(*field, pemutil.WithPassword([]byte(password.Reveal())), pemutil.WithPKCS8(true))
	if err != nil {
		return nil, fmt.Errorf("encrypting: %w", err)
	}
	return pem.EncodeToMemory(block), nil
}

// parseCA accepts exactly one CA certificate and nothing else.
func parseCA(data []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(data)
	switch {
	case block == nil:
		return nil, oneshot.WithHint(errors.New("is not PEM, or is cut short"), "restore the file from a backup")
	case block.Type != "CERTIFICATE":
		return nil, fmt.Errorf("is a %s and not a certificate", block.Type)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("has more in it than one certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parsing: %w", err)
	}
	if !cert.BasicConstraintsValid || !cert.IsCA {
		return nil, errors.New("is not a CA certificate")
	}
	switch cert.PublicKey.(type) {
	case *ecdsa.PublicKey, *rsa.PublicKey, ed25519.PublicKey:
		return cert, nil
	}
	return nil, errors.New("has a key of an unknown type")
}

func authorizedKey(key crypto.Signer) ([]byte, error) {
	pub, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("encoding an SSH public key: %w", err)
	}
	return ssh.MarshalAuthorizedKey(pub), nil
}

func openJWK(data []byte, setting string, password config.Secret) (*ProvisionerKey, error) {
	key := &ProvisionerKey{}
	if err := json.Unmarshal(data, key); err != nil || key.Public == nil || !key.Public.Valid() {
		return nil, oneshot.WithHint(errors.New("is not a JWK, or is cut short"), "restore the file from a backup")
	}
	plain, err := jose.Decrypt([]byte(key.Encrypted), jose.WithPassword([]byte(password.Reveal())))
	if err != nil {
		return nil, oneshot.WithHint(fmt.Errorf("%s does not open it", setting),
			"set %s to the value that the key was created with, or restore keys and .env from the same backup", setting)
	}
	private := &jose.JSONWebKey{}
	if err := json.Unmarshal(plain, private); err != nil {
		return nil, errors.New("has no JWK inside")
	}
	pub := private.Public()
	a, errA := jose.Thumbprint(&pub)
	b, errB := jose.Thumbprint(key.Public)
	if errA != nil || errB != nil || a != b {
		return nil, errors.New("has two halves that do not belong together")
	}
	return key, nil
}

func makeJWK(field **ProvisionerKey, password config.Secret) ([]byte, error) {
	if *field == nil {
		jwk, jwe, err := jose.GenerateDefaultKeyPair([]byte(password.Reveal()))
		if err != nil {
			return nil, fmt.Errorf("generating: %w", err)
		}
		pub := jwk.Public()
		compact, err := jwe.CompactSerialize()
		if err != nil {
			return nil, fmt.Errorf("encrypting: %w", err)
		}
		*field = &ProvisionerKey{Public: &pub, Encrypted: compact}
	}
	return json.Marshal(*field)
}
