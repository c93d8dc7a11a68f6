package pki

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"go.step.sm/crypto/x509util"
)

// Import reads a root and an intermediate that were made elsewhere, laid out as
// "step ca init" leaves them: certs/root_ca.crt, certs/intermediate_ca.crt,
// secrets/intermediate_ca_key and, if they are to be kept, secrets/root_ca_key,
// secrets/ssh_host_ca_key, secrets/ssh_user_ca_key. It returns nil if dir holds
// none of them, and all problems at once if they do not make a chain.
func Import(dir string, p Passwords, now time.Time) (*Authority, error) {
	certs, secrets := filepath.Join(dir, "certs"), filepath.Join(dir, "secrets")
	c := &Contents{missing: map[string]bool{}}
	for _, sl := range (Store{Root: secrets, Certs: certs, Secrets: secrets}).slots(p, Names{}) {
		switch sl.item {
		case "SSH host CA public key", "SSH user CA public key", "admin provisioner key":
			// Made anew from what is imported.
		default:
			c.slots = append(c.slots, sl)
		}
	}
	problems := c.load()
	if len(problems) == 0 && c.Empty() {
		return nil, nil
	}
	if len(problems) == 0 {
		problems = c.gaps(c.check(now))
	}
	for i, problem := range problems {
		problems[i] = fmt.Errorf("importing from %q: %w", dir, problem)
	}
	return &c.Authority, errors.Join(problems...)
}

// gaps adds what an import must have and lacks to problems.
func (c *Contents) gaps(problems []error) []error {
	if c.Root == nil {
		problems = append(problems, errors.New("certs/root_ca.crt is missing"))
	}
	if c.RootKey == nil && (c.Intermediate == nil || c.IntermediateKey == nil) {
		problems = append(problems, errors.New("there is neither a root key nor an intermediate with its key, so nothing could sign"))
	}
	if c.Intermediate != nil && c.IntermediateKey == nil {
		problems = append(problems, errors.New("secrets/intermediate_ca_key is missing"))
	}
	if c.Root != nil && c.Intermediate != nil && c.Intermediate.NotAfter.After(c.Root.NotAfter.Add(time.Minute)) {
		problems = append(problems, errors.New("the intermediate certificate outlives the root"))
	}
	return problems
}

// Adopt takes over what was imported for every file that is still missing. A
// store that already has another root is refused.
func (c *Contents) Adopt(imported *Authority) error {
	if c.Root != nil {
		if !c.Root.Equal(imported.Root) {
			return fmt.Errorf("the root to import (%s) is not the root of this CA (%s)", x509util.Fingerprint(imported.Root), x509util.Fingerprint(c.Root))
		}
	} else if c.RootKey != nil {
		if err := belongs(c.RootKey, imported.Root, "root"); err != nil {
			return err
		}
	}
	take(&c.RootKey, imported.RootKey)
	take(&c.Root, imported.Root)
	take(&c.IntermediateKey, imported.IntermediateKey)
	take(&c.Intermediate, imported.Intermediate)
	take(&c.SSHHostKey, imported.SSHHostKey)
	take(&c.SSHUserKey, imported.SSHUserKey)
	return nil
}

func take[T comparable](have *T, imported T) {
	var none T
	if *have == none {
		*have = imported
	}
}
