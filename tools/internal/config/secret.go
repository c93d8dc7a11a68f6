package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"unicode"
)

// Secret is a password. It prints as [redacted] wherever it ends up by mistake.
type Secret string

const redacted = "[redacted]"

// String never tells the secret; Reveal does.
func (Secret) String() string { return redacted }

// GoString keeps %#v from telling the secret.
func (Secret) GoString() string { return redacted }

// MarshalText keeps encoders from telling the secret.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue keeps slog from telling the secret.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// Reveal returns the exact bytes.
func (s Secret) Reveal() string { return string(s) }

const (
	secretExample = `the output of "openssl rand -base64 24", in single quotes`
	// Longer than any password that a person or a generator makes; bounds what is read.
	maxSecret = 4096
	// Below this a stolen key file falls to guessing in spite of PBKDF2.
	shortSecret = 12
)

// SecretNames lists the secrets; each can also be given as NAME_FILE.
func SecretNames() []string {
	return []string{
		"CA_PASSWORD", "ROOT_CA_PASSWORD", "PROVISIONER_PASSWORD", "SSH_HOST_PROVISIONER_PASSWORD",
		"POSTGRES_PASSWORD", "STEP_CA_DB_PASSWORD", "REPORTS_DB_PASSWORD", oidcClientSecret,
	}
}

// CAPassword protects the intermediate key and both SSH CA keys.
func (r *Reader) CAPassword() Secret { return r.secret("CA_PASSWORD") }

// RootCAPassword protects the root key.
func (r *Reader) RootCAPassword() Secret { return r.secret("ROOT_CA_PASSWORD") }

// ProvisionerPassword protects the key of the admin provisioner, whose encrypted
// form step-ca gives to every admitted client.
func (r *Reader) ProvisionerPassword() Secret { return r.secret("PROVISIONER_PASSWORD") }

// SSHHostPassword protects the key of the provisioner ssh-host-jwk, as PROVISIONER_PASSWORD does that of admin.
func (r *Reader) SSHHostPassword() Secret { return r.secret("SSH_HOST_PROVISIONER_PASSWORD") }

// OwnerPassword is the password of the role that owns the database.
func (r *Reader) OwnerPassword() Secret { return r.databaseSecret("POSTGRES_PASSWORD") }

// RuntimePassword is the password of RuntimeRole.
func (r *Reader) RuntimePassword() Secret { return r.databaseSecret("STEP_CA_DB_PASSWORD") }

// ReportsPassword is the password of ReportsRole.
func (r *Reader) ReportsPassword() Secret { return r.databaseSecret("REPORTS_DB_PASSWORD") }

// databaseSecret refuses what server and client normalise differently: SASLprep
// (RFC 4013) is applied to anything beyond printable ASCII.
func (r *Reader) databaseSecret(name string) Secret {
	s := r.secret(name)
	for _, b := range []byte(s) {
		if b < 0x20 || b > 0x7e {
			r.problem(name, secretExample, "has a character beyond printable ASCII, which PostgreSQL's SCRAM may normalise differently on its two sides (RFC 4013)")
			break
		}
	}
	return s
}

// oidcClientSecret is chosen by the provider, so it may be missing or short.
const oidcClientSecret = "OIDC_CLIENT_SECRET" //nolint:gosec // G101: a name

func (r *Reader) oidcClientSecret() Secret {
	if value, err := lookupSecret(oidcClientSecret); err == nil && value == "" {
		return ""
	}
	return r.secret(oidcClientSecret)
}

func (r *Reader) secret(name string) Secret {
	value, err := lookupSecret(name)
	switch {
	case err != nil:
		r.problem(name, secretExample, "cannot be read: %v", err)
		return ""
	case value == "":
		r.problem(name, secretExample, "is missing")
		return ""
	case len(value) > maxSecret:
		r.problem(name, secretExample, "is longer than %d bytes", maxSecret)
		return ""
	case strings.Contains(strings.ToLower(value), "change_me"):
		r.problem(name, secretExample, "is still the placeholder from .env.example")
		return ""
	case strings.TrimFunc(value, unicode.IsSpace) != value:
		// step-ca trims what it reads from --password-file, libpq what it reads from a passfile.
		r.problem(name, secretExample, "begins or ends with white space (a line end in %s_FILE counts), which step-ca would trim", name)
		return ""
	case strings.ContainsAny(value, "\x00\r\n"):
		r.problem(name, secretExample, "has a line end or a NUL byte in it")
		return ""
	}
	if len(value) < shortSecret && name != oidcClientSecret {
		r.warn("%s is shorter than %d bytes and can be guessed by whoever gets hold of an encrypted key", name, shortSecret)
	}
	for _, other := range SecretNames() {
		if s, read := r.secrets[other]; read && other != name && s == Secret(value) {
			r.warn("%s and %s are the same: whoever learns one has both", other, name)
		}
	}
	r.secrets[name] = Secret(value)
	return Secret(value)
}

// lookupSecret returns the exact bytes of NAME or of the file that NAME_FILE
// names, empty if neither is there.
func lookupSecret(name string) (string, error) {
	value, file := os.Getenv(name), os.Getenv(name+"_FILE")
	if value != "" && file != "" {
		return "", fmt.Errorf("both %s and %s_FILE are set, only one may be", name, name)
	}
	if file == "" {
		return value, nil
	}
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil // Compose writes no file for an empty secret
	}
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // read only
	data, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	return string(data), err
}

// AllSecrets checks every secret.
func (r *Reader) AllSecrets() {
	_, _, _, _ = r.CAPassword(), r.RootCAPassword(), r.ProvisionerPassword(), r.SSHHostPassword()
	_, _, _ = r.OwnerPassword(), r.RuntimePassword(), r.ReportsPassword()
}
