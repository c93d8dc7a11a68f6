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
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/smallstep/certificates/acme"
	acmedb "github.com/smallstep/certificates/acme/db/nosql"
	"github.com/smallstep/certificates/db"
	"github.com/smallstep/nosql"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/jose"

	"github.com/infra-pki/infra-pki/tools/internal/eab"
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
		"an account is bound to an external account key": {
			table: "acme_external_account_keys", guard: "acme_external_account_keys_once", rows: 1,
			prepare: func(t *testing.T, ca stepCA, _ string) racer {
				t.Helper()
				key := newKey(t, ca)
				return func(int) error { _, err := ca.register(t, key, "acme"); return err }
			},
			told: "already bound|changed since last read",
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			_, d, _ := pooled(t, postgrestest.PoolerSizes)
			ca := openPooled(t, d)
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

// newKey makes an external account key.
func newKey(t *testing.T, ca stepCA) string {
	t.Helper()
	key, err := ca.acme.CreateExternalAccountKey(t.Context(), "", "")
	require.NoError(t, err)
	return key.ID
}

// register does what step-ca does for a new account that shows an external account key,
// in its order (acme/api/account.go, NewAccount). The account is returned in any case.
func (ca stepCA) register(t *testing.T, keyID, provisioner string) (*acme.Account, error) {
	t.Helper()
	private, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "", 0)
	require.NoError(t, err)
	public := private.Public()
	account := &acme.Account{Key: &public, Status: acme.StatusValid, ProvisionerName: provisioner}
	if keyID == "" {
		return account, ca.acme.CreateAccount(t.Context(), account)
	}
	key, err := ca.acme.GetExternalAccountKey(t.Context(), "", keyID)
	require.NoError(t, err)
	if key.AlreadyBound() {
		return account, errors.New("already bound")
	}
	require.NoError(t, ca.acme.CreateAccount(t.Context(), account))
	require.NoError(t, key.BindTo(account))
	return account, ca.acme.UpdateExternalAccountKey(t.Context(), "", key)
}

func (ca stepCA) order(t *testing.T, account *acme.Account) error {
	t.Helper()
	return ca.acme.CreateOrder(t.Context(), &acme.Order{AccountID: account.ID, Status: acme.StatusPending})
}

// A provisioner demands external account keys: whoever has none that names the account
// orders nothing, however the account came to be.
func TestUnboundAccountOrdersNothing(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ca, conn := openAsStepCA(t, d), d.Runtime(t)
	const refused = "account is not bound to an external account key"
	older, err := ca.register(t, "", "acme")
	require.NoError(t, err)
	time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(1100 * time.Millisecond))) // step-ca's times are whole seconds

	require.NoError(t, postgres.RequireEAB(t.Context(), conn, []string{"acme", "strict"}))
	require.NoError(t, postgres.RequireEAB(t.Context(), conn, []string{"acme", "strict"}))
	required, err := postgres.EABRequired(t.Context(), conn)
	require.NoError(t, err)
	require.Equal(t, []string{"acme", "strict"}, required)

	key := newKey(t, ca)
	winner, err := ca.register(t, key, "acme")
	require.NoError(t, err)
	killedBetween, err := ca.register(t, "", "acme") // the account is stored, the key is not bound
	require.NoError(t, err)
	elsewhere, err := ca.register(t, "", "open")
	require.NoError(t, err)

	require.NoError(t, ca.order(t, older), "an account from before is as welcome as it was")
	require.NoError(t, ca.order(t, winner))
	require.NoError(t, ca.order(t, winner))
	require.NoError(t, ca.order(t, elsewhere), "another provisioner demands none")
	require.ErrorContains(t, ca.order(t, killedBetween), refused)

	// The bound account's orders are updated as ever.
	order := &acme.Order{AccountID: winner.ID, Status: acme.StatusPending}
	require.NoError(t, ca.acme.CreateOrder(t.Context(), order))
	order.Status = acme.StatusReady
	require.NoError(t, ca.acme.UpdateOrder(t.Context(), order))

	// A second account takes the key away from nobody. This is the loser of the race, made sure.
	again, err := ca.acme.GetExternalAccountKey(t.Context(), "", key)
	require.NoError(t, err)
	again.AccountID = killedBetween.ID
	require.ErrorContains(t, ca.acme.UpdateExternalAccountKey(t.Context(), "", again), "external account key is already bound")
	require.ErrorContains(t, ca.order(t, killedBetween), refused)
	require.NoError(t, ca.order(t, winner))

	drop(t, d.Owner(t), "acme_orders", "acme_orders_bound")
	require.NoError(t, ca.order(t, killedBetween))
}

