package e2e_test

import (
	"crypto/x509"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

const journalFile = "docker-compose.yml:postgres/journal.yml"

func withFiles(t *testing.T, list string) *types.Project {
	t.Helper()
	var files []string
	for _, file := range strings.Split(list, ":") {
		files = append(files, filepath.Join(stack.Repository(), file))
	}
	return load(t, files...)
}

func TestContractOfTheJournal(t *testing.T) {
	without, with := compose(t), withFiles(t, journalFile)
	journal, backup := with.Services["journal"], with.Services["backup"]
	command := func(entrypoint, command []string) string {
		return strings.Join(append(entrypoint[:len(entrypoint):len(entrypoint)], command...), " ")
	}
	migrate, export := with.Services["db-migrate"], with.Services["metrics-export"]

	rules := map[string]struct{ want, got any }{
		"postgres is as it is without, so that it is not restarted": {without.Services["postgres"], with.Services["postgres"]},
		"one service is added":                       {len(without.Services) + 1, len(with.Services)},
		"it is confined":                             {[][]string{{"ALL"}, {"no-new-privileges:true"}, nil}, [][]string{journal.CapDrop, journal.SecurityOpt, journal.CapAdd}},
		"it runs as the other tools do":              {backup.User, journal.User},
		"with their image":                           {backup.Image, journal.Image},
		"it gets one secret":                         {"[{postgres_password /run/secrets/postgres_password}]", secretsOf(journal)},
		"it logs in as the backup does":              {environmentOf(backup), environmentOf(journal)},
		"it sees the database and nothing else":      {backup.Networks, journal.Networks},
		"its directory, and no volume with keys":     {"[/journal]", targetsOf(journal)},
		"it is bounded":                              {true, journal.MemLimit > 0 && journal.PidsLimit > 0 && journal.Logging != nil},
		"it comes back":                              {types.RestartPolicyAlways, journal.Restart},
		"it says how it is, and how it is stopped":   {true, journal.HealthCheck != nil && journal.StopSignal != "" && journal.StopGracePeriod != nil},
		"it publishes nothing":                       {0, len(journal.Ports)},
		"the interval is the setting":                {"pkictl backup journal --out /journal --interval " + example(t)["JOURNAL_INTERVAL"], command(journal.Entrypoint, journal.Command)},
		"db-migrate leaves its slot alone":           {"db-migrate --pooler /pooler --journal", command(migrate.Entrypoint, migrate.Command)},
		"and drops it without this file":             {"db-migrate --pooler /pooler", command(without.Services["db-migrate"].Entrypoint, without.Services["db-migrate"].Command)},
		"the figures have it":                        {"metrics-export --replicas 2 --journal", command(export.Entrypoint, export.Command)},
		"config-check knows that there is to be one": {true, with.Services["config-check"].Environment["JOURNAL_DIR"] != nil},
	}
	for rule, r := range rules {
		t.Run(rule, func(t *testing.T) { require.Equal(t, r.want, r.got) })
	}

	t.Run("with TLS it is a client as the others", func(t *testing.T) {
		all := withFiles(t, journalFile+":step-ca/revocation.yml:postgres/tls.yml:postgres/tls-revocation.yml:postgres/tls-journal.yml")
		require.Equal(t, environmentOf(all.Services["backup"]), environmentOf(all.Services["journal"]))
		require.Equal(t, "[/journal /database-ca]", targetsOf(all.Services["journal"]))
		require.Contains(t, all.Services["db-migrate"].Command, "--journal")
		require.Contains(t, all.Services["postgres"].Command, "ssl=on")
	})
	t.Run("PostgreSQL starts, journal or not, where there is a slot of one", func(t *testing.T) {
		conf := checkedIn(t, "postgres", "postgresql.conf")
		require.Regexp(t, `(?m)^wal_level = logical\b`, conf)
		require.Regexp(t, `(?m)^max_slot_wal_keep_size = \d+GB\b`, conf)
	})
}

// environmentOf leaves out where the pooler is, which is no way to a replication slot.
func environmentOf(s types.ServiceConfig) map[string]string {
	found := map[string]string{}
	for name, value := range s.Environment {
		if value != nil && !strings.HasPrefix(name, "PGBOUNCER_") {
			found[name] = *value
		}
	}
	return found
}

func targetsOf(s types.ServiceConfig) string {
	var found []string
	for _, v := range s.Volumes {
		found = append(found, v.Target)
	}
	return "[" + strings.Join(found, " ") + "]"
}

// A machine is lost with all its disks but that of the journal: what was issued and revoked
// since the backup is there, but for the last seconds.
func TestALostDiskLosesSeconds(t *testing.T) {
	const interval = 5 * time.Second
	work := t.TempDir()
	identity, journal := filepath.Join(work, "identity"), filepath.Join(work, "journal")
	require.NoError(t, os.Mkdir(journal, 0o700))
	require.NoError(t, os.Chmod(journal, 0o777)) //nolint:gosec // for uid 1000
	said := stack.Docker(t, "run", "--rm", "--network", "none", "--user", "0:0", "--volume", work+":/work",
		toolsImage, "pkictl", "backup", "keygen", "/work/identity").OK(t)
	settings := stack.Settings{
		"COMPOSE_FILE": journalFile, "JOURNAL_DIR": journal, "JOURNAL_INTERVAL": interval.String(),
		"BACKUP_RECIPIENTS": strings.TrimSpace(said.Stdout), "STEP_CA_REPLICAS": "1",
	}
	s := stack.New(t, settings)
	s.Up()
	before := newCA(t, s)
	t.Setenv("ENV_FILE", s.EnvFile())
	t.Setenv("BACKUP_DIR", filepath.Join(work, "backups"))
	s.Make("backup").OK(t)
	archives, err := filepath.Glob(filepath.Join(work, "backups", "*"))
	require.NoError(t, err)
	require.Len(t, archives, 1)

	// All of this is after the backup.
	kept, revoked := before.hold(t, "kept.e2e.test"), before.hold(t, "revoked.e2e.test")
	leaf, err := x509.ParseCertificate(revoked.pair.Certificate[0])
	require.NoError(t, err)
	s.Compose("run", "--rm", "-T", "pkictl", "revoke", "--serial", leaf.SerialNumber.String(), "--apply").OK(t)

	type issued struct {
		at     time.Time
		serial string
	}
	var acknowledged []issued
	issueFor := func(length time.Duration) {
		for begin := time.Now(); time.Since(begin) < length; {
			cert := before.issue(t, "busy.e2e.test")
			acknowledged = append(acknowledged, issued{time.Now(), cert.SerialNumber.String()})
		}
	}
	for range 3 {
		issueFor(interval / 3)
		if c := s.Containers()["journal"]; c.State.Pid > 0 {
			killed(t, c)
		}
	}
	killings := len(acknowledged)
	count := func() int {
		segments, err := filepath.Glob(filepath.Join(journal, "journal-*"))
		require.NoError(t, err)
		return len(segments)
	}
	for segments, begin := count(), time.Now(); count() == segments; {
		require.Less(t, time.Since(begin), time.Minute, "the journal does not go on")
		issueFor(time.Second)
	}
	issueFor(interval * 3 / 2)
	lost := time.Now()
	s.Compose("kill").OK(t) // nobody has time to write anything
	s.Down()
	s.Compose("down", "--volumes").OK(t)

	settings["JOURNAL_DIR"] = filepath.Join(work, "next")
	require.NoError(t, os.Mkdir(settings["JOURNAL_DIR"], 0o700))
	require.NoError(t, os.Chmod(settings["JOURNAL_DIR"], 0o777)) //nolint:gosec // for uid 1000
	scratch := stack.New(t, settings)
	t.Setenv("JOURNAL", journal)
	t.Setenv("ARCHIVE", archives[0])
	t.Setenv("IDENTITY", identity)
	require.Regexp(t, `(?m)^journal       to 20\S+Z, \d+ transactions after the backup, \d+ segments$`, scratch.Make("verify").OK(t).Stdout)
	start := time.Now()
	restored := restoreInto(t, scratch, identity, archives[0]).OK(t)
	require.Regexp(t, `msg=verified item=journal through=\S+ segments=\d+ transactions=\d+`, restored.Output())
	t.Logf("base and journal loaded in %.1f s", time.Since(start).Seconds())
	there := strings.Fields(scratch.SQL("select convert_from(nkey, 'UTF8') from x509_certs"))
	has := map[string]bool{}
	for _, serial := range there {
		has[serial] = true
	}
	var last time.Time
	missing := 0
	for _, i := range acknowledged {
		switch {
		case !has[i.serial]:
			missing++
		default:
			require.Zero(t, missing, "one that is older than one that is there is missing")
			last = i.at
		}
	}
	t.Logf("%d certificates after the backup, %d of them while the journal was killed three times, in %d segments; lost: the last %d, of %.1f s",
		len(acknowledged), killings, count(), missing, lost.Sub(last).Seconds())
	require.Less(t, lost.Sub(last), interval+3*time.Second)

	scratch.Up()
	after := newCA(t, scratch)
	t.Run("a certificate from after the backup is renewed", func(t *testing.T) { after.renew(t, kept, "kept.e2e.test") })
	t.Run("a token that was used after the backup is refused", func(t *testing.T) {
		status, answer, err := after.sign(t.Context(), kept.request)
		require.NoError(t, err)
		require.Equal(t, http.StatusUnauthorized, status, string(answer))
	})
	t.Run("a revocation from after the backup holds", func(t *testing.T) {
		status, answer := after.askForRenewal(t, revoked)
		require.Equal(t, http.StatusUnauthorized, status, string(answer))
	})
	t.Run("another journal has begun", func(t *testing.T) {
		require.Contains(t, scratch.Logs("journal"), "a new journal begins")
	})
	t.Run("switched off, it leaves nothing", func(t *testing.T) {
		scratch.Set(stack.Settings{"COMPOSE_FILE": "docker-compose.yml"})
		postgres := scratch.Containers()["postgres"].ID
		scratch.Compose("up", "-d", "--wait", "--remove-orphans").OK(t)
		require.Equal(t, postgres, scratch.Containers()["postgres"].ID)
		require.Equal(t, "0|0", scratch.SQL("select (select count(*) from pg_replication_slots), (select count(*) from pg_publication)"))
	})
	t.Run("all this told no secret", func(t *testing.T) { requireUntold(t, scratch) })
}
