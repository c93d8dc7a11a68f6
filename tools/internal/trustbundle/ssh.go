package trustbundle

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"fmt"

	"golang.org/x/crypto/ssh"
)

const (
	maxSSHKey  = 16 << 10
	minRSABits = 2048
)

// ReadSSHKey parses the file at path with ParseSSHKey.
func ReadSSHKey(path string) (ssh.PublicKey, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading an SSH CA key: %w", err)
	}
	key, err := ParseSSHKey(data)
	if err != nil {
		return nil, fmt.Errorf("reading an SSH CA key from %q: %w", path, err)
	}
	return key, nil
}

// ParseSSHKey reads the public key of an SSH CA: one line as in an authorized_keys
// file, without options.
func ParseSSHKey(data []byte) (ssh.PublicKey, error) {
	if len(data) > maxSSHKey {
		return nil, fmt.Errorf("it is larger than %d bytes", maxSSHKey)
	}
	if bytes.Contains(data, []byte("PRIVATE KEY-----")) {
		return nil, ErrPrivateKey
	}
	line := bytes.TrimSpace(data)
	if len(line) == 0 {
		return nil, errors.New("it is empty")
	}
	if bytes.ContainsAny(line, "\r\n") {
		return nil, errors.New("it has more than one line")
	}
	key, _, options, _, err := ssh.ParseAuthorizedKey(line)
	if err != nil {
		return nil, errors.New("it is not an SSH public key") // the library's text is about authorized_keys
	}
	if len(options) > 0 {
		return nil, errors.New("it has options before the key")
	}
	switch key.Type() {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		return key, nil
	case ssh.KeyAlgoRSA:
		if crypto, ok := key.(ssh.CryptoPublicKey); ok {
			if pub, ok := crypto.CryptoPublicKey().(*rsa.PublicKey); ok && pub.N.BitLen() >= minRSABits {
				return key, nil
			}
		}
		return nil, fmt.Errorf("it is an RSA key of fewer than %d bits", minRSABits)
	}
	return nil, fmt.Errorf("a key of type %q is none that an SSH CA signs with", key.Type())
}

// KnownHosts is the known_hosts line that trusts every host with a certificate of ca.
func KnownHosts(ca ssh.PublicKey) []byte {
	return append([]byte("@cert-authority * "), ssh.MarshalAuthorizedKey(ca)...)
}
