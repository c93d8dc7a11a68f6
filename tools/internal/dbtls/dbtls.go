// Package dbtls makes the certificates for TLS between step-ca, pgbouncer and
// PostgreSQL. They come from a small CA of their own: the one that step-ca is cannot
// vouch for the database that it needs to start.
package dbtls

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"path/filepath"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
)

const (
	day = 24 * time.Hour
	// Clients know the CA from their start on, so a new one is a restart of them all.
	caLife = 30 * 365 * day
	// A server reads its certificate at its start. Made anew after two of three years, it is
	// in use long before the old one ends, if the stack is updated once a year.
	serverLife = 3 * 365 * day
	// For clocks that differ.
	backdate = time.Hour
)

// File is the name of the CA's certificate, which clients verify the servers with.
const File = "ca.crt"

// Servers are the names that the servers are reached by, each the name of its files, too.
// Their health checks reach them at 127.0.0.1.
var Servers = []string{"postgres", "pgbouncer"}

// Ensure makes what is missing in dir, what does not fit, and what has lived two thirds
// of its life; and puts the CA's certificate into public, too. PostgreSQL's key is readable
// by its owner alone, as PostgreSQL demands; pgbouncer's by the group, which is pgbouncer's.
func Ensure(dir, public string, now time.Time, report func(outcome durable.Outcome, item string)) error {
	ca, outcome, err := ensure(dir, "ca", nil, 0o400, now)
	if err != nil {
		return err
	}
	report(outcome, "CA of the database")
	for _, name := range Servers {
		mode := fs.FileMode(0o440)
		if name == "postgres" {
			mode = 0o400
		}
		_, outcome, err := ensure(dir, name, ca, mode, now)
		if err != nil {
			return err
		}
		report(outcome, "certificate of "+name)
	}
	outcome, err = durable.WriteIfChanged(filepath.Join(public, File), certificatePEM(ca), 0o444)
	if err != nil {
		return err
	}
	report(outcome, "published CA of the database")
	return nil
}

// ensure returns the pair of files NAME.crt and NAME.key. Without an issuer it is the CA.
func ensure(dir, name string, issuer *tls.Certificate, mode fs.FileMode, now time.Time) (*tls.Certificate, durable.Outcome, error) {
	certFile, keyFile := filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	old, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err == nil && fits(old.Leaf, issuer, now) {
		return &old, durable.Unchanged, nil
	}
	fresh, keyPEM, err := issue(name, issuer, now)
	if err != nil {
		return nil, "", fmt.Errorf("making the certificate of %s: %w", name, err)
	}
	// A run that is killed in between leaves two that do not fit, which the next one sees.
	outcome, err := durable.WriteIfChanged(keyFile, keyPEM, mode)
	if err != nil {
		return nil, "", err
	}
	if _, err := durable.WriteIfChanged(certFile, certificatePEM(fresh), 0o444); err != nil {
		return nil, "", err
	}
	return fresh, outcome, nil
}

func fits(leaf *x509.Certificate, issuer *tls.Certificate, now time.Time) bool {
	renewal := leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) * 2 / 3)
	return now.After(leaf.NotBefore) && now.Before(renewal) &&
		(issuer == nil || leaf.CheckSignatureFrom(issuer.Leaf) == nil)
}

func issue(name string, issuer *tls.Certificate, now time.Time) (*tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, NotBefore: now.Add(-backdate),
		// The number keeps two CAs of different times apart.
		Subject: pkix.Name{CommonName: "infra-pki database CA " + serial.Text(36)},
	}
	parent, signer := template, crypto.Signer(key)
	if issuer == nil {
		template.NotAfter = now.Add(caLife)
		template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
		template.KeyUsage = x509.KeyUsageCertSign
	} else {
		parent, signer = issuer.Leaf, issuer.PrivateKey.(crypto.Signer) // made above, or loaded: every key of crypto/tls is one
		template.NotAfter = now.Add(serverLife)
		template.Subject.CommonName = name
		template.DNSNames, template.IPAddresses = []string{name}, []net.IP{net.IPv4(127, 0, 0, 1)}
		template.KeyUsage, template.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf},
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}

func certificatePEM(c *tls.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Leaf.Raw})
}
