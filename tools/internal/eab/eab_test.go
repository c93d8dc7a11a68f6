package eab_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/smallstep/certificates/acme"
	acmedb "github.com/smallstep/certificates/acme/db/nosql"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/db"
	"github.com/smallstep/nosql"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/jose"
	client "golang.org/x/crypto/acme"

	"github.com/infra-pki/infra-pki/tools/internal/eab"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // step-ca's own words
	os.Exit(m.Run())
}

func database(t *testing.T) (*postgrestest.Database, string) {
	t.Helper()
	d := postgrestest.New(t)
	d.Migrate(t)
	// Its role deletes no keys (postgres/migrations/roles.sql). Its code can, behind an API
	// that is not in ca.json, and is what these rows are held against.
	_, err := d.Owner(t).Exec(t.Context(), "grant delete on all tables in schema public to stepca")
	require.NoError(t, err)
	passfile := filepath.Join(t.TempDir(), "pgpass")
	require.NoError(t, os.WriteFile(passfile, []byte(postgres.PassfileLine(d.Database, d.RuntimePassword)), 0o600))
	return d, postgres.RuntimeDSN(d.Database, passfile)
}

// stepCA is step-ca's own code on the database.
func stepCA(t *testing.T, dsn string) *acmedb.DB {
	t.Helper()
	opened, err := db.New(&db.Config{Type: "postgresql", DataSource: dsn})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, opened.Shutdown()) })
	acmeDB, err := acmedb.New(opened.(nosql.DB))
	require.NoError(t, err)
	return acmeDB
}

func row(t *testing.T, conn *pgx.Conn, table, nkey string) string {
	t.Helper()
	var value []byte
	require.NoError(t, conn.QueryRow(t.Context(), `select nvalue from public."`+table+`" where nkey = $1`, []byte(nkey)).Scan(&value))
	return string(value)
}

// Client and CA are real, the database too.
func TestRegistration(t *testing.T) {
	d, dsn := database(t)
	ca, err := stepcatest.New(t.TempDir(), stepcatest.Options{
		DataSource: dsn, Provisioners: provisioner.List{&provisioner.ACME{Type: "ACME", Name: "acme", RequireEAB: true}},
	})
	require.NoError(t, err)
	require.NoError(t, ca.Start())
	t.Cleanup(func() { require.NoError(t, ca.Stop()) })
	ctx, conn := t.Context(), d.Runtime(t)
	register := func(t *testing.T, kid string, secret []byte) (*client.Client, *client.Account, error) {
		t.Helper()
		c := acmeClient(t, ca)
		var binding *client.ExternalAccountBinding
		if kid != "" {
			binding = &client.ExternalAccountBinding{KID: kid, Key: secret}
		}
		account, err := c.Register(ctx, &client.Account{ExternalAccountBinding: binding}, client.AcceptTOS)
		return c, account, err
	}
	refused := func(t *testing.T, err error, status int, kind string) {
		t.Helper()
		var problem *client.Error
		require.ErrorAs(t, err, &problem)
		require.Equal(t, status, problem.StatusCode)
		require.Equal(t, "urn:ietf:params:acme:error:"+kind, problem.ProblemType)
	}

	t.Run("without a key it is refused", func(t *testing.T) {
		_, _, err := register(t, "", nil)
		refused(t, err, http.StatusBadRequest, "externalAccountRequired")
	})
	t.Run("with a key that is not there it is refused", func(t *testing.T) {
		_, _, err := register(t, "unknown", make([]byte, 32))
		refused(t, err, http.StatusInternalServerError, "serverInternal") // so a revoked key has to stay
	})
	t.Run("with a wrong secret it is refused", func(t *testing.T) {
		kid, _, err := eab.Add(ctx, conn, "wrong", time.Now())
		require.NoError(t, err)
		_, _, err = register(t, kid, make([]byte, 32))
		require.Error(t, err)
		require.Equal(t, eab.Unused, find(t, conn, kid).State)
	})
	t.Run("with a revoked key it is refused", func(t *testing.T) {
		kid, secret, err := eab.Add(ctx, conn, "revoked", time.Now())
		require.NoError(t, err)
		k, changed, err := eab.Revoke(ctx, conn, kid, false, time.Now())
		require.NoError(t, err)
		require.True(t, changed)
		require.Equal(t, eab.Revoked, k.State)
		require.Equal(t, k, find(t, conn, kid))
		_, _, err = register(t, kid, secret)
		refused(t, err, http.StatusUnauthorized, "unauthorized")

		before := row(t, conn, "acme_external_account_keys", kid)
		require.NotContains(t, before, base64.StdEncoding.EncodeToString(secret))
		_, changed, err = eab.Revoke(ctx, conn, kid, true, time.Now())
		require.NoError(t, err)
		require.False(t, changed)
		require.Equal(t, before, row(t, conn, "acme_external_account_keys", kid))
	})
	t.Run("with a key it works once, and the account until it is deactivated", func(t *testing.T) {
		kid, secret, err := eab.Add(ctx, conn, "host <&> \"ü\"", time.Now())
		require.NoError(t, err)
		c, account, err := register(t, kid, secret)
		require.NoError(t, err)
		require.Equal(t, "valid", account.Status)
		bound := find(t, conn, kid)
		require.Equal(t, eab.Bound, bound.State)
		require.True(t, strings.HasSuffix(account.URI, "/"+bound.Account), account.URI)

		_, _, err = register(t, kid, secret)
		refused(t, err, http.StatusInternalServerError, "serverInternal") // the secret went with the first use
		require.Equal(t, bound, find(t, conn, kid))

		_, changed, err := eab.Revoke(ctx, conn, kid, false, time.Now())
		require.ErrorIs(t, err, eab.ErrBound)
		require.False(t, changed)
		order, err := c.AuthorizeOrder(ctx, client.DomainIDs("web.internal"))
		require.NoError(t, err, "what the error says: the account goes on working")

		k, changed, err := eab.Revoke(ctx, conn, kid, true, time.Now())
		require.NoError(t, err)
		require.True(t, changed)
		require.Equal(t, eab.Deactivated, k.State)
		require.Equal(t, k, find(t, conn, kid))
		_, err = c.AuthorizeOrder(ctx, client.DomainIDs("web.internal"))
		refused(t, err, http.StatusUnauthorized, "unauthorized")
		_, err = c.GetOrder(ctx, order.URI)
		refused(t, err, http.StatusUnauthorized, "unauthorized")
		_, changed, err = eab.Revoke(ctx, conn, kid, true, time.Now())
		require.NoError(t, err)
		require.False(t, changed)
	})
}

