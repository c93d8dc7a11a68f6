// Package sshd gives OpenSSH's server the certificates of its host keys, without
// touching the operator's own configuration: by one file in sshd_config.d. sshd
// judges every step itself (sshd -t, sshd -T, and in the end a connection).
package sshd

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/enrol"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const (
	defaultConfig = "/etc/ssh/sshd_config"
	dropInName    = "infra-pki.conf"

	commandTimeout = 20 * time.Second
	dialTimeout    = 3 * time.Second
	reloadTimeout  = 10 * time.Second
)

// Server is the sshd of this machine.
type Server struct {
	Config string // its configuration; empty for its own default
}

// DropIn is the file that is ours.
func (s Server) DropIn() string { return filepath.Join(s.dropInDir(), dropInName) }

func (s Server) dropInDir() string {
	config := s.Config
	if config == "" {
		config = defaultConfig
	}
	return filepath.Join(filepath.Dir(config), "sshd_config.d")
}

// Content of the drop-in. It names no HostKey: as soon as one is named, sshd offers
// no other (sshd_config(5)).
func Content(certs []string, userCA string) []byte {
	var b bytes.Buffer
	b.WriteString("# Written by \"pkictl join\"; \"pkictl leave\" takes it away.\n")
	for _, cert := range certs {
		fmt.Fprintf(&b, "HostCertificate %s\n", cert)
	}
	fmt.Fprintf(&b, "TrustedUserCAKeys %s\n", userCA)
	return b.Bytes()
}

// Effective is what sshd makes of its configuration, outside of Match blocks.
type Effective map[string][]string // by keyword, in lower case

// Effective asks sshd, which fails as well if it would not start.
func (s Server) Effective(ctx context.Context) (Effective, error) {
	out, err := s.run(ctx, "-T")
	if err != nil {
		return nil, oneshot.WithHint(fmt.Errorf("reading sshd's configuration: %w", err), `repair it until "sshd -t" says nothing`)
	}
	e := Effective{}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		keyword, value, _ := strings.Cut(lines.Text(), " ")
		e[keyword] = append(e[keyword], value)
	}
	return e, nil
}

// Test asks sshd whether it would start with its configuration.
func (s Server) Test(ctx context.Context) error {
	if _, err := s.run(ctx, "-t"); err != nil {
		return fmt.Errorf("testing sshd's configuration: %w", err)
	}
	return nil
}

// Installed says whether there is an sshd.
func (s Server) Installed() bool {
	_, err := binary()
	return err == nil
}

// binary is an absolute path: sshd insists on that.
func binary() (string, error) {
	path, err := exec.LookPath("sshd")
	if err != nil {
		// Not everybody's PATH has it, cron's for example.
		path, err = exec.LookPath("/usr/sbin/sshd")
	}
	if err != nil {
		return "", oneshot.WithHint(errors.New("looking for sshd: it is neither in PATH nor in /usr/sbin"), "install OpenSSH's server (openssh-server)")
	}
	return filepath.Abs(path)
}

func (s Server) run(ctx context.Context, args ...string) ([]byte, error) {
	path, err := binary()
	if err != nil {
		return nil, err
	}
	if s.Config != "" {
		args = append(args, "-f", s.Config)
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, strings.Join(strings.FieldsFunc(stderr.String(), func(c rune) bool { return c == '\n' || c == '\r' }), "; "))
	}
	return stdout.Bytes(), nil
}

// Key is a host key that sshd offers.
type Key struct {
	Path    string // of the private key
	Private crypto.Signer
	Public  ssh.PublicKey
}

// algorithms of keys: what sshd has to offer the key and its certificate with.
var algorithms = map[string]struct{ plain, certificate []string }{
	ssh.KeyAlgoED25519:  {[]string{ssh.KeyAlgoED25519}, []string{ssh.CertAlgoED25519v01}},
	ssh.KeyAlgoECDSA256: {[]string{ssh.KeyAlgoECDSA256}, []string{ssh.CertAlgoECDSA256v01}},
	ssh.KeyAlgoECDSA384: {[]string{ssh.KeyAlgoECDSA384}, []string{ssh.CertAlgoECDSA384v01}},
	ssh.KeyAlgoECDSA521: {[]string{ssh.KeyAlgoECDSA521}, []string{ssh.CertAlgoECDSA521v01}},
	ssh.KeyAlgoRSA:      {[]string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}, []string{ssh.CertAlgoRSASHA512v01, ssh.CertAlgoRSASHA256v01}},
}

// Keys returns the host keys that are there and that sshd offers. A key that sshd
// offers and whose certificate it would not is an error.
func (e Effective) Keys() ([]Key, error) {
	offered := strings.Split(strings.Join(e["hostkeyalgorithms"], ","), ",")
	has := func(names []string) bool {
		return slices.ContainsFunc(names, func(n string) bool { return slices.Contains(offered, n) })
	}
	var keys []Key
	var problems []error
	for _, path := range e["hostkey"] {
		private, err := enrol.ReadKey(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // sshd names its defaults, whether they are there or not
		}
		if err != nil {
			return nil, err
		}
		public, err := ssh.NewPublicKey(private.Public())
		if err != nil {
			return nil, fmt.Errorf("reading the host key %q: %w", path, err)
		}
		known, ok := algorithms[public.Type()]
		switch {
		case !ok || !has(known.plain):
			continue
		case !has(known.certificate):
			problems = append(problems, oneshot.WithHint(fmt.Errorf("sshd offers the host key %q and would not offer its certificate", path),
				"add %s to HostKeyAlgorithms in sshd's configuration", known.certificate[0]))
		}
		keys = append(keys, Key{Path: path, Private: private, Public: public})
	}
	if len(keys) == 0 && len(problems) == 0 {
		return nil, oneshot.WithHint(fmt.Errorf("looking for sshd's host keys: there is none of %q", e["hostkey"]), `"ssh-keygen -A" makes them`)
	}
	return keys, errors.Join(problems...)
}

