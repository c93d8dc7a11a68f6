package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"db-migrate": main}) }

func TestScripts(t *testing.T) { testscript.Run(t, postgrestest.Scripts("testdata/script")) }

// However far a run came before it was killed, the next one finds its way.
func TestKilledAtAnyInstant(t *testing.T) {
	const kills = 12
	d := postgrestest.New(t)
	owner := d.Owner(t)
	files := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(files, "owner"), []byte(d.OwnerPassword.Reveal()), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(files, "stepca"), []byte(d.RuntimePassword.Reveal()), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(files, "reports"), []byte(d.ReportsPassword.Reveal()), 0o600))
	run := func(patience time.Duration) (killed bool) {
		cmd := exec.Command("db-migrate", "--migrations", postgrestest.Migrations()) //nolint:noctx // killed below
		cmd.Env = append(os.Environ(),
			"POSTGRES_HOST="+d.Host, fmt.Sprintf("POSTGRES_PORT=%d", d.Port), "POSTGRES_SSLMODE="+d.SSLMode,
			"POSTGRES_DB="+d.Name, "POSTGRES_USER="+d.Database.Owner,
			"POSTGRES_PASSWORD_FILE="+filepath.Join(files, "owner"), "STEP_CA_DB_PASSWORD_FILE="+filepath.Join(files, "stepca"),
			"REPORTS_DB_PASSWORD_FILE="+filepath.Join(files, "reports"))
		require.NoError(t, cmd.Start())
		bullet := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() }) // it may have ended by itself
		defer bullet.Stop()
		return cmd.Wait() != nil
	}
	start := time.Now()
	require.False(t, run(time.Minute))
	whole := time.Since(start)

	killed := 0
	for i := range kills {
		t.Run(fmt.Sprintf("after %d of %d parts of its time", i+1, kills), func(t *testing.T) {
			_, err := owner.Exec(t.Context(), "drop schema public, infra_pki cascade; create schema public; drop owned by stepca, reports; drop role stepca, reports")
			require.NoError(t, err)
			if run(whole * time.Duration(i+1) / kills) {
				killed++
			}
			d.Migrate(t)
			require.NoError(t, postgres.Ready(t.Context(), d.Runtime(t)))
		})
	}
	require.GreaterOrEqual(t, killed, kills/2, "most runs ended before they were shot at")
}