func acmeClient(t *testing.T, ca *stepcatest.CA) *client.Client {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(ca.Root)
	return &client.Client{
		Key: key, DirectoryURL: ca.URL + "/acme/acme/directory",
		HTTPClient: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}},
		// step-ca refuses with statuses that the client would otherwise try again on.
		RetryBackoff: func(int, *http.Request, *http.Response) time.Duration { return 0 },
	}
}

func find(t *testing.T, conn *pgx.Conn, kid string) eab.Key {
	t.Helper()
	keys, err := eab.List(t.Context(), conn)
	require.NoError(t, err)
	for _, k := range keys {
		if k.ID == kid {
			return k
		}
	}
	t.Fatalf("key %q is not listed", kid)
	return eab.Key{}
}

// The rows are those that step-ca's own code, in whose binary nothing calls it,
// would write: apart from what is random they are equal to the byte.
func TestRowsAreThoseOfStepCA(t *testing.T) {
	d, dsn := database(t)
	ctx, conn, theirs := t.Context(), d.Runtime(t), stepCA(t, dsn)
	for name, reference := range map[string]string{"with a reference": "a <b> & \"c\" ü", "without": ""} {
		t.Run(name, func(t *testing.T) {
			kid, secret, err := eab.Add(ctx, conn, reference, time.Now())
			require.NoError(t, err)
			other, err := theirs.CreateExternalAccountKey(ctx, "", strings.ReplaceAll(reference, "a", "b"))
			require.NoError(t, err)
			require.Len(t, secret, len(other.HmacKey))
			require.Len(t, kid, len(other.ID))

			ours := find(t, conn, kid)
			same := strings.NewReplacer(
				kid, "KID", other.ID, "KID",
				base64.StdEncoding.EncodeToString(secret), "KEY", base64.StdEncoding.EncodeToString(other.HmacKey), "KEY",
				ours.CreatedAt.Format(time.RFC3339), "TIME", other.CreatedAt.Format(time.RFC3339), "TIME",
				`"b `, `"a `,
			)
			require.Equal(t,
				same.Replace(row(t, conn, "acme_external_account_keys", other.ID)),
				same.Replace(row(t, conn, "acme_external_account_keys", kid)))
			if reference != "" {
				require.Equal(t,
					same.Replace(row(t, conn, "acme_external_account_keyID_reference_index", "."+strings.ReplaceAll(reference, "a", "b"))),
					same.Replace(row(t, conn, "acme_external_account_keyID_reference_index", "."+reference)))
				found, err := theirs.GetExternalAccountKeyByReference(ctx, "", reference)
				require.NoError(t, err)
				require.Equal(t, kid, found.ID)
			}
			read, err := theirs.GetExternalAccountKey(ctx, "", kid)
			require.NoError(t, err)
			require.Equal(t, secret, read.HmacKey)
		})
	}
	t.Run("the index has all of them, in their order", func(t *testing.T) {
		ours, err := eab.List(ctx, conn)
		require.NoError(t, err)
		all, _, err := theirs.GetExternalAccountKeys(ctx, "", "", 0)
		require.NoError(t, err)
		require.Len(t, all, 4)
		require.Len(t, ours, 4)
		var ids []string
		require.NoError(t, json.Unmarshal([]byte(row(t, conn, "acme_external_account_keyID_provisionerID_index", "")), &ids))
		for i, k := range all {
			require.Equal(t, k.ID, ids[i])
		}
	})
	t.Run("step-ca updates and deletes them", func(t *testing.T) {
		kid, _, err := eab.Add(ctx, conn, "theirs", time.Now())
		require.NoError(t, err)
		k, err := theirs.GetExternalAccountKey(ctx, "", kid)
		require.NoError(t, err)
		require.NoError(t, k.BindTo(&acme.Account{ID: "none"}))
		require.NoError(t, theirs.UpdateExternalAccountKey(ctx, "", k))
		require.NoError(t, theirs.DeleteExternalAccountKey(ctx, "", kid))
		_, _, err = eab.Revoke(ctx, conn, kid, false, time.Now())
		require.ErrorIs(t, err, eab.ErrUnknown)
	})
}

