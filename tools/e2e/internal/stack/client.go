package stack

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// ClientName is the client's own name, under which the CA finds it for ACME.
const ClientName = "client.e2e.test"

// Client is a machine with step, certbot, Caddy, openssl and curl on it, on the
// network through which step-ca reaches out. It reaches the CA through the port
// that is published on this machine, as any other machine does.
type Client struct {
	t     testing.TB
	stack *Stack
	id    string
}

var buildClient = sync.OnceValue(func() error {
	// On the host's network, as the images of the stack are built: a mirror on
	// localhost works then too. The default builder sees the images of this host.
	args := []string{"docker", "build", "--quiet", "--network", "host", "--tag", clientImage}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"} {
		if os.Getenv(name) != "" {
			args = append(args, "--build-arg", name)
		}
	}
	_, err := docker(append(args[1:], filepath.Join(Repository(), "tools", "e2e", "client"))...)
	return err
})

// Client starts the client, once a stack.
func (s *Stack) Client() *Client {
	s.t.Helper()
	if s.client == nil {
		require.NoError(s.t, buildClient())
		network := s.Project + "_egress"
		gateway := Docker(s.t, "network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", network).OK(s.t)
		id := Docker(s.t, "run", "--detach", "--init", "--label", label+"="+s.Project,
			"--network", network, "--network-alias", ClientName,
			"--add-host", Domain+":"+strings.TrimSpace(gateway.Stdout), clientImage).OK(s.t)
		s.client = &Client{stack: s, id: strings.TrimSpace(id.Stdout)}
		s.client.t = s.t
		s.client.Copy(s.Trust(), "/trust")
	}
	s.client.t = s.t
	return s.client
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
