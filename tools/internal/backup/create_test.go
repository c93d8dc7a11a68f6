package backup_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/backup"
	"github.com/infra-pki/infra-pki/tools/internal/pki"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

// newSource is a CA that one certificate was issued by, and what opens its backup.
func newSource(t *testing.T) (*postgrestest.Database, backup.Source, age.Identity) {
	t.Helper()
	return sourceOn(t, postgrestest.New(t))
}

func sourceOn(t *testing.T, d *postgrestest.Database) (*postgrestest.Database, backup.Source, age.Identity) {
	t.Helper()
	d.Migrate(t)
	dir := t.TempDir()
	s := backup.Source{
		Owner: postgres.Owner(d.Database, d.OwnerPassword, time.Minute), Parts: map[string]string{},
		Env: []byte("CA_PASSWORD='the CA'\nROOT_CA_PASSWORD='the root'\n"), Now: time.Now(),
	}
	for _, part := range slices.Concat(backup.Volumes, backup.Operators) {
		s.Parts[part] = filepath.Join(dir, part)
		require.NoError(t, os.Mkdir(s.Parts[part], 0o700))
	}
	store := pki.Store{Root: s.Parts[backup.RootCA], Certs: s.Parts[backup.Certs], Secrets: s.Parts[backup.Secrets]}
	names := pki.Names{PKI: "Test", RootLifetime: 48 * time.Hour, IntermediateLifetime: 24 * time.Hour, Now: s.Now}
	contents, err := store.Open(pki.Passwords{Root: "the root", CA: "the CA", Provisioner: "admin", SSHHost: "host"}, names, s.Now)
	require.NoError(t, err)
	for _, file := range contents.Missing() {
		require.NoError(t, file.Create())
	}
	owner := d.Owner(t)
	require.NoError(t, postgres.RecordRoot(t.Context(), owner, x509util.Fingerprint(contents.Root)))
	_, err = owner.Exec(t.Context(), "insert into public.x509_certs values ('1', 'a certificate')")
	require.NoError(t, err)
	identity, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	s.Recipients = []age.Recipient{identity.Recipient()}
	return d, s, identity
}

// hooked calls a function before the first byte.
type hooked struct {
	bytes.Buffer
	before func() error
}

func (h *hooked) Write(p []byte) (int, error) {
	if before := h.before; before != nil {
		h.before = nil
		if err := before(); err != nil {
			return 0, err
		}
	}
	return h.Buffer.Write(p)
}

// What is written to the database after the files were read is not in the backup, in
// none of its tables; and nobody waits for the rows to be copied.
func TestBackupIsOfOneMoment(t *testing.T) {
	d, source, identity := newSource(t)
	owner := d.Owner(t)
	out := &hooked{before: func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := owner.Exec(ctx, "insert into public.x509_certs values ('2', 'too late')")
		return errors.Join(err, postgres.Lock(ctx, owner, postgres.Provisioning))
	}}
	m, err := backup.Create(t.Context(), out, source)
	require.NoError(t, err)
	require.EqualValues(t, 1, m.Certificates)
	c, err := backup.Verify(&out.Buffer, []age.Identity{identity})
	require.NoError(t, err)
	require.Equal(t, *m, c.Manifest)
	require.NotContains(t, out.String(), "the CA")
}

// While provisioner-init makes keys, none are read.
func TestBackupWaitsForProvisionerInit(t *testing.T) {
	d, source, _ := newSource(t)
	require.NoError(t, postgres.Lock(t.Context(), d.Runtime(t), postgres.Provisioning))
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var out bytes.Buffer
	_, err := backup.Create(ctx, &out, source)
	require.EqualError(t, err, "waiting for another run of this program: it is still at work")
	require.Zero(t, out.Len())
}

// A disk that is full, a pipe that breaks.
func TestBackupThatCannotBeWrittenFails(t *testing.T) {
	_, source, _ := newSource(t)
	full := errors.New("no space left on device")
	_, err := backup.Create(t.Context(), &hooked{before: func() error { return full }}, source)
	require.ErrorIs(t, err, full)
}