func TestDeactivatedAccountIsStepCAsToTheByte(t *testing.T) {
	d, dsn := database(t)
	ctx, conn, theirs := t.Context(), d.Runtime(t), stepCA(t, dsn)
	register := func(contact ...string) (kid string, account *acme.Account) {
		public, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "", 0)
		require.NoError(t, err)
		pub := public.Public()
		account = &acme.Account{Key: &pub, Contact: contact, Status: acme.StatusValid, LocationPrefix: "https://ca/acme/acme/account/", ProvisionerName: "acme"}
		require.NoError(t, theirs.CreateAccount(ctx, account))
		kid, _, err = eab.Add(ctx, conn, "", time.Now())
		require.NoError(t, err)
		k, err := theirs.GetExternalAccountKey(ctx, "", kid)
		require.NoError(t, err)
		require.NoError(t, k.BindTo(account))
		require.NoError(t, theirs.UpdateExternalAccountKey(ctx, "", k))
		return kid, account
	}
	for name, contact := range map[string][]string{"with contacts": {"mailto:a+b@internal", "mailto:<c>@internal"}, "without": nil} {
		t.Run(name, func(t *testing.T) {
			kid, account := register(contact...)
			before := row(t, conn, "acme_accounts", account.ID)
			now := time.Now()
			_, changed, err := eab.Revoke(ctx, conn, kid, true, now)
			require.NoError(t, err)
			require.True(t, changed)
			want := strings.NewReplacer(
				`"status":"valid"`, `"status":"deactivated"`,
				`"deactivatedAt":"0001-01-01T00:00:00Z"`, `"deactivatedAt":"`+now.UTC().Format(time.RFC3339)+`"`,
			).Replace(before)
			require.NotEqual(t, want, before)
			require.Equal(t, want, row(t, conn, "acme_accounts", account.ID))
			// Its compare-and-swap finds the bytes that it expects.
			account.Contact = []string{"mailto:new@internal"}
			account.Status = acme.StatusDeactivated
			require.NoError(t, theirs.UpdateAccount(ctx, account))
		})
	}
}

// A registration reads the key, and only later marks it: what was revoked in between
// stays revoked, and the registration fails (postgres/migrations/010_eab_once.sql).
func TestRevokedDuringRegistration(t *testing.T) {
	d, dsn := database(t)
	ctx, conn, theirs := t.Context(), d.Runtime(t), stepCA(t, dsn)
	kid, _, err := eab.Add(ctx, conn, "", time.Now())
	require.NoError(t, err)
	k, err := theirs.GetExternalAccountKey(ctx, "", kid)
	require.NoError(t, err)
	_, _, err = eab.Revoke(ctx, conn, kid, false, time.Now())
	require.NoError(t, err)
	require.NoError(t, k.BindTo(&acme.Account{ID: "account"}))
	require.ErrorContains(t, theirs.UpdateExternalAccountKey(ctx, "", k), "external account key is already bound")
	require.Equal(t, eab.Revoked, find(t, conn, kid).State)
}

// Whatever order a revocation and a binding come in, the row is one of theirs whole.
func TestRevocationAndBindingRace(t *testing.T) {
	d, dsn := database(t)
	ctx, theirs := t.Context(), stepCA(t, dsn)
	conn := d.Runtime(t)
	for range 25 {
		kid, _, err := eab.Add(ctx, conn, "", time.Now())
		require.NoError(t, err)
		k, err := theirs.GetExternalAccountKey(ctx, "", kid)
		require.NoError(t, err)
		require.NoError(t, k.BindTo(&acme.Account{ID: "account"}))
		var bound, revoked error
		var changed bool
		var racing sync.WaitGroup
		racing.Go(func() { bound = theirs.UpdateExternalAccountKey(ctx, "", k) })
		_, changed, revoked = eab.Revoke(ctx, conn, kid, false, time.Now())
		racing.Wait()
		state := find(t, conn, kid).State
		if bound == nil {
			require.Equal(t, eab.Bound, state)
			continue
		}
		require.True(t, changed)
		require.NoError(t, revoked)
		require.Equal(t, eab.Revoked, state)
	}
}