// OtherUserCA is a TrustedUserCAKeys that is not ours, if there is one. sshd takes
// the first that it reads, and somebody relies on that one.
func (e Effective) OtherUserCA(ours string) string {
	if got := strings.Join(e["trustedusercakeys"], ""); got != ours && got != "none" {
		return got
	}
	return ""
}

// Shows says whether the configuration has what the drop-in says.
func (e Effective) Shows(certs []string, userCA string) bool {
	for _, cert := range certs {
		if !slices.Contains(e["hostcertificate"], cert) {
			return false
		}
	}
	return slices.Contains(e["trustedusercakeys"], userCA)
}

// Includes tests whether there is a place for the drop-in.
func (s Server) Includes() error {
	if info, err := os.Stat(s.dropInDir()); err != nil || !info.IsDir() {
		return oneshot.WithHint(fmt.Errorf("looking for sshd's drop-in files: there is no directory %q", s.dropInDir()), "make it, and %s", s.include())
	}
	return nil
}

// include is what the operator has to do for the drop-in.
func (s Server) include() string {
	return fmt.Sprintf("put this line at the top of sshd_config, above everything else: Include %s", filepath.Join(s.dropInDir(), "*.conf"))
}

// Check is for after the drop-in was written: sshd takes it, and reads it.
func (s Server) Check(ctx context.Context, certs []string, userCA string) error {
	if err := s.Test(ctx); err != nil {
		return oneshot.WithHint(fmt.Errorf("sshd does not take %q: %w", s.DropIn(), err), "%s", s.include())
	}
	e, err := s.Effective(ctx)
	if err != nil {
		return err
	}
	if !e.Shows(certs, userCA) {
		return oneshot.WithHint(fmt.Errorf("sshd does not read %q", s.DropIn()), "%s", s.include())
	}
	return nil
}

// Address is where sshd can be reached on this machine.
func (e Effective) Address() string {
	best := ""
	for _, line := range e["listenaddress"] {
		address, _, _ := strings.Cut(line, " ")
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			continue
		}
		switch host {
		case "0.0.0.0":
			return net.JoinHostPort("127.0.0.1", port)
		case "::":
			host = "::1"
		}
		if best == "" {
			best = net.JoinHostPort(host, port)
		}
	}
	return best
}

// Runs says whether somebody answers at sshd's address.
func (e Effective) Runs(ctx context.Context) bool {
	conn, err := dial(ctx, e.Address())
	if err != nil {
		return false
	}
	_ = conn.Close() // nothing was said
	return true
}

func dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	return d.DialContext(ctx, "tcp", address)
}

// Offers says whether sshd shows this certificate to clients that want one.
func (e Effective) Offers(ctx context.Context, cert *ssh.Certificate) bool {
	conn, err := dial(ctx, e.Address())
	if err != nil {
		return false
	}
	defer conn.Close()                                    //nolint:errcheck // nothing to lose
	_ = conn.SetDeadline(time.Now().Add(2 * dialTimeout)) // a TCP connection takes one
	seen := false
	// It ends as soon as the key is known: nobody logs in.
	_, _, _, err = ssh.NewClientConn(conn, e.Address(), &ssh.ClientConfig{
		User:              "pkictl",
		HostKeyAlgorithms: algorithms[cert.Key.Type()].certificate,
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			seen = bytes.Equal(key.Marshal(), cert.Marshal())
			return errors.New("seen")
		},
	})
	return err != nil && seen
}

// Reload has a running sshd read its configuration and certificates, and returns
// when it offers these.
func (s Server) Reload(ctx context.Context, e Effective, certs ...*ssh.Certificate) error {
	if err := s.hangUp(ctx, e); err != nil {
		return fmt.Errorf("reloading sshd: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, reloadTimeout)
	defer cancel()
	// Few attempts: sshd counts clients who come and go (PerSourcePenalties).
	for wait := 50 * time.Millisecond; ; wait *= 2 {
		missing := slices.IndexFunc(certs, func(c *ssh.Certificate) bool { return !e.Offers(ctx, c) })
		if missing < 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("reloading sshd: at %s it does not offer the certificate of its %s key", e.Address(), certs[missing].Key.Type())
		case <-time.After(wait):
		}
	}
}

func (s Server) hangUp(ctx context.Context, e Effective) error {
	// A configuration of its own is not that of the unit.
	if _, err := os.Stat("/run/systemd/system"); err == nil && s.Config == "" {
		for _, unit := range []string{"ssh.service", "sshd.service"} {
			if exec.CommandContext(ctx, "systemctl", "is-active", "--quiet", unit).Run() == nil {
				if said, err := exec.CommandContext(ctx, "systemctl", "reload", unit).CombinedOutput(); err != nil {
					return fmt.Errorf("systemctl reload %s: %w: %s", unit, err, bytes.TrimSpace(said))
				}
				return nil
			}
		}
		return nil // started by a socket, anew for each connection
	}
	file := strings.Join(e["pidfile"], "")
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || pid < 2 {
		return fmt.Errorf("%q holds no process ID", file)
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil || !strings.HasPrefix(string(name), "sshd") {
		return fmt.Errorf("the process %d of %q is not sshd", pid, file)
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return process.Signal(syscall.SIGHUP)
}
