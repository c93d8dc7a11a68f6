package e2e_test

import (
	"fmt"
	"net/http"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

const (
	racers = 8
	rounds = 50
)

// Invariant 5, for one replica. Stock step-ca on PostgreSQL breaks it, and the last
// part shows that this test would notice.
func TestATokenYieldsOneCertificateHoweverManyRace(t *testing.T) {
	s := stack.Shared(t)
	c := newCA(t, s)
	for round := range rounds {
		require.Equal(t, 1, race(t, c), "certificates in round %d", round)
	}

	t.Cleanup(func() { s.SQL("alter table public.used_ott enable trigger used_ott_once") })
	s.SQL("alter table public.used_ott disable trigger used_ott_once")
	s.Compose("run", "--rm", "--no-deps", "-T", "db-wait", "--timeout", "3s").Exits(t, 1)
	for round := range rounds {
		if won := race(t, c); won > 1 {
			t.Logf("without the guard: %d certificates from one token in round %d", won, round)
			return
		}
	}
	t.Fatal("without the guard no token was used twice either: this test proves nothing")
}

// race sends identical requests at one instant and counts the certificates.
func race(t *testing.T, c *ca) int {
	t.Helper()
	name := "race.e2e.test"
	body := c.signRequest(t, c.token(t, name), name)
	var wg sync.WaitGroup
	start := make(chan struct{})
	outcomes := make(chan error, racers)
	won := make(chan struct{}, racers)
	for range racers {
		wg.Go(func() {
			<-start
			status, answer, err := c.sign(t.Context(), body)
			switch {
			case err != nil:
				outcomes <- err
			case status == http.StatusCreated:
				won <- struct{}{}
			case status != http.StatusUnauthorized && status != http.StatusInternalServerError:
				outcomes <- fmt.Errorf("status %d: %s", status, answer)
			}
		})
	}
	close(start)
	wg.Wait()
	close(outcomes)
	for err := range outcomes {
		require.NoError(t, err)
	}
	return len(won)
}
