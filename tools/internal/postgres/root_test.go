package postgres_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

func TestRootIsRecordedOnce(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ctx, conn := t.Context(), d.Runtime(t)
	ours, other := strings.Repeat("a1", 32), strings.Repeat("b2", 32)

	recorded, err := postgres.Root(ctx, conn)
	require.NoError(t, err)
	require.Empty(t, recorded)

	for range 2 { // a run that was killed records it again
		require.NoError(t, postgres.RecordRoot(ctx, conn, ours))
		recorded, err = postgres.Root(ctx, conn)
		require.NoError(t, err)
		require.Equal(t, ours, recorded)
	}
	require.EqualError(t, postgres.RecordRoot(ctx, conn, other), "recording root "+other+": the database belongs to root "+ours)
	recorded, err = postgres.Root(ctx, conn)
	require.NoError(t, err)
	require.Equal(t, ours, recorded)
}

func TestWhatIsNoFingerprintIsNotRecorded(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	conn := d.Runtime(t)
	for name, text := range map[string]string{
		"nothing": "", "too short": strings.Repeat("a", 63), "too long": strings.Repeat("a", 65),
		"upper case": strings.Repeat("A", 64), "colons": strings.Repeat("aa:", 21) + "a", "a line end": strings.Repeat("a", 64) + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, "23514", codeOf(postgres.RecordRoot(t.Context(), conn, text)))
		})
	}
}

func TestUnmigratedDatabaseIsAnErrorAndNotAnAbsentRoot(t *testing.T) {
	d := postgrestest.New(t)
	_, err := postgres.Root(t.Context(), d.Owner(t))
	require.EqualError(t, err, `reading the recorded root: relation "infra_pki.root" does not exist (SQLSTATE 42P01)`)
}

func TestHasCertificates(t *testing.T) {
	for _, table := range []string{"x509_certs", "ssh_certs"} {
		t.Run(table, func(t *testing.T) {
			d := postgrestest.New(t)
			d.Migrate(t)
			conn := d.Runtime(t)
			issued, err := postgres.HasCertificates(t.Context(), conn)
			require.NoError(t, err)
			require.False(t, issued)
			_, err = conn.Exec(t.Context(), "insert into "+table+" values ('serial', 'certificate')")
			require.NoError(t, err)
			issued, err = postgres.HasCertificates(t.Context(), conn)
			require.NoError(t, err)
			require.True(t, issued)
		})
	}
}

func TestLock(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ctx := t.Context()
	first, second := d.Runtime(t), d.Runtime(t)
	require.NoError(t, postgres.Lock(ctx, first, postgres.Provisioning))
	require.NoError(t, postgres.Lock(ctx, second, postgres.Migrating), "another work is not kept waiting")

	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	require.EqualError(t, postgres.Lock(short, d.Runtime(t), postgres.Provisioning),
		"waiting for another run of this program: it is still at work")

	got := make(chan error, 1)
	go func() { got <- postgres.Lock(ctx, second, postgres.Provisioning) }()
	require.Never(t, func() bool { return len(got) > 0 }, 300*time.Millisecond, 50*time.Millisecond)
	require.NoError(t, first.Close(ctx))
	require.NoError(t, <-got)
}
