// Package trustbundle reads what others are to trust, strictly, and encodes it for
// the programs that will trust it.
//
// A file of roots may hold root CA certificates in PEM, with white space between
// them, and nothing else. Ordinary PEM readers are lenient: they skip blocks of
// other types, blocks that are damaged and any text between blocks, so a private
// key in the file would go unnoticed and be published with it. Text is therefore
// refused too: a damaged block is nothing but text to a reader.
package trustbundle

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"go.step.sm/crypto/x509util"
	"software.sslmate.com/src/go-pkcs12"
)

// MaxSize bounds what is read. A root is about 1 KiB.
const MaxSize = 1 << 20

// Password of the PKCS#12 trust store. It protects nothing, as roots are public:
// Java wants one, and this is the one that its tools try.
const Password = "changeit"

// ErrPrivateKey says that a file which is going to be published has a private key in it.
var ErrPrivateKey = errors.New("it has a private key in it")

// Bundle is a set of root CA certificates, at least one.
type Bundle struct {
	current *x509.Certificate
	roots   []*x509.Certificate
}

// Read parses the file at path. Each problem names it.
func Read(path string, now time.Time) (Bundle, error) {
	data, err := readFile(path)
	if err != nil {
		return Bundle{}, fmt.Errorf("reading roots: %w", err)
	}
	b, problems := parse(data, now)
	for i, p := range problems {
		problems[i] = fmt.Errorf("reading roots from %q: %w", path, p)
	}
	return b, errors.Join(problems...)
}

// Parse reads root CA certificates that are valid at now. Of the same certificate
// it keeps one. All problems are told at once.
func Parse(data []byte, now time.Time) (Bundle, error) {
	b, problems := parse(data, now)
	return b, errors.Join(problems...)
}

func parse(data []byte, now time.Time) (Bundle, []error) {
	blocks, err := split(data)
	if err != nil {
		return Bundle{}, []error{err}
	}
	var (
		b        Bundle
		problems []error
		seen     = map[string]bool{}
	)
	for i, der := range blocks {
		cert, err := root(der, now)
		if err != nil {
			problems = append(problems, fmt.Errorf("certificate %d: %w", i+1, err))
			continue
		}
		if fp := x509util.Fingerprint(cert); !seen[fp] {
			seen[fp] = true
			b.roots = append(b.roots, cert)
		}
	}
	if len(problems) > 0 {
		return Bundle{}, problems
	}
	b.current = b.roots[0]
	slices.SortFunc(b.roots, func(x, y *x509.Certificate) int { return cmp.Compare(x509util.Fingerprint(x), x509util.Fingerprint(y)) })
	return b, nil
}

const begin = "-----BEGIN "

// split returns the DER of each CERTIFICATE block and accepts nothing beside them.
func split(data []byte) ([][]byte, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("it is larger than %d bytes", MaxSize)
	}
	// Looked for in the raw bytes, so that it is found in a damaged block as well.
	if bytes.Contains(data, []byte("PRIVATE KEY-----")) {
		return nil, ErrPrivateKey
	}
	var ders [][]byte
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		n := len(ders) + 1
		if !bytes.HasPrefix(rest, []byte(begin)) {
			return nil, fmt.Errorf("it has text beside its certificates, before PEM block %d or at the end", n)
		}
		block, after := pem.Decode(rest)
		// pem.Decode goes on to the next block if it cannot read the first one.
		if block == nil || bytes.Count(rest[:len(rest)-len(after)], []byte(begin)) != 1 {
			return nil, fmt.Errorf("PEM block %d is damaged", n)
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %d is a %q, not a certificate", n, block.Type)
		}
		if len(block.Headers) > 0 {
			return nil, fmt.Errorf("PEM block %d has headers, which certificates never have", n)
		}
		ders, rest = append(ders, block.Bytes), after
	}
	if len(ders) == 0 {
		return nil, errors.New("it has no certificate in it")
	}
	return ders, nil
}

// root parses one certificate and says why it cannot be a root at now.
func root(der []byte, now time.Time) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		err = errors.New("is not a CA")
	case cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageCertSign == 0:
		err = errors.New("may not sign certificates (key usage)")
	case !bytes.Equal(cert.RawIssuer, cert.RawSubject) || cert.CheckSignatureFrom(cert) != nil:
		err = errors.New("is not signed by itself, so it is an intermediate and not a root")
	case now.Before(cert.NotBefore):
		err = fmt.Errorf("is valid only from %s on", cert.NotBefore.UTC().Format(time.RFC3339))
	case now.After(cert.NotAfter):
		err = fmt.Errorf("expired on %s", cert.NotAfter.UTC().Format(time.RFC3339))
	}
	if err != nil {
		return nil, fmt.Errorf("%q %w", cert.Subject, err)
	}
	return cert, nil
}

// Current is the first root of the file: the one that signed the intermediate in use.
func (b Bundle) Current() *x509.Certificate { return b.current }

// Roots are all roots, ordered by fingerprint.
func (b Bundle) Roots() []*x509.Certificate { return b.roots }

// PEM encodes all roots, ordered by fingerprint.
func (b Bundle) PEM() []byte { return PEM(b.roots...) }

// PEM encodes certificates.
func PEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// PKCS12 encodes all roots as a trust store for Java. Salts make the bytes
// different each time; SamePKCS12 compares what is inside.
func (b Bundle) PKCS12() ([]byte, error) {
	entries := make([]pkcs12.TrustStoreEntry, 0, len(b.roots))
	for _, c := range b.roots {
		// Of two entries with one alias Java keeps one, and subjects may be equal.
		entries = append(entries, pkcs12.TrustStoreEntry{Cert: c, FriendlyName: "root-" + x509util.Fingerprint(c)[:16]})
	}
	data, err := pkcs12.Modern2023.EncodeTrustStoreEntries(entries, Password)
	if err != nil {
		return nil, fmt.Errorf("encoding PKCS#12: %w", err)
	}
	return data, nil
}

// SamePKCS12 tells whether data is a trust store with exactly these roots.
func (b Bundle) SamePKCS12(data []byte) bool {
	certs, err := pkcs12.DecodeTrustStore(data, Password)
	return err == nil && slices.EqualFunc(certs, b.roots, (*x509.Certificate).Equal)
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	return io.ReadAll(io.LimitReader(f, MaxSize+1))
}
