package trustbundle

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"
)

func TestParseSSHKey(t *testing.T) {
	line := sshLine(t, newKey(t).Public())
	edPublic, edPrivate, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	small, err := rsa.GenerateKey(rand.Reader, 1024) //nolint:gosec // to see it refused
	require.NoError(t, err)
	large, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	big521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	require.NoError(t, err)
	tests := map[string]struct {
		data string
		want string // error
	}{
		"an ECDSA key is taken":              {line + "\n", ""},
		"a comment and a missing line end":   {line + " host CA of 2026", ""},
		"an Ed25519 key is taken":            {sshLine(t, edPublic), ""},
		"an RSA key is taken":                {sshLine(t, large.Public()), ""},
		"a P-521 key is taken":               {sshLine(t, big521.Public()), ""},
		"an RSA key that is too short":       {sshLine(t, small.Public()), "it is an RSA key of fewer than 2048 bits"},
		"a certificate instead of its CA":    {certificate(t, edPublic, edPrivate), `a key of type "ssh-ed25519-cert-v01@openssh.com" is none that an SSH CA signs with`},
		"two keys":                           {line + "\n" + line, "it has more than one line"},
		"a comment line above":               {"# CA\n" + line, "it has more than one line"},
		"options":                            {`cert-authority,command="id" ` + line, "it has options before the key"},
		"an empty file":                      {"\n", "it is empty"},
		"something else":                     {"hello world", "it is not an SSH public key"},
		"a private key":                      {"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", "it has a private key in it"},
		"a private key below the public one": {line + "\n-----BEGIN PRIVATE KEY-----\n", "it has a private key in it"},
		"a huge file":                        {strings.Repeat(" ", maxSSHKey+1), "it is larger than 16384 bytes"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			key, err := ParseSSHKey([]byte(tc.data))
			if tc.want != "" {
				require.EqualError(t, err, tc.want)
				return
			}
			require.NoError(t, err)
			require.True(t, strings.HasPrefix(tc.data, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))))
			marker, hosts, known, _, _, err := ssh.ParseKnownHosts(KnownHosts(key))
			require.NoError(t, err)
			require.Equal(t, "cert-authority", marker)
			require.Equal(t, []string{"*"}, hosts)
			require.Equal(t, key.Marshal(), known.Marshal())
		})
	}
}

func sshLine(t *testing.T, public any) string {
	t.Helper()
	key, err := ssh.NewPublicKey(public)
	require.NoError(t, err)
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

func certificate(t *testing.T, public ed25519.PublicKey, private ed25519.PrivateKey) string {
	t.Helper()
	key, err := ssh.NewPublicKey(public)
	require.NoError(t, err)
	signer, err := ssh.NewSignerFromKey(private)
	require.NoError(t, err)
	cert := &ssh.Certificate{Key: key, CertType: ssh.HostCert, ValidBefore: ssh.CertTimeInfinity}
	require.NoError(t, cert.SignCert(rand.Reader, signer))
	return string(ssh.MarshalAuthorizedKey(cert))
}
