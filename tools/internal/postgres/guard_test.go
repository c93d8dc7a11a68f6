package postgres_test

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/smallstep/certificates/acme"
	acmedb "github.com/smallstep/certificates/acme/db/nosql"
	"github.com/smallstep/certificates/db"
	"github.com/smallstep/nosql"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/jose"

	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

// openAsStepCA opens the database by step-ca's own code, with the data source that
// stands in ca.json and the password from a passfile. It makes the tables, as
// step-ca does at every start.
func openAsStepCA(t *testing.T, d *postgrestest.Database) stepCA {
	t.Helper()
	passfile := filepath.Join(t.TempDir(), "pgpass")
	require.NoError(t, os.WriteFile(passfile, []byte(postgres.PassfileLine(d.Database, d.RuntimePassword)), 0o600))
	return open(t, postgres.RuntimeDSN(d.Database, passfile))
}

// openAsItsOwn is a step-ca that was there before: it owns the database.
func openAsItsOwn(t *testing.T, d *postgrestest.Database) stepCA {
	t.Helper()
	return open(t, (&url.URL{
		Scheme: "postgresql", User: url.UserPassword(d.Database.Owner, d.OwnerPassword.Reveal()),
		Host: d.Address(), Path: "/" + d.Name, RawQuery: "sslmode=" + d.SSLMode,
	}).String())
}

type stepCA struct {
	db.AuthDB
	acme *acmedb.DB
}

func open(t *testing.T, dsn string) stepCA {
	t.Helper()
	opened, err := db.New(&db.Config{Type: "postgresql", DataSource: dsn})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, opened.Shutdown()) })
	acme, err := acmedb.New(opened.(nosql.DB))
	require.NoError(t, err)
	return stepCA{opened, acme}
}

// Eight requests at once, fifty times over, through step-ca's own code: one of them
// wins, and the others are told so. The guard is what makes it so, and it comes before
// the test can believe its own answer: without it there are rounds with several winners.
func TestOneOfEightWins(t *testing.T) {
	const rounds, racers = 50, 8
	type racer func(number int) error
	tests := map[string]struct {
		table, guard string
		prepare      func(t *testing.T, ca stepCA, round string) racer
		told         string // the losers
		rows         int    // left of each round
		counted      string // where, if not in table
	}{
		"a one-time token is used": {
			table: "used_ott", guard: "used_ott_once", rows: 1,
			prepare: func(_ *testing.T, ca stepCA, round string) racer {
				return func(number int) error {
					// Each request carries its own bytes, as two tokens may share an id.
					ok, err := ca.UseToken(round, fmt.Sprint("token", number))
					if err == nil && !ok {
						err = errors.New("used before")
					}
					return err
				}
			},
			told: "used before|row already exists in used_ott",
		},
		"an ACME nonce is consumed": {
			table: "nonces", guard: "nonces_once", rows: 0,
			prepare: func(t *testing.T, ca stepCA, _ string) racer {
				t.Helper()
				nonce, err := ca.acme.CreateNonce(t.Context())
				require.NoError(t, err)
				return func(int) error { return ca.acme.DeleteNonce(t.Context(), nonce) }
			},
			told: "^nonce .* not found$|nonce is already used",
		},
		"a TLS certificate is revoked": {
			table: "revoked_x509_certs", guard: "revoked_x509_certs_once", rows: 1,
			prepare: func(_ *testing.T, ca stepCA, round string) racer {
				return func(number int) error {
					return ca.Revoke(&db.RevokedCertificateInfo{Serial: round, Reason: fmt.Sprint(number)})
				}
			},
			told: "already exists|certificate is already revoked",
		},
		"an SSH certificate is revoked": {
			table: "revoked_ssh_certs", guard: "revoked_ssh_certs_once", rows: 1,
			prepare: func(_ *testing.T, ca stepCA, round string) racer {
				return func(number int) error {
					return ca.RevokeSSH(&db.RevokedCertificateInfo{Serial: round, Reason: fmt.Sprint(number)})
				}
			},
			told: "already exists|certificate is already revoked",
		},
		"an ACME account is made for a key": {
			table: "acme_keyID_accountID_index", guard: "acme_keyID_accountID_index_once", rows: 1, counted: "acme_accounts",
			prepare: func(t *testing.T, ca stepCA, _ string) racer {
				t.Helper()
				key, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "", 0)
				require.NoError(t, err)
				public := key.Public()
				return func(int) error {
					return ca.acme.CreateAccount(t.Context(), &acme.Account{Key: &public, Status: acme.StatusValid})
				}
			},
			told: "index already exists|row already exists in acme_keyID_accountID_index",
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			d := postgrestest.New(t)
			d.Migrate(t)
			ca := openAsStepCA(t, d)
			owner := d.Owner(t)
			race := func(name string) (winners [rounds]int, losers []error) {
				for round := range rounds {
					enter := tc.prepare(t, ca, fmt.Sprint(name, round))
					var results [racers]error
					var racing sync.WaitGroup
					start := make(chan struct{})
					for number := range racers {
						racing.Go(func() {
							<-start
							results[number] = enter(number)
						})
					}
					close(start)
					racing.Wait()
					for _, err := range results {
						if err == nil {
							winners[round]++
						} else {
							losers = append(losers, err)
						}
					}
				}
				return winners, losers
			}

			winners, losers := race("guarded")
			for round, number := range winners {
				require.Equal(t, 1, number, "round %d", round)
			}
			for _, err := range losers {
				require.Regexp(t, tc.told, err.Error())
			}
			var rows int
			require.NoError(t, owner.QueryRow(t.Context(),
				"select count(*) from "+pgx.Identifier{"public", cmp.Or(tc.counted, tc.table)}.Sanitize()).Scan(&rows))
			require.Equal(t, tc.rows*rounds, rows)

			drop(t, owner, tc.table, tc.guard)
			several := 0
			winners, _ = race("unguarded")
			for _, number := range winners {
				if number > 1 {
					several++
				}
			}
			require.Positive(t, several, "without the guard nobody won twice, so the test above proves nothing")
			t.Logf("without the guard there were several winners in %d of %d rounds", several, rounds)
		})
	}
}

