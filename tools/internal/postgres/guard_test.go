package postgres_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	acmedb "github.com/smallstep/certificates/acme/db/nosql"
	"github.com/smallstep/certificates/db"
	"github.com/smallstep/nosql"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

// openAsStepCA opens the database by step-ca's own code, with the data source that
// stands in ca.json and the password from a passfile. It makes the tables, as
// step-ca does at every start.
func openAsStepCA(t *testing.T, d *postgrestest.Database) db.AuthDB {
	t.Helper()
	passfile := filepath.Join(t.TempDir(), "pgpass")
	require.NoError(t, os.WriteFile(passfile, []byte(postgres.PassfileLine(d.Database, d.RuntimePassword)), 0o600))
	return open(t, postgres.RuntimeDSN(d.Database, passfile))
}

func open(t *testing.T, dsn string) db.AuthDB {
	t.Helper()
	opened, err := db.New(&db.Config{Type: "postgresql", DataSource: dsn})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, opened.Shutdown()) })
	_, err = acmedb.New(opened.(nosql.DB))
	require.NoError(t, err)
	return opened
}

// Eight requests with the same token at once, fifty times over, through step-ca's
// own code: one of them wins. The guard is what makes it so, and it comes before
// the test can believe its own answer: without it there are rounds with several.
func TestOneTimeTokenIsUsedOnce(t *testing.T) {
	const rounds, racers = 50, 8
	d := postgrestest.New(t)
	d.Migrate(t)
	ca := openAsStepCA(t, d)

	race := func(t *testing.T, name string) (winners [rounds]int) {
		t.Helper()
		for round := range rounds {
			var won atomic.Int32
			var racing sync.WaitGroup
			start := make(chan struct{})
			for racer := range racers {
				racing.Go(func() {
					<-start
					// Each request carries its own bytes, as two tokens may share an id.
					ok, err := ca.UseToken(fmt.Sprint(name, round), fmt.Sprint("token", racer))
					if ok && err == nil {
						won.Add(1)
					}
				})
			}
			close(start)
			racing.Wait()
			winners[round] = int(won.Load())
		}
		return winners
	}

	for round, winners := range race(t, "guarded") {
		require.Equal(t, 1, winners, "round %d", round)
	}
	var stored int
	require.NoError(t, d.Owner(t).QueryRow(t.Context(), "select count(*) from public.used_ott").Scan(&stored))
	require.Equal(t, rounds, stored)

	_, err := d.Owner(t).Exec(t.Context(), "drop trigger used_ott_once on public.used_ott")
	require.NoError(t, err)
	several := 0
	for _, winners := range race(t, "unguarded") {
		if winners > 1 {
			several++
		}
	}
	require.Positive(t, several, "without the guard no token was used twice, so the test above proves nothing")
	t.Logf("without the guard %d of %d tokens were used more than once", several, rounds)
}

func TestUsedTokenIsRefusedLater(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ca := openAsStepCA(t, d)
	for i, want := range []bool{true, false, false} {
		used, err := ca.UseToken("id", "token")
		require.NoError(t, err, i)
		require.Equal(t, want, used, i)
	}
}

// The key that enrols SSH hosts revokes nothing, through step-ca's own code; every
// other provisioner does. Without the guards it does too, so they are the reason.
func TestHostEnrolmentRevokesNothing(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ca := openAsStepCA(t, d)
	revoke := map[string]func(*db.RevokedCertificateInfo) error{"revoked_x509_certs": ca.Revoke, "revoked_ssh_certs": ca.RevokeSSH}
	others := []string{"admin:kid", "sshpop/ssh-pop", "acme/acme", "ssh-host-jwk2:kid", "x-ssh-host-jwk:kid", ""}
	owner := d.Owner(t)
	for table, revoke := range revoke {
		t.Run(table, func(t *testing.T) {
			for _, by := range others {
				require.NoError(t, revoke(&db.RevokedCertificateInfo{
					Serial: by, ProvisionerID: by, Reason: `"ProvisionerID":"ssh-host-jwk:kid"`,
				}), by)
			}
			enrolment := []*db.RevokedCertificateInfo{
				{Serial: "1", ProvisionerID: "ssh-host-jwk:kid"},
				{Serial: "2", ProvisionerID: "ssh-host-jwk:"},
				{Serial: "3", ProvisionerID: "ssh-host-jwk:kid", Reason: `","ProvisionerID":"admin:kid`},
				{Serial: "4", ProvisionerID: "ssh-host-jwk:kid", Reason: "\x00\xff\u2028"}, // PostgreSQL's JSON knows no NUL
			}
			for _, r := range enrolment {
				require.Error(t, revoke(r), r.Serial)
			}
			_, err := d.Runtime(t).Exec(t.Context(), "update "+table+" set nvalue = $1", []byte(`{"ProvisionerID":"ssh-host-jwk:kid"}`))
			require.Equal(t, "42501", codeOf(err))
			var stored int
			require.NoError(t, owner.QueryRow(t.Context(), "select count(*) from public."+table).Scan(&stored))
			require.Equal(t, len(others), stored)

			_, err = owner.Exec(t.Context(), "drop trigger "+table+"_by on public."+table)
			require.NoError(t, err)
			for _, r := range enrolment {
				require.NoError(t, revoke(r), r.Serial)
			}
		})
	}
}