func TestAddedAtOnce(t *testing.T) {
	d, dsn := database(t)
	ctx := t.Context()
	const adders, each = 6, 5
	conns := make([]*pgx.Conn, adders)
	for i := range conns {
		conns[i] = d.Runtime(t)
	}
	var adding sync.WaitGroup
	errs := make([]error, adders)
	taken := make([]int, adders)
	for i, conn := range conns {
		adding.Go(func() {
			for range each {
				_, _, err := eab.Add(ctx, conn, "", time.Now())
				errs[i] = errors.Join(errs[i], err)
				_, _, err = eab.Add(ctx, conn, "the same", time.Now())
				if errors.Is(err, eab.ErrTaken) {
					taken[i]++
					err = nil
				}
				errs[i] = errors.Join(errs[i], err)
			}
		})
	}
	adding.Wait()
	require.NoError(t, errors.Join(errs...))
	total := 0
	for _, n := range taken {
		total += n
	}
	require.Equal(t, adders*each-1, total, "one of those with the same reference was added")
	all, _, err := stepCA(t, dsn).GetExternalAccountKeys(ctx, "", "", 0)
	require.NoError(t, err)
	require.Len(t, all, adders*each+1, "the index has lost none")
}

func TestReference(t *testing.T) {
	d, dsn := database(t)
	ctx, conn, theirs := t.Context(), d.Runtime(t), stepCA(t, dsn)
	first, _, err := eab.Add(ctx, conn, "web.lan", time.Now())
	require.NoError(t, err)
	_, _, err = eab.Add(ctx, conn, "web.lan", time.Now())
	require.ErrorIs(t, err, eab.ErrTaken)
	require.ErrorContains(t, err, first)
	_, _, err = eab.Revoke(ctx, conn, first, false, time.Now())
	require.NoError(t, err)
	second, _, err := eab.Add(ctx, conn, "web.lan", time.Now())
	require.NoError(t, err)
	k, err := theirs.GetExternalAccountKeyByReference(ctx, "", "web.lan")
	require.NoError(t, err)
	require.Equal(t, second, k.ID)

	for name, tc := range map[string]struct{ reference, problem string }{
		"too long":           {strings.Repeat("x", 255), "it is longer than 254 bytes"},
		"a line end":         {"a\nb", "it has a character that cannot be printed"},
		"not UTF-8":          {"\xff", "it has a character that cannot be printed"},
		"white space around": {"a ", "it has white space around it"},
	} {
		t.Run(name, func(t *testing.T) {
			require.EqualError(t, eab.CheckReference(tc.reference), tc.problem)
			_, _, err := eab.Add(ctx, conn, tc.reference, time.Now())
			require.ErrorContains(t, err, tc.problem)
		})
	}
	_, _, err = eab.Add(ctx, conn, strings.Repeat("x", 254), time.Now())
	require.NoError(t, err)
}

// An index that the last key was deleted from, as step-ca leaves it, and rows that
// are not step-ca's.
func TestRowsOfOthers(t *testing.T) {
	d, dsn := database(t)
	ctx, conn, theirs := t.Context(), d.Runtime(t), stepCA(t, dsn)
	other, err := theirs.CreateExternalAccountKey(ctx, "", "x")
	require.NoError(t, err)
	require.NoError(t, theirs.DeleteExternalAccountKey(ctx, "", other.ID))
	require.Equal(t, "[]", row(t, conn, "acme_external_account_keyID_provisionerID_index", ""))
	kid, _, err := eab.Add(ctx, conn, "x", time.Now())
	require.NoError(t, err)
	require.JSONEq(t, `["`+kid+`"]`, row(t, conn, "acme_external_account_keyID_provisionerID_index", ""))

	_, err = conn.Exec(ctx, `update acme_external_account_keys set nvalue = convert_to(replace(convert_from(nvalue, 'UTF8'), '{', '{"more":1,'), 'UTF8')`)
	require.NoError(t, err)
	before := row(t, conn, "acme_external_account_keys", kid)
	_, _, err = eab.Revoke(context.WithoutCancel(ctx), conn, kid, false, time.Now())
	require.EqualError(t, err, `revoking key "`+kid+`": its row in acme_external_account_keys is not one that step-ca v0.30.2 writes`)
	require.Equal(t, before, row(t, conn, "acme_external_account_keys", kid))
}