func drop(t *testing.T, owner *pgx.Conn, table, guard string) {
	t.Helper()
	_, err := owner.Exec(t.Context(), "drop trigger "+pgx.Identifier{guard}.Sanitize()+" on "+pgx.Identifier{"public", table}.Sanitize())
	require.NoError(t, err)
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

// A nonce that is gone is badNonce to step-ca's client; the guard speaks only to
// step-ca's role, so that whoever prunes may find nothing.
func TestNonceIsRefusedLater(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ca := openAsStepCA(t, d)
	nonce, err := ca.acme.CreateNonce(t.Context())
	require.NoError(t, err)
	require.NoError(t, ca.acme.DeleteNonce(t.Context(), nonce))
	var refused *acme.Error
	require.ErrorAs(t, ca.acme.DeleteNonce(t.Context(), nonce), &refused)
	require.Equal(t, "urn:ietf:params:acme:error:badNonce", refused.Type)

	const prune = "delete from public.nonces where nkey = 'none'"
	_, err = d.Owner(t).Exec(t.Context(), prune)
	require.NoError(t, err)
	_, err = d.Runtime(t).Exec(t.Context(), prune)
	require.Equal(t, "P0002", codeOf(err))
}

// The first revocation is the one that stays, and step-ca says which error it is.
func TestRevocationStays(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ca := openAsStepCA(t, d)
	for table, revoke := range map[string]func(*db.RevokedCertificateInfo) error{"revoked_x509_certs": ca.Revoke, "revoked_ssh_certs": ca.RevokeSSH} {
		t.Run(table, func(t *testing.T) {
			require.NoError(t, revoke(&db.RevokedCertificateInfo{Serial: "1", Reason: "first"}))
			require.ErrorIs(t, revoke(&db.RevokedCertificateInfo{Serial: "1", Reason: "second"}), db.ErrAlreadyExists)
			// What step-ca says to the database when it lost the race.
			upsert := "insert into " + table + ` values ('1', '{"Reason": "third"}') on conflict (nkey) do update set nvalue = excluded.nvalue`
			_, err := d.Runtime(t).Exec(t.Context(), upsert)
			require.Equal(t, "23505", codeOf(err))
			require.ErrorContains(t, err, "is already revoked") // by which step-ca makes it ACME's alreadyRevoked

			reason := func() (reason string) {
				require.NoError(t, d.Owner(t).QueryRow(t.Context(),
					"select convert_from(nvalue, 'UTF8')::json ->> 'Reason' from public."+table).Scan(&reason))
				return reason
			}
			require.Equal(t, "first", reason())
			drop(t, d.Owner(t), table, table+"_once")
			_, err = d.Runtime(t).Exec(t.Context(), upsert)
			require.NoError(t, err)
			require.Equal(t, "third", reason())
		})
	}
}

// An account that asked for its orders when none was pending orders again: one that
// step-ca locked out before db-migrate came, and any one after.
func TestAccountOrdersAgain(t *testing.T) {
	d := postgrestest.New(t)
	order := func(ca stepCA) error {
		// It has expired when it is looked at, so that none is pending.
		return ca.acme.CreateOrder(t.Context(), &acme.Order{AccountID: "account", Status: acme.StatusPending})
	}
	list := func(ca stepCA) {
		t.Helper()
		ids, err := ca.acme.GetOrdersByAccountID(t.Context(), "account")
		require.NoError(t, err)
		require.Empty(t, ids)
	}
	before := openAsItsOwn(t, d)
	require.NoError(t, order(before))
	list(before)
	require.ErrorContains(t, order(before), "converting NULL to string is unsupported")

	d.Migrate(t)
	ca := openAsStepCA(t, d)
	for range 2 {
		require.NoError(t, order(ca))
		list(ca)
	}
	require.NoError(t, order(ca))

	drop(t, d.Owner(t), "acme_account_orders_index", "acme_account_orders_index_null")
	list(ca)
	require.Error(t, order(ca))
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

			drop(t, owner, table, table+"_by")
			for _, r := range enrolment {
				require.NoError(t, revoke(r), r.Serial)
			}
		})
	}
}