// A provisioner that demands keys no longer lets everybody order again.
func TestEABNoLongerRequired(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ca, conn := openAsStepCA(t, d), d.Runtime(t)
	require.NoError(t, postgres.RequireEAB(t.Context(), conn, []string{"acme"}))
	account, err := ca.register(t, "", "acme")
	require.NoError(t, err)
	require.Error(t, ca.order(t, account))
	require.NoError(t, postgres.RequireEAB(t.Context(), conn, nil))
	required, err := postgres.EABRequired(t.Context(), conn)
	require.NoError(t, err)
	require.Empty(t, required)
	require.NoError(t, ca.order(t, account))
}

// A key that was revoked while somebody registered with it is bound to nobody.
func TestRevokedKeyIsNotBound(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ca := openAsStepCA(t, d)
	key := newKey(t, ca)
	registering, err := ca.acme.GetExternalAccountKey(t.Context(), "", key)
	require.NoError(t, err)
	account, err := ca.register(t, "", "acme")
	require.NoError(t, err)
	_, changed, err := eab.Revoke(t.Context(), d.Runtime(t), key, false, time.Now())
	require.NoError(t, err)
	require.True(t, changed)
	require.NoError(t, registering.BindTo(account))
	require.ErrorContains(t, ca.acme.UpdateExternalAccountKey(t.Context(), "", registering), "external account key is already bound")
}

// Two replicas make the first orders of an account at once, in step-ca's own words: a
// lock of the process keeps its own code from it, so this is two sessions, one waiting.
func TestFirstOrdersOfAnAccountAreBothListed(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	ca, owner := openAsStepCA(t, d), d.Owner(t)
	const lock = "select nvalue from acme_account_orders_index where nkey = $1 for update"
	const upsert = "insert into acme_account_orders_index (nkey, nvalue) values ($1, $2) on conflict (nkey) do update set nvalue = excluded.nvalue"
	race := func(account string) error {
		pending := &acme.Order{AccountID: "other", Status: acme.StatusPending}
		require.NoError(t, ca.acme.CreateOrder(t.Context(), pending))
		first, err := d.Runtime(t).Begin(t.Context())
		require.NoError(t, err)
		second, err := d.Runtime(t).Begin(t.Context())
		require.NoError(t, err)
		for _, tx := range []pgx.Tx{first, second} {
			found, err := tx.Exec(t.Context(), lock, []byte(account))
			require.NoError(t, err)
			require.Zero(t, found.RowsAffected())
		}
		_, err = first.Exec(t.Context(), upsert, []byte(account), []byte(`["`+pending.ID+`"]`))
		require.NoError(t, err)
		lost := make(chan error, 1)
		go func() {
			_, err := second.Exec(t.Context(), upsert, []byte(account), []byte(`["another"]`))
			lost <- errors.Join(err, second.Rollback(t.Context()))
		}()
		require.NoError(t, first.Commit(t.Context()))
		return <-lost
	}
	require.Equal(t, "40001", codeOf(race("guarded")))

	// What step-ca may drop: an order that is ready, or has expired.
	account := &acme.Account{ID: "account"}
	require.NoError(t, ca.order(t, account))
	require.NoError(t, ca.order(t, account))

	drop(t, owner, "acme_account_orders_index", "acme_account_orders_index_kept")
	require.NoError(t, race("unguarded"))
}

// What a new order costs does not depend on how many there are: the guard of the lists
// reads the orders that are dropped and no others.
func TestListOfOrdersIsCheckedByKey(t *testing.T) {
	d := postgrestest.New(t)
	d.Migrate(t)
	_, err := d.Owner(t).Exec(t.Context(), `insert into public.acme_orders
		select convert_to('order' || n, 'UTF8'), convert_to('{"status":"valid"}', 'UTF8') from generate_series(1, 1000) n`)
	require.NoError(t, err)
	tx, err := d.Runtime(t).Begin(t.Context()) // what follows counts alone
	require.NoError(t, err)
	for n := 1; n <= 20; n++ { // a plan is kept from the sixth on
		_, err := tx.Exec(t.Context(), `insert into acme_account_orders_index (nkey, nvalue) values ('account', $1)
			on conflict (nkey) do update set nvalue = excluded.nvalue`, fmt.Appendf(nil, `["order%d"]`, n))
		require.NoError(t, err)
	}
	var byKey, scanned int
	require.NoError(t, tx.QueryRow(t.Context(), `select coalesce(idx_scan, 0), seq_tup_read
		from pg_stat_xact_user_tables where relname = 'acme_orders'`).Scan(&byKey, &scanned))
	require.Equal(t, 19, byKey)
	require.Zero(t, scanned, "orders read one after the other")
	require.NoError(t, tx.Rollback(t.Context()))
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
