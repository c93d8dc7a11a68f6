package anchor

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/smallstep/truststore"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// java is the trust store of one Java runtime: that of JAVA_HOME, or the one whose
// keytool is on the PATH.
type java struct {
	trust         *truststore.JavaTrust
	keytool, file string
	err           error
}

func javaStore() store {
	if os.Getenv("JAVA_HOME") == "" {
		if tool, err := exec.LookPath("keytool"); err == nil {
			if tool, err = filepath.EvalSymlinks(tool); err == nil {
				_ = os.Setenv("JAVA_HOME", filepath.Dir(filepath.Dir(tool))) // truststore looks there; else it finds nothing and says so
			}
		}
	}
	home := os.Getenv("JAVA_HOME")
	if home == "" {
		return java{err: errors.New("there is no keytool on the PATH, and JAVA_HOME is not set")}
	}
	trust, err := truststore.NewJavaTrust()
	if err != nil {
		return java{err: oneshot.WithHint(fmt.Errorf("JAVA_HOME is %q, which has no bin/keytool", home), "JAVA_HOME must name the directory of a Java runtime")}
	}
	// The second is that of a JDK before Java 9. truststore prefers it, too.
	j := java{trust: trust, keytool: filepath.Join(home, "bin", "keytool"), file: filepath.Join(home, "lib", "security", "cacerts")}
	if old := filepath.Join(home, "jre", "lib", "security", "cacerts"); exists(old) {
		j.file = old
	}
	if !exists(j.file) {
		j.err = fmt.Errorf("%q is missing", j.file)
	}
	return j
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (j java) where() string { return j.file }

func (j java) absent() error { return j.err }

func (j java) find(ctx context.Context, fingerprint string) (*x509.Certificate, bool, error) {
	cert, _, err := j.look(ctx, fingerprint)
	return cert, cert != nil, err
}

// look returns the alias, too: Debian's tools bring the system's roots into the store
// under aliases of theirs, and do not take away a root whose file is gone.
func (j java) look(ctx context.Context, fingerprint string) (cert *x509.Certificate, alias string, err error) {
	out, err := j.run(ctx, "-list", "-rfc")
	if err != nil {
		return nil, "", err
	}
	const label = "\nAlias name: "
	for item := range strings.SplitSeq(string(out), label) {
		if cert, err = find([]byte(item), fingerprint); cert != nil || err != nil {
			alias, _, _ = strings.Cut(item, "\n")
			return cert, strings.TrimSpace(alias), err
		}
	}
	return nil, "", nil
}

func (j java) install(_ context.Context, cert *x509.Certificate) error {
	return explainCommand(truststore.Install(cert, truststore.WithPrefix(prefix), truststore.WithNoSystem(), truststore.WithTrust(j.trust)))
}

func (j java) uninstall(ctx context.Context, cert *x509.Certificate) error {
	for {
		found, alias, err := j.look(ctx, x509util.Fingerprint(cert))
		if err != nil || found == nil {
			return err
		}
		if _, err := j.run(ctx, "-delete", "-alias", alias); err != nil {
			return err
		}
	}
}

// run speaks English with keytool. The password protects nothing: roots are public,
// and every Java comes with it.
func (j java) run(ctx context.Context, verb string, args ...string) ([]byte, error) {
	full := append([]string{j.keytool, "-J-Duser.language=en", verb, "-keystore", j.file, "-storepass", truststore.JavaStorePass}, args...)
	if f, err := os.OpenFile(j.file, os.O_WRONLY, 0); err == nil {
		_ = f.Close() // nothing was written
	} else if verb != "-list" {
		full = append([]string{"sudo", "--"}, full...)
	}
	cmd := exec.CommandContext(ctx, full[0], full[1:]...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, said(cmd, err, append(out, stderr.Bytes()...)) // it tells errors on standard output
	}
	return out, nil
}
