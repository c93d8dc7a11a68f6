package anchor

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

// nss is one database of Mozilla's library: a Firefox profile, or Chromium's.
//
// truststore takes all databases of HOME for one: it keeps to itself what certutil
// says, counts a root as missing everywhere if it is missing in one place, leaves a
// root in place once it has expired, and knows neither snaps nor the person behind
// sudo. So this speaks to certutil itself.
type nss struct {
	dir   string // empty: there is no database
	owner person
	err   error // why nobody knows whether there is one
}

// databases are where browsers keep them, below a home directory.
var databases = []string{
	".mozilla/firefox/*", ".config/mozilla/firefox/*", // Firefox before and after release 147
	"snap/firefox/common/.mozilla/firefox/*",
	".var/app/org.mozilla.firefox/.mozilla/firefox/*", // flatpak
	".pki/nssdb", ".local/share/pki/nssdb", "snap/chromium/current/.pki/nssdb",
	"Library/Application Support/Firefox/Profiles/*", // macOS
}

func nssStores() []store {
	if runtime.GOOS == "windows" {
		return []store{nss{}} // its certutil is another program; Firefox there reads the system's store
	}
	var found []store
	persons, err := people()
	if err != nil {
		found = append(found, nss{err: oneshot.WithHint(err, "whoever it is can run this with --stores nss, without sudo")})
	}
	for _, p := range persons {
		for _, pattern := range databases {
			dirs, _ := filepath.Glob(filepath.Join(p.home, pattern)) // the patterns are good
			for _, dir := range dirs {
				if _, err := os.Stat(filepath.Join(dir, "cert9.db")); err == nil {
					found = append(found, nss{dir: dir, owner: p})
				}
			}
		}
	}
	if len(found) == 0 {
		return []store{nss{}}
	}
	return found
}

func (n nss) where() string { return n.dir }

func (n nss) absent() error {
	if n.err != nil {
		return n.err
	}
	if n.dir == "" {
		return errors.New("there is no profile of Firefox and no database of Chromium")
	}
	if _, err := exec.LookPath("certutil"); err != nil {
		return oneshot.WithHint(errors.New("certutil is missing"),
			"apt install libnss3-tools, dnf install nss-tools, zypper install mozilla-nss-tools, pacman -S nss, apk add nss-tools, brew install nss")
	}
	return nil
}

// entry is a line of "certutil -L": a nickname and the trust for TLS, e-mail and code.
var entry = regexp.MustCompile(`(?m)^(\S.*?)\s+([A-Za-z]*),[A-Za-z]*,[A-Za-z]*\s*$`)

// find looks at what is ours, and at what else is trusted for TLS: NSS keeps the
// nickname under which it first saw a certificate.
func (n nss) find(ctx context.Context, fingerprint string) (*x509.Certificate, bool, error) {
	cert, _, trusted, err := n.look(ctx, fingerprint)
	return cert, trusted, err
}

func (n nss) look(ctx context.Context, fingerprint string) (cert *x509.Certificate, name string, trusted bool, err error) {
	list, err := n.certutil(ctx, nil, "-L")
	if err != nil {
		return nil, "", false, err
	}
	for _, line := range entry.FindAllSubmatch(list, -1) {
		name, trusted = string(line[1]), bytes.ContainsRune(line[2], 'C')
		if !trusted && !strings.HasPrefix(name, prefix) {
			continue
		}
		data, err := n.certutil(ctx, nil, "-L", "-a", "-n", name)
		if err != nil {
			return nil, "", false, err
		}
		if cert, err := find(data, fingerprint); cert != nil || err != nil {
			return cert, name, trusted, err
		}
	}
	return nil, "", false, nil
}

func (n nss) install(ctx context.Context, cert *x509.Certificate) error {
	_, err := n.certutil(ctx, trustbundle.PEM(cert), "-A", "-a", "-t", "C,,", "-n", nickname(cert))
	return err
}

func (n nss) uninstall(ctx context.Context, cert *x509.Certificate) error {
	_, name, _, err := n.look(ctx, x509util.Fingerprint(cert))
	if err != nil {
		return err
	}
	_, err = n.certutil(ctx, nil, "-D", "-n", name)
	return err
}

func (n nss) certutil(ctx context.Context, stdin []byte, verb string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "certutil", append([]string{verb, "-d", "sql:" + n.dir}, args...)...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	n.owner.run(cmd)
	out, err := cmd.Output()
	if err != nil {
		return nil, said(cmd, err, stderr.Bytes())
	}
	return out, nil
}
