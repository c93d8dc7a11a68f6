package backup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const (
	recipientExample = `the public key that "make backup-key" prints`
	// What an age file begins with (age-encryption.org/v1).
	ageIntro = "age-encryption.org/v1\n"
	// An identity file has some 200 bytes, an SSH key of RSA some 3 KiB.
	maxIdentity = 64 << 10
)

// ParseRecipients reads BACKUP_RECIPIENTS: public keys of age, and lines of
// ssh-ed25519 and ssh-rsa, separated by commas or line ends (those of age by white
// space, too). All problems are returned at once.
func ParseRecipients(setting string) ([]age.Recipient, error) {
	var recipients []age.Recipient
	var problems []error
	for _, item := range strings.FieldsFunc(setting, func(c rune) bool { return c == ',' || c == '\n' || c == '\r' }) {
		keys := strings.Fields(item)
		if strings.HasPrefix(strings.TrimSpace(item), "ssh-") {
			keys = []string{strings.TrimSpace(item)} // has spaces in it
		}
		for _, key := range keys {
			recipient, err := parseRecipient(key)
			if err != nil {
				problems = append(problems, fmt.Errorf("BACKUP_RECIPIENTS %w; a good value: %s", err, recipientExample))
				continue
			}
			recipients = append(recipients, recipient)
		}
	}
	return recipients, errors.Join(problems...)
}

func parseRecipient(key string) (age.Recipient, error) {
	if strings.HasPrefix(key, "AGE-SECRET-KEY-") || strings.Contains(key, "PRIVATE KEY") {
		return nil, errors.New("has a private key in it, which must not lie beside what it opens")
	}
	if strings.HasPrefix(key, "ssh-") {
		recipient, err := agessh.ParseRecipient(key)
		if err != nil {
			return nil, fmt.Errorf("has an SSH key that is not one, or not of ssh-ed25519 or ssh-rsa: %q", key)
		}
		return recipient, nil
	}
	parsed, err := age.ParseRecipients(strings.NewReader(key))
	if err != nil || len(parsed) != 1 {
		return nil, fmt.Errorf("has an item that is no public key of age or SSH: %q", key)
	}
	return parsed[0], nil
}

// ParseIdentities reads what opens an archive: a file of age identities, or the
// private half of an SSH key without a passphrase. The text is never part of an error.
func ParseIdentities(text []byte) ([]age.Identity, error) {
	if bytes.Contains(text, []byte("-----BEGIN")) {
		identity, err := agessh.ParseIdentity(text)
		if err != nil {
			return nil, badIdentity("it is an SSH key that cannot be read, or that has a passphrase")
		}
		return []age.Identity{identity}, nil
	}
	if bytes.HasPrefix(text, []byte(ageIntro)) {
		return nil, badIdentity("it is encrypted itself")
	}
	identities, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil {
		return nil, badIdentity("there is none in it")
	}
	return identities, nil
}

func badIdentity(why string) error {
	return oneshot.WithHint(fmt.Errorf("reading the identity: %s", why),
		"the identity is the file that \"pkictl backup keygen\" made, with a line AGE-SECRET-KEY-1…; one with a passphrase: age -d FILE | … --identity -")
}

// Split divides a stream in which an identity comes before the archive, so that both
// can come over one standard input.
func Split(r io.Reader) ([]age.Identity, io.Reader, error) {
	buffered := bufio.NewReaderSize(r, maxIdentity)
	var text []byte
	for {
		if start, _ := buffered.Peek(len(ageIntro)); string(start) == ageIntro {
			break
		}
		line, err := buffered.ReadSlice('\n')
		text = append(text, line...)
		if errors.Is(err, io.EOF) {
			break // an empty archive is refused as such
		}
		if err != nil || len(text) > maxIdentity {
			return nil, nil, badIdentity("there is none before the archive on standard input")
		}
	}
	identities, err := ParseIdentities(text)
	return identities, buffered, err
}

// Keygen writes a new identity to a new file and returns its recipient.
func Keygen(path string) (string, error) {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return "", fmt.Errorf("making an identity: %w", err)
	}
	recipient := identity.Recipient().String()
	text := "# Opens the backups of the CA. Keep it away from the CA's machine.\n# public key: " + recipient + "\n" + identity.String() + "\n"
	if err := durable.CreateExclusive(path, []byte(text), 0o600); err != nil {
		return "", err
	}
	return recipient, nil
}

// listening is a set of recipients that remembers the file key while an archive is
// being written, so that it can be verified without anybody's identity.
type listening struct {
	age.Recipient
	fileKey *[]byte
}

func (l listening) Wrap(fileKey []byte) ([]*age.Stanza, error) {
	stanzas, _, err := l.WrapWithLabels(fileKey)
	return stanzas, err
}

// WrapWithLabels keeps age's promise that recipients of different strength do not mix.
func (l listening) WrapWithLabels(fileKey []byte) ([]*age.Stanza, []string, error) {
	*l.fileKey = bytes.Clone(fileKey)
	if labelled, ok := l.Recipient.(age.RecipientWithLabels); ok {
		return labelled.WrapWithLabels(fileKey)
	}
	stanzas, err := l.Recipient.Wrap(fileKey)
	return stanzas, nil, err
}

// heard opens what a listening recipient has heard of.
type heard struct{ fileKey *[]byte }

func (h heard) Unwrap([]*age.Stanza) ([]byte, error) { return *h.fileKey, nil }
