package stack

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// ClientName is the client's own name, under which the CA finds it for ACME.
const ClientName = "client.e2e.test"

// Client is a machine: that of Stack.Client with step, certbot, Caddy, openssl and curl on
// it, those of Stack.Machine with sshd. They are on the network through which step-ca
// reaches out, and reach the CA through the port that is published on this machine, as
// any other machine does.
type Client struct {
	t     testing.TB
	stack *Stack
	id    string
}

var (
	buildClient  = sync.OnceValue(func() error { return build(clientImage, "client") })
	buildMachine = sync.OnceValue(func() error { return build(machineImage, "host") })
	buildDesktop = sync.OnceValue(func() error { return build(desktopImage, "desktop") })
	// pkictl is a file with the program, got as "make pkictl" gets it.
	pkictl = sync.OnceValues(func() (string, error) {
		dir := directory(fmt.Sprintf("%s%d-pkictl", prefix, os.Getpid()))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return "", err
		}
		id, err := docker("create", toolsImage, "pkictl")
		if err != nil {
			return "", err
		}
		file := filepath.Join(dir, "pkictl")
		_, err = docker("cp", id+":/usr/local/bin/pkictl", file)
		_, gone := docker("rm", id)
		return file, errors.Join(err, gone)
	})
)

// build makes an image of a directory here.
func build(image, dir string) error {
	// On the host's network, as the images of the stack are built: a mirror on
	// localhost works then too. The default builder sees the images of this host.
	args := []string{"docker", "build", "--quiet", "--network", "host", "--tag", image}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"} {
		if os.Getenv(name) != "" {
			args = append(args, "--build-arg", name)
		}
	}
	_, err := docker(append(args[1:], filepath.Join(Repository(), "tools", "e2e", dir))...)
	return err
}

// Client starts the client, once a stack.
func (s *Stack) Client() *Client {
	s.t.Helper()
	if s.client == nil {
		require.NoError(s.t, buildClient())
		s.client = s.start(clientImage, ClientName, []string{"--init"})
		s.client.Copy(s.Trust(), "/trust")
	}
	s.client.t = s.t
	return s.client
}

// Machine starts a machine that has an sshd, pkictl and nothing else of ours.
func (s *Stack) Machine(name string) *Client {
	s.t.Helper()
	require.NoError(s.t, buildMachine())
	program, err := pkictl()
	require.NoError(s.t, err)
	c := s.start(machineImage, name, []string{"--init"})
	c.Copy(program, "/usr/local/bin/pkictl")
	return c
}

// Desktop starts a machine with a browser, Java and pkictl.
func (s *Stack) Desktop(name string) *Client {
	s.t.Helper()
	require.NoError(s.t, buildDesktop())
	program, err := pkictl()
	require.NoError(s.t, err)
	c := s.start(desktopImage, name, []string{"--init"})
	c.Copy(program, "/usr/local/bin/pkictl")
	return c
}

// SystemdMachine is a Machine whose first process is systemd.
func (s *Stack) SystemdMachine(name string) *Client {
	s.t.Helper()
	require.NoError(s.t, buildMachine())
	program, err := pkictl()
	require.NoError(s.t, err)
	// What systemd needs to mount and to make groups of processes; less than --privileged,
	// which not every host of Docker can give.
	c := s.start(machineImage, name, []string{
		"--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined", "--cgroupns", "private",
		"--tmpfs", "/run", "--tmpfs", "/run/lock", "--env", "container=docker",
	}, "sh", "-c", "mount -o remount,rw /sys/fs/cgroup; exec /lib/systemd/systemd")
	c.Copy(program, "/usr/local/bin/pkictl")
	var state Result
	for range 120 {
		if state = c.Run("systemctl", "is-system-running"); slices.Contains([]string{"running", "degraded"}, strings.TrimSpace(state.Stdout)) {
			return c
		}
		time.Sleep(500 * time.Millisecond)
	}
	missing(s.t, "systemd does not come up in a container here: %s", state.Output())
	return nil
}

func (s *Stack) start(image, name string, options []string, command ...string) *Client {
	s.t.Helper()
	network := s.Project + "_egress"
	gateway := Docker(s.t, "network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", network).OK(s.t)
	args := append([]string{
		"run", "--detach", "--label", label + "=" + s.Project, "--hostname", name, "--network", network, "--network-alias", name,
		"--add-host", Domain + ":" + strings.TrimSpace(gateway.Stdout),
	}, options...)
	id := Docker(s.t, append(append(args, image), command...)...).OK(s.t)
	return &Client{t: s.t, stack: s, id: strings.TrimSpace(id.Stdout)}
}

// Run runs a command on the client.
func (c *Client) Run(args ...string) Result {
	c.t.Helper()
	return c.exec(nil, args...)
}

// Shell runs a script on the client.
func (c *Client) Shell(script string) Result {
	c.t.Helper()
	return c.exec(nil, "bash", "-euo", "pipefail", "-c", script)
}

// Start leaves a command running on the client.
func (c *Client) Start(script string) {
	c.t.Helper()
	c.exec([]string{"--detach"}, "bash", "-c", script).OK(c.t)
}

func (c *Client) exec(options []string, args ...string) Result {
	c.t.Helper()
	full := append([]string{"docker", "exec"}, options...)
	r, err := run(working, command{args: append(append(full, c.id), args...)})
	require.NoError(c.t, err)
	r.redact = c.stack.Redact
	return r
}

// Copy puts a file or the content of a directory of this machine onto the client.
func (c *Client) Copy(from, to string) {
	c.t.Helper()
	if info, err := os.Stat(from); err == nil && info.IsDir() {
		c.Run("mkdir", "-p", to).OK(c.t)
		from += "/."
	}
	Docker(c.t, "cp", from, c.id+":"+to).OK(c.t)
}

// Write makes a file on the client.
func (c *Client) Write(path, content string) {
	c.t.Helper()
	file := filepath.Join(c.t.TempDir(), "content")
	require.NoError(c.t, os.WriteFile(file, []byte(content), 0o600))
	c.Copy(file, path)
}

// Read is a file on the client.
func (c *Client) Read(path string) string {
	c.t.Helper()
	return c.Run("cat", path).OK(c.t).Stdout
}

// Trust is a directory with what trust-export has published, taken as "make trust"
// takes it.
func (s *Stack) Trust() string {
	s.t.Helper()
	if s.trustDir == "" {
		dir, err := os.MkdirTemp(s.env.dir, "trust-")
		require.NoError(s.t, err)
		id := strings.TrimSpace(s.Compose("ps", "--all", "--quiet", "trust-export").OK(s.t).Stdout)
		Docker(s.t, "cp", id+":/trust/.", dir).OK(s.t)
		s.trustDir = dir
	}
	return s.trustDir
}

// Remove takes the machine away before the stack's end: its name is free then.
func (c *Client) Remove() { Docker(c.t, "rm", "--force", c.id) }
