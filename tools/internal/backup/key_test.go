package backup

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"io"
	"strings"
	"testing"

	"filippo.io/age"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/ssh"
)

func sshKey(t *testing.T, passphrase string) (public string, private []byte) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	sshPub, err := ssh.NewPublicKey(pub)
	require.NoError(t, err)
	var block *pem.Block
	if passphrase == "" {
		block, err = ssh.MarshalPrivateKey(key, "")
	} else {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte(passphrase))
	}
	require.NoError(t, err)
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(sshPub))), pem.EncodeToMemory(block)
}

// Whoever is a recipient opens what is encrypted, and so does the writer itself while
// it writes.
func TestRecipientsOpen(t *testing.T) {
	one, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	two, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	quantum, err := age.GenerateHybridIdentity()
	require.NoError(t, err)
	public, private := sshKey(t, "")
	tests := map[string]struct {
		setting    string
		identities []string
	}{
		"one key of age":                            {one.Recipient().String(), []string{one.String()}},
		"two, separated by a comma":                 {one.Recipient().String() + ", " + two.Recipient().String(), []string{one.String(), two.String()}},
		"two, separated by white space":             {" " + one.Recipient().String() + "\t" + two.Recipient().String() + " ", []string{one.String(), two.String()}},
		"two, on lines of their own":                {one.Recipient().String() + "\r\n" + two.Recipient().String() + "\n", []string{one.String(), two.String()}},
		"a key of SSH with a comment":               {public + " me@host", []string{string(private)}},
		"a key of age and one of SSH":               {one.Recipient().String() + "," + public, []string{one.String(), string(private)}},
		"one that holds against a quantum computer": {quantum.Recipient().String(), []string{quantum.String()}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			recipients, err := ParseRecipients(tc.setting)
			require.NoError(t, err)
			require.Len(t, recipients, len(tc.identities))
			var fileKey []byte
			var listeners []age.Recipient
			for _, r := range recipients {
				listeners = append(listeners, listening{r, &fileKey})
			}
			var sealed bytes.Buffer
			w, err := age.Encrypt(&sealed, listeners...)
			require.NoError(t, err)
			_, err = io.WriteString(w, "secret")
			require.NoError(t, err)
			require.NoError(t, w.Close())
			opens := []age.Identity{heard{&fileKey}}
			for _, text := range tc.identities {
				identities, err := ParseIdentities([]byte(text))
				require.NoError(t, err)
				opens = append(opens, identities...)
			}
			for _, identity := range opens {
				r, err := age.Decrypt(bytes.NewReader(sealed.Bytes()), identity)
				require.NoError(t, err)
				got, err := io.ReadAll(r)
				require.NoError(t, err)
				require.Equal(t, "secret", string(got))
			}
		})
	}
}

func TestRecipientsRefused(t *testing.T) {
	identity, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	tests := map[string]struct{ setting, want string }{
		"no key at all":         {"hunter2", `BACKUP_RECIPIENTS has an item that is no public key of age or SSH: "hunter2"`},
		"a key that is cut":     {identity.Recipient().String()[:40], "BACKUP_RECIPIENTS has an item that is no public key of age or SSH"},
		"half a line of SSH":    {"ssh-ed25519", `BACKUP_RECIPIENTS has an SSH key that is not one, or not of ssh-ed25519 or ssh-rsa: "ssh-ed25519"`},
		"the private half":      {identity.String(), "BACKUP_RECIPIENTS has a private key in it"},
		"a good one and a typo": {identity.Recipient().String() + ",x", `BACKUP_RECIPIENTS has an item that is no public key of age or SSH: "x"`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := ParseRecipients(tc.setting)
			require.ErrorContains(t, err, tc.want)
			require.NotContains(t, err.Error(), "AGE-SECRET-KEY-")
		})
	}
	none, err := ParseRecipients(" ,\n")
	require.NoError(t, err)
	require.Empty(t, none)
}

func TestIdentitiesRefused(t *testing.T) {
	_, locked := sshKey(t, "a passphrase")
	for name, text := range map[string]string{
		"nothing":                      "",
		"a password":                   "hunter2",
		"an SSH key with a passphrase": string(locked),
		"half an SSH key":              "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2",
		"an encrypted identity":        ageIntro + "-> scrypt hunter2",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseIdentities([]byte(text))
			require.ErrorContains(t, err, "reading the identity: ")
			require.NotContains(t, err.Error(), "hunter2")
		})
	}
}

// Names in an archive lead into a part and nowhere else.
func TestNamesOfFiles(t *testing.T) {
	for name, part := range map[string]string{
		"env": Env, "certs/root_ca.crt": Certs, "templates/deep/er.tpl": Templates, "provisioners.d/a b.json": Provisioners,
		"": "", "certs": "", "certs/": "", "env/x": "", "/certs/x": "", "certs/../x": "", "certs//x": "", "./certs/x": "",
		"certs/..": "", `certs/..\x`: "", "certs/\x00": "", "postgres-data/x": "", "Certs/x": "",
	} {
		require.Equal(t, part, partOf(name), "%q", name)
	}
}

// Whatever comes over standard input, it is divided or refused, and no archive is read
// from it that is none.
func FuzzSplit(f *testing.F) {
	identity, err := age.GenerateX25519Identity()
	require.NoError(f, err)
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, identity.Recipient())
	require.NoError(f, err)
	require.NoError(f, w.Close())
	f.Add([]byte(identity.String() + "\n" + sealed.String()))
	f.Add([]byte(identity.String() + "\n\n" + ageIntro))
	f.Add([]byte(ageIntro))
	f.Add([]byte(strings.Repeat("#", maxIdentity)))
	f.Fuzz(func(t *testing.T, data []byte) {
		identities, rest, err := Split(bytes.NewReader(data))
		if err != nil {
			require.Empty(t, identities)
			return
		}
		require.NotEmpty(t, identities)
		_, err = Verify(rest, identities)
		require.ErrorContains(t, err, "reading the archive: ")
	})
}
