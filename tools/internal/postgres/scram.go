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
	scramSaltLength = 16

	// What RFC 7677 (section 4) asks for and PostgreSQL 15 itself uses. They are there to
	// slow down whoever guesses passwords with a verifier at hand.
	scramIterations = 4096

	// A password of this length is taken for one that nobody guesses ("openssl rand
	// -base64 24" has 32 characters), and then the guesses need not be slow. step-ca does
	// the derivation for each connection, and it opens new ones all the time under load:
	// 0.7 ms of a core each with 4096 rounds (measured).
	longPassword   = 24
	fastIterations = 32
)

// newVerifier makes what PostgreSQL stores for a password (RFC 5803 in PostgreSQL's
// own notation). Made here, the plain text never reaches the server or its log.
func newVerifier(password config.Secret) (string, error) {
	salt := make([]byte, scramSaltLength)
	_, _ = rand.Read(salt) // never fails: without randomness the program crashes
	return verifier(password, salt, iterations(password))
}

func iterations(password config.Secret) int {
	if len(password.Reveal()) >= longPassword {
		return fastIterations
	}
	return scramIterations
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

// matches tells whether a stored verifier is one that newVerifier would make of password.
func matches(stored string, password config.Secret) bool {
	parameters, isSCRAM := strings.CutPrefix(stored, "SCRAM-SHA-256$")
	parameters, _, _ = strings.Cut(parameters, "$")
	count, encoded, _ := strings.Cut(parameters, ":")
	if !isSCRAM || count != strconv.Itoa(iterations(password)) {
		return false // an MD5 hash, nothing, or of a time that derived otherwise
	}
	salt, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return false
	}
	own, err := verifier(password, salt, iterations(password))
	return err == nil && subtle.ConstantTimeCompare([]byte(own), []byte(stored)) == 1
}
