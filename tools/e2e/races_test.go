package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
	loadtest "github.com/infra-pki/infra-pki/tools/e2e/load"
)

const (
	raceRounds = 500
	atOnce     = 8 // requests at one instant
)

// openCA opens the key of admin, through the published port.
func openCA(tb testing.TB, s *stack.Stack) *loadtest.CA {
	tb.Helper()
	pool := x509.NewCertPool()
	root, err := os.ReadFile(filepath.Join(s.Trust(), "root_ca.crt"))
	require.NoError(tb, err)
	require.True(tb, pool.AppendCertsFromPEM(root))
	c, err := loadtest.Open(tb.Context(), s.Address(), s.URL(), pool, s.Get("PROVISIONER_PASSWORD"))
	require.NoError(tb, err)
	return c
}

// containersOf are those of a service, as it may have several.
func containersOf(tb testing.TB, s *stack.Stack, service string) []stack.Container {
	tb.Helper()
	var all []stack.Container
	require.NoError(tb, json.Unmarshal([]byte(s.Inspect()), &all))
	all = slices.DeleteFunc(all, func(c stack.Container) bool { return serviceOf(c) != service })
	slices.SortFunc(all, func(a, b stack.Container) int { return strings.Compare(a.Name, b.Name) })
	require.NotEmpty(tb, all, service)
	return all
}

// serviceOf is a container's service, whichever of its replicas it is.
func serviceOf(c stack.Container) string {
	service, _, _ := strings.Cut(c.Service(), "/")
	return service
}

// onNetwork is where a container listens, as this machine reaches it on a network of the stack.
func onNetwork(tb testing.TB, s *stack.Stack, c stack.Container, network string) string {
	tb.Helper()
	out := stack.Docker(tb, "inspect", "--format", fmt.Sprintf(`{{(index .NetworkSettings.Networks "%s_%s").IPAddress}}`, s.Project, network), c.ID).OK(tb)
	return net.JoinHostPort(strings.TrimSpace(out.Stdout), "9000")
}

// Invariant 5, and what is like it, over all replicas: of several requests at one
// instant that only one may win, one wins. Each replica gets its part directly; each
// part ends without its guard, to show that it would notice.
func TestOfSeveralRequestsAtOnceOneWins(t *testing.T) {
	s := stack.Shared(t)
	ca := openCA(t, s)
	var replicas []*loadtest.CA
	for _, c := range containersOf(t, s, "step-ca") {
		replica := ca.At(onNetwork(t, s, c, "ca")).KeptAlive(atOnce)
		t.Cleanup(replica.HangUp)
		replicas = append(replicas, replica)
	}
	require.GreaterOrEqual(t, len(replicas), 2, "there is nothing to race over")
	post := func(ctx context.Context, i int, path string, body []byte) error {
		answer, err := replicas[i%len(replicas)].Do(ctx, http.MethodPost, path, "application/jose+json", body)
		if err == nil && answer.Code != http.StatusOK && answer.Code != http.StatusCreated {
			err = &loadtest.StatusError{Code: answer.Code, Body: string(answer.Body)}
		}
		return err
	}
	nonce := func(t *testing.T, i int) string {
		t.Helper()
		answer, err := replicas[i%len(replicas)].Do(t.Context(), http.MethodHead, "/acme/acme/new-nonce", "", nil)
		require.NoError(t, err)
		require.NotEmpty(t, answer.Header.Get("Replay-Nonce"))
		return answer.Header.Get("Replay-Nonce")
	}
	count := func(t *testing.T, query string) int {
		t.Helper()
		n, err := strconv.Atoi(s.SQL(query))
		require.NoError(t, err)
		return n
	}

	t.Run("a one-time token yields one certificate", func(t *testing.T) {
		wins(t, s, "used_ott", "used_ott_once", func(t *testing.T, _ int) attempt {
			t.Helper()
			body, err := ca.SignBody("race.e2e.test")
			require.NoError(t, err)
			return func(ctx context.Context, i int) error {
				_, err := replicas[i%len(replicas)].Sign(ctx, body)
				return err
			}
		})
	})

	t.Run("a certificate is revoked once", func(t *testing.T) {
		wins(t, s, "revoked_x509_certs", "revoked_x509_certs_once", func(t *testing.T, round int) attempt {
			t.Helper()
			body, err := ca.SignBody("revoked.e2e.test")
			require.NoError(t, err)
			issued, err := replicas[0].Sign(t.Context(), body)
			require.NoError(t, err)
			var tokens []string
			for range atOnce {
				token, err := ca.RevocationToken(issued.Serial())
				require.NoError(t, err)
				tokens = append(tokens, token)
			}
			return func(ctx context.Context, i int) error {
				return replicas[i%len(replicas)].Revoke(ctx, issued.Serial(), tokens[i], fmt.Sprintf("round %d, request %d", round, i))
			}
		})
	})

	t.Run("an ACME nonce passes once", func(t *testing.T) {
		key := newAccountKey(t)
		registered, err := replicas[0].Do(t.Context(), http.MethodPost, "/acme/acme/new-account", "application/jose+json",
			jws(t, s, key, "", nonce(t, 0), "/acme/acme/new-account", []byte(`{"termsOfServiceAgreed":true}`)))
		require.NoError(t, err)
		require.Equal(t, http.StatusCreated, registered.Code, string(registered.Body))
		account, err := url.Parse(registered.Header.Get("Location"))
		require.NoError(t, err)
		wins(t, s, "nonces", "nonces_once", func(t *testing.T, round int) attempt {
			t.Helper()
			body := jws(t, s, key, account.String(), nonce(t, round), account.Path, []byte("{}"))
			return func(ctx context.Context, i int) error { return post(ctx, i, account.Path, body) }
		})
	})

	t.Run("a key for External Account Binding makes one account", func(t *testing.T) {
		t.Cleanup(func() { s.Make("init").OK(t) })
		s.Change(t, stack.Settings{"ACME_REQUIRE_EAB": "true"})
		s.Make("init").OK(t)
		secret := make([]byte, 32)
		_, err := rand.Read(secret)
		require.NoError(t, err)
		// As "pkictl acme eab add" writes them, five hundred at once.
		s.SQL(fmt.Sprintf(`insert into public.acme_external_account_keys select convert_to('race-' || i, 'UTF8'), convert_to(
			'{"id":"race-' || i || '","provisionerID":"","reference":"race-' || i || '","key":"%s","createdAt":"2026-01-01T00:00:00Z","boundAt":"0001-01-01T00:00:00Z"}',
			'UTF8') from generate_series(0, %d) i`, base64.StdEncoding.EncodeToString(secret), raceRounds-1))
		const path = "/acme/acme/new-account"
		for round := range raceRounds {
			var bodies [atOnce][]byte
			for i := range bodies {
				key := newAccountKey(t)
				public, err := json.Marshal(jose.JSONWebKey{Key: key.Public()})
				require.NoError(t, err)
				binding := sign(t, jose.SigningKey{Algorithm: jose.HS256, Key: secret},
					(&jose.SignerOptions{}).WithHeader("url", s.URL()+path).WithHeader("kid", fmt.Sprint("race-", round)), public)
				payload, err := json.Marshal(map[string]any{"termsOfServiceAgreed": true, "externalAccountBinding": json.RawMessage(binding)})
				require.NoError(t, err)
				bodies[i] = jws(t, s, key, "", nonce(t, i), path, payload)
			}
			require.Equal(t, 1, together(t, func(ctx context.Context, i int) error { return post(ctx, i, path, bodies[i]) }), "accounts in round %d", round)
		}
		// Whom an error was told may have left an account behind, which no key names and
		// which gets no certificate (postgres/migrations/010_eab_once.sql).
		require.Equal(t, raceRounds, count(t, `select count(*) from public.acme_external_account_keys
			where convert_from(nkey, 'UTF8') like 'race-%' and convert_from(nvalue, 'UTF8')::json ->> 'accountID' is not null`))
	})
}

