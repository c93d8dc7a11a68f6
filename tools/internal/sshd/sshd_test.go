package sshd

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// What sshd itself makes of all this is in cmd/pkictl/testdata/script/join*.txtar.

func TestAddress(t *testing.T) {
	tests := map[string]struct {
		lines []string
		want  string
	}{
		"everywhere is here":                  {[]string{"[::]:22", "0.0.0.0:22"}, "127.0.0.1:22"},
		"on IPv6 alone":                       {[]string{"[::]:2222"}, "[::1]:2222"},
		"the first of several of its own":     {[]string{"10.0.0.5:22", "10.0.0.6:22"}, "10.0.0.5:22"},
		"in a routing domain":                 {[]string{"10.0.0.5:22 rdomain blue"}, "10.0.0.5:22"},
		"what is no address is passed over":   {[]string{"", "10.0.0.5:22"}, "10.0.0.5:22"},
		"nothing is said about where":         {nil, ""},
		"everywhere beats one of its own":     {[]string{"10.0.0.5:22", "0.0.0.0:22"}, "127.0.0.1:22"},
		"everywhere on IPv6, then one of its": {[]string{"[::]:22", "10.0.0.5:22"}, "[::1]:22"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, tc.want, Effective{"listenaddress": tc.lines}.Address())
		})
	}
}

func TestNobodyAnswersAtNoAddress(t *testing.T) {
	require.False(t, Effective{}.Runs(t.Context()))
	require.False(t, Effective{"listenaddress": {"127.0.0.1:1"}}.Runs(t.Context()))
}

func TestDropIn(t *testing.T) {
	require.Equal(t, "/etc/ssh/sshd_config.d/infra-pki.conf", Server{}.DropIn())
	require.Equal(t, "/opt/ssh/sshd_config.d/infra-pki.conf", Server{Config: "/opt/ssh/config"}.DropIn())
	require.Equal(t, `# Written by "pkictl join"; "pkictl leave" takes it away.
HostCertificate /etc/ssh/a-cert.pub
HostCertificate /etc/ssh/b-cert.pub
TrustedUserCAKeys /etc/infra-pki/ssh_user_ca.pub
`, string(Content([]string{"/etc/ssh/a-cert.pub", "/etc/ssh/b-cert.pub"}, "/etc/infra-pki/ssh_user_ca.pub")))

	ours := Effective{"hostcertificate": {"/a", "/b"}, "trustedusercakeys": {"/ca"}}
	require.True(t, ours.Shows([]string{"/b", "/a"}, "/ca"))
	require.False(t, ours.Shows([]string{"/c"}, "/ca"))
	require.False(t, ours.Shows([]string{"/a"}, "/other"))
	require.Empty(t, ours.OtherUserCA("/ca"))
	require.Equal(t, "/ca", ours.OtherUserCA("/other"))
	require.Empty(t, Effective{"trustedusercakeys": {"none"}}.OtherUserCA("/ca"))
}

func TestKeys(t *testing.T) {
	dir := t.TempDir()
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	var paths []string
	for name, key := range map[string]any{"ed": ed, "rsa": rs} {
		block, err := ssh.MarshalPrivateKey(key, "")
		require.NoError(t, err)
		paths = append(paths, filepath.Join(dir, name))
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600))
	}
	paths = append(paths, filepath.Join(dir, "not-made"))
	all := "ssh-ed25519-cert-v01@openssh.com,rsa-sha2-256-cert-v01@openssh.com,ssh-ed25519,rsa-sha2-256"
	tests := map[string]struct {
		algorithms string
		keys       []string
		err, hint  string
	}{
		"each that is there":                 {all, []string{"ed", "rsa"}, "", ""},
		"one that sshd does not offer":       {"ssh-ed25519-cert-v01@openssh.com,ssh-ed25519", []string{"ed"}, "", ""},
		"one whose certificate is left out":  {"ssh-ed25519-cert-v01@openssh.com,ssh-ed25519,rsa-sha2-512", nil, `sshd offers the host key "` + filepath.Join(dir, "rsa") + `" and would not offer its certificate`, "add rsa-sha2-512-cert-v01@openssh.com to HostKeyAlgorithms in sshd's configuration"},
		"none that sshd offers is there":     {"ecdsa-sha2-nistp256", nil, "looking for sshd's host keys: there is none of", `"ssh-keygen -A" makes them`},
		"the certificate alone is not a key": {"ssh-ed25519-cert-v01@openssh.com", nil, "looking for sshd's host keys: there is none of", `"ssh-keygen -A" makes them`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			keys, err := Effective{"hostkeyalgorithms": {tc.algorithms}, "hostkey": paths}.Keys()
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				require.Equal(t, []string{tc.hint}, oneshot.Hints(err))
				return
			}
			require.NoError(t, err)
			var names []string
			for _, k := range keys {
				names = append(names, filepath.Base(k.Path))
			}
			require.ElementsMatch(t, tc.keys, names)
		})
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "ed"), []byte("half"), 0o600))
	_, err = Effective{"hostkeyalgorithms": {all}, "hostkey": paths}.Keys()
	require.ErrorContains(t, err, `reading the host key "`+filepath.Join(dir, "ed")+`"`)
}
