package postgres

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

const (
	// What PostgreSQL 15 itself uses. Every new connection of step-ca repeats the
	// derivation, and a generated password needs no more.
	scramIterations = 4096
	scramSaltLength = 16
)

// newVerifier makes what PostgreSQL stores for a password (RFC 5803 in PostgreSQL's
// own notation). Made here, the plain text never reaches the server or its log.
func newVerifier(password config.Secret) (string, error) {
	salt := make([]byte, scramSaltLength)
	_, _ = rand.Read(salt) // never fails: without randomness the program crashes
	return verifier(password, salt, scramIterations)
}

// verifier derives StoredKey and ServerKey (RFC 5802, section 3). SASLprep leaves
// printable ASCII alone, and config admits nothing else.
func verifier(password config.Secret, salt []byte, iterations int) (string, error) {
	salted, err := pbkdf2.Key(sha256.New, password.Reveal(), salt, iterations, sha256.Size)
	if err != nil {
		return "", fmt.Errorf("deriving a SCRAM verifier: %w", err)
	}
	stored := sha256.Sum256(mac(salted, "Client Key"))
	encode := base64.StdEncoding.EncodeToString
	return "SCRAM-SHA-256$" + strconv.Itoa(iterations) + ":" + encode(salt) +
		"$" + encode(stored[:]) + ":" + encode(mac(salted, "Server Key")), nil
}

func mac(key []byte, message string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(message))
	return h.Sum(nil)
}

// matches tells whether a stored verifier is one of password.
func matches(stored string, password config.Secret) bool {
	parameters, isSCRAM := strings.CutPrefix(stored, "SCRAM-SHA-256$")
	parameters, _, _ = strings.Cut(parameters, "$")
	count, encoded, _ := strings.Cut(parameters, ":")
	iterations, err := strconv.Atoi(count)
	if !isSCRAM || err != nil {
		return false // an MD5 hash, or nothing
	}
	salt, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return false
	}
	own, err := verifier(password, salt, iterations)
	return err == nil && subtle.ConstantTimeCompare([]byte(own), []byte(stored)) == 1
}
