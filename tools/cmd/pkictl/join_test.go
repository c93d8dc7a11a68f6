package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/x509util"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/sshd"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

// haveSSHD says whether there is an sshd; with CI set there has to be one.
func haveSSHD() (bool, error) {
	if !(sshd.Server{}).Installed() {
		if os.Getenv("CI") != "" {
			return false, errors.New("there is no sshd: apt-get install openssh-server")
		}
		return false, nil
	}
	if os.Geteuid() == 0 { // where a unit or an init script makes it
		return true, os.MkdirAll("/run/sshd", 0o755) //nolint:gosec // G301: as these make it
	}
	return true, nil
}

// hostKeys are made once: an RSA key takes its time.
var hostKeys = sync.OnceValues(func() (map[string][]byte, error) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	rs, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for name, key := range map[string]crypto.PrivateKey{"ed25519": ed, "ecdsa": ec, "rsa": rs} {
		block, err := ssh.MarshalPrivateKey(key, "")
		if err != nil {
			return nil, err
		}
		files["ssh_host_"+name+"_key"] = pem.EncodeToMemory(block)
	}
	return files, nil
})

// startSSHD DIR: an sshd of its own in $WORK/DIR, with keys of three kinds, and a
// configuration that ends in a Match block. $DIR is its address.
func startSSHD(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(filepath.Join(dir, "sshd_config.d"), 0o700))
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	ts.Check(err)
	_, port, err := net.SplitHostPort(l.Addr().String())
	ts.Check(err)
	ts.Check(l.Close())
	keys, err := hostKeys()
	ts.Check(err)
	var config strings.Builder
	fmt.Fprintf(&config, "Include %s/sshd_config.d/*.conf\nListenAddress 127.0.0.1:%s\nPidFile %s/sshd.pid\nLogLevel VERBOSE\n", dir, port, dir)
	for name, data := range keys {
		ts.Check(os.WriteFile(filepath.Join(dir, name), data, 0o600))
		fmt.Fprintf(&config, "HostKey %s/%s\n", dir, name)
	}
	config.WriteString("Match User nobody\n\tX11Forwarding no\n")
	file := filepath.Join(dir, "sshd_config")
	ts.Check(os.WriteFile(file, []byte(config.String()), 0o600))
	binary, err := exec.LookPath("/usr/sbin/sshd")
	ts.Check(err)
	server := exec.CommandContext(context.Background(), binary, "-D", "-f", file, "-E", filepath.Join(dir, "log"))
	ts.Check(server.Start())
	ts.Defer(func() {
		ts.Check(server.Process.Signal(syscall.SIGTERM))
		_ = server.Wait() // it was told to end
	})
	address := "127.0.0.1:" + port
	ts.Setenv(args[0], address)
	ts.Check(listens(address))
}

func listens(address string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "tcp", address)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stale CA NAME FILE: FILE gets a token for an SSH host certificate that ended a minute ago.
func stale(ts *testscript.TestScript, _ bool, args []string) {
	bundle, err := trustbundle.Read(filepath.Join(ts.MkAbs(args[0]), "certs", "root_ca.crt"), time.Now())
	ts.Check(err)
	client, err := stepca.New(ts.Getenv(args[0]), bundle.Roots()...)
	ts.Check(err)
	jwk, err := client.JWK(context.Background(), "ssh-host-jwk", stepcatest.Password)
	ts.Check(err)
	token, err := jwk.SSHHostToken(stepca.Host{
		CAURL: ts.Getenv(args[0]), Fingerprint: x509util.Fingerprint(bundle.Current()), Names: []string{args[1]}, Lifetime: -time.Minute,
	})
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), []byte(token), 0o600))
}

// A key may be there already, made by openssl, step or certbot.
func TestTLSKeyIsReadInAnyEncoding(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	sec1, err := x509.MarshalECPrivateKey(key)
	require.NoError(t, err)
	for name, block := range map[string]*pem.Block{
		"PKCS #8": {Type: "PRIVATE KEY", Bytes: pkcs8},
		"SEC 1":   {Type: "EC PRIVATE KEY", Bytes: sec1},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "key")
			require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(block), 0o600))
			read, data, err := tlsKey(file)
			require.NoError(t, err)
			require.True(t, key.PublicKey.Equal(read.Public()))
			require.Equal(t, pem.EncodeToMemory(block), data)
		})
	}
}