// attempt is the i-th of several requests at one instant.
type attempt func(ctx context.Context, i int) error

// wins demands that one request of each round wins, and that this is the guard's doing.
func wins(t *testing.T, s *stack.Stack, table, guard string, prepare func(t *testing.T, round int) attempt) {
	t.Helper()
	for round := range raceRounds {
		require.Equal(t, 1, together(t, prepare(t, round)), "winners in round %d", round)
	}
	t.Cleanup(func() { s.SQL("alter table public." + table + " enable trigger " + guard) })
	s.SQL("alter table public." + table + " disable trigger " + guard)
	s.Compose("run", "--rm", "--no-deps", "-T", "db-wait", "--timeout", "3s").Exits(t, 1)
	for round := range raceRounds {
		if won := together(t, prepare(t, raceRounds+round)); won > 1 {
			t.Logf("without the guard: %d winners in round %d", won, round)
			return
		}
	}
	t.Fatal("without the guard there was one winner each time too: this test proves nothing")
}

// together makes all attempts at one instant and counts those that succeed. The others
// must have been told so by the CA.
func together(t *testing.T, do attempt) int {
	t.Helper()
	var wg sync.WaitGroup
	start := make(chan struct{})
	var errs [atOnce]error
	for i := range errs {
		wg.Go(func() {
			<-start
			errs[i] = do(t.Context(), i)
		})
	}
	close(start)
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
			continue
		}
		status := new(loadtest.StatusError)
		require.ErrorAs(t, err, &status)
	}
	return won
}

func newAccountKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

// jws is the body of an ACME request (RFC 8555 section 6.2), by an account or, without
// one, by a key.
func jws(t *testing.T, s *stack.Stack, key *ecdsa.PrivateKey, account, nonce, path string, payload []byte) []byte {
	t.Helper()
	options := (&jose.SignerOptions{EmbedJWK: account == ""}).WithHeader("url", s.URL()+path).WithHeader("nonce", nonce)
	return sign(t, jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: account}}, options, payload)
}

func sign(t *testing.T, key jose.SigningKey, options *jose.SignerOptions, payload []byte) []byte {
	t.Helper()
	signer, err := jose.NewSigner(key, options)
	require.NoError(t, err)
	signed, err := signer.Sign(payload)
	require.NoError(t, err)
	return []byte(signed.FullSerialize())
}
