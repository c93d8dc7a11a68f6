package enrol

import (
	"crypto"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"

	"golang.org/x/crypto/ssh"
)

// ReadKey reads a private SSH host key, which has no passphrase.
func ReadKey(path string) (crypto.Signer, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading a host key: %w", err)
	}
	key, err := ssh.ParseRawPrivateKey(data)
	if err != nil {
		return nil, fmt.Errorf("reading the host key %q: %w", path, err)
	}
	switch k := key.(type) {
	case *ed25519.PrivateKey:
		return *k, nil
	case crypto.Signer:
		return k, nil
	}
	return nil, fmt.Errorf("reading the host key %q: a key of type %T cannot sign", path, key)
}

// ReadSSHCertificate reads an SSH certificate as OpenSSH stores it (…-cert.pub).
func ReadSSHCertificate(path string) (*ssh.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading an SSH certificate: %w", err)
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(data)
	if err == nil {
		if cert, ok := key.(*ssh.Certificate); ok {
			return cert, nil
		}
		err = errors.New("it is a key without a certificate")
	}
	return nil, fmt.Errorf("reading the SSH certificate %q: %w", path, err)
}
