package main

import (
	"context"
	"encoding/json"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // step-ca's own words
	testscript.Main(m, map[string]func(){"metrics-export": main})
}

// Scripts have a server, and:
//
//	$ADDRESS    where nobody listens
//	get URL     again and again until there is an answer; prints it
func TestScripts(t *testing.T) {
	params := postgrestest.Scripts("testdata/script")
	setUp := params.Setup
	params.Setup = func(env *testscript.Env) error {
		env.Setenv("ADDRESS", freeAddress(t))
		return setUp(env)
	}
	params.Cmds["get"] = func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) != 1 {
			ts.Fatalf("usage: get URL")
		}
		_, err := io.WriteString(ts.Stdout(), get(t, args[0]))
		ts.Check(err)
	}
	testscript.Run(t, params)
}

func get(t *testing.T, address string) string {
	t.Helper()
	var body []byte
	require.Eventually(t, func() bool {
		resp, err := http.Get(address) //nolint:noctx,gosec // loopback
		if err != nil {
			return false
		}
		defer resp.Body.Close() //nolint:errcheck // read only
		body, err = io.ReadAll(resp.Body)
		return err == nil && resp.StatusCode == http.StatusOK
	}, 10*time.Second, 10*time.Millisecond)
	return string(body)
}

// figures is what a part hands over, a line each: name{labels} value.
func figures(t *testing.T, p *part) string {
	t.Helper()
	return scrape(t, newExporter(t.Context(), slog.New(slog.DiscardHandler), p))
}

// scrape is what Prometheus gets to see, without the explanations.
func scrape(t *testing.T, e *exporter) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	address := freeAddress(t)
	go func() { ended <- serve(ctx, address, e) }()
	body := get(t, "http://"+address+"/metrics")
	require.NoError(t, healthy(t.Context(), address))
	cancel()
	require.NoError(t, <-ended)
	return regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(body, "")
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // for its port
	require.NoError(t, err)
	defer l.Close() //nolint:errcheck // nobody connected
	return l.Addr().String()
}

// vague replaces numbers that differ from run to run, and are not 0.
func vague(text string, names ...string) string {
	for _, name := range names {
		text = regexp.MustCompile(`(?m)^(`+name+`(\{.*\})?) [0-9.e+-]*[1-9][0-9.e+-]*$`).ReplaceAllString(text, "$1 N")
	}
	return text
}

func TestDatabase(t *testing.T) {
	server := postgrestest.Start(t)
	db := server.Database()
	db.Migrate(t)
	collect := func() string {
		return figures(t, &part{name: "database", collect: (&database{db: db.Database, password: db.ReportsPassword}).collect})
	}

	t.Run("a server with step-ca's tables", func(t *testing.T) {
		_, err := db.Runtime(t).Exec(t.Context(), "insert into used_ott (nkey, nvalue) values ('a', 'a'), ('b', 'b')")
		require.NoError(t, err)
		_, err = db.Owner(t).Exec(t.Context(), "analyze public.used_ott")
		require.NoError(t, err)
		idle := db.Runtime(t)
		require.NoError(t, idle.Ping(t.Context()))
		open, err := db.Runtime(t).Begin(t.Context())
		require.NoError(t, err)
		defer open.Rollback(t.Context()) //nolint:errcheck // nothing was written
		time.Sleep(20 * time.Millisecond)

		got := vague(collect(), "pki_database_size_bytes", "pki_database_wal_bytes", "pki_database_table_bytes", "pki_database_oldest_transaction_seconds",
			`pki_database_connections\{state="idle"\}`)
		var few []string
		for line := range strings.Lines(got) {
			if !strings.Contains(line, "{table=") || strings.Contains(line, `"used_ott"`) {
				few = append(few, strings.TrimSuffix(line, "\n"))
			}
		}
		require.Equal(t, []string{
			`pki_collection_success{part="database"} 1`,
			`pki_database_archive_failing 0`,
			`pki_database_checksum_failures_total 0`,
			`pki_database_connections{state="active"} 1`, // this one
			`pki_database_connections{state="idle"} N`,
			`pki_database_connections{state="idle in transaction"} 1`,
			`pki_database_connections{state="idle in transaction (aborted)"} 0`,
			`pki_database_max_connections 100`,
			`pki_database_oldest_transaction_seconds N`,
			`pki_database_rows{table="used_ott"} 2`,
			`pki_database_size_bytes N`,
			`pki_database_table_bytes{table="used_ott"} N`,
			`pki_database_up 1`,
			`pki_database_wal_bytes N`,
		}, few)
		require.Contains(t, got, `pki_database_rows{table="x509_certs"} 0`)
	})
	t.Run("an archive that cannot be written", func(t *testing.T) {
		server.Restart(t, "archive_mode=on", "archive_command=false")
		owner := db.Owner(t)
		_, err := owner.Exec(t.Context(), "create table public.something (); select pg_switch_wal()")
		require.NoError(t, err)
		require.Eventually(t, func() bool {
			var failed int
			require.NoError(t, owner.QueryRow(t.Context(), "select failed_count from pg_stat_archiver").Scan(&failed))
			return failed > 0
		}, 20*time.Second, 100*time.Millisecond)
		require.Contains(t, collect(), "pki_database_archive_failing 1\n")
	})
	t.Run("no server", func(t *testing.T) {
		server.Stop(t)
		require.Equal(t, "pki_collection_success{part=\"database\"} 0\npki_database_up 0\n", collect())
	})
}

func TestBackups(t *testing.T) {
	db := postgrestest.New(t)
	db.Migrate(t)
	collect := func() string {
		return figures(t, &part{name: "backups", collect: (&backups{db: db.Database, password: db.ReportsPassword}).collect})
	}
	require.Equal(t, "pki_backup_last_success_seconds 0\npki_collection_success{part=\"backups\"} 1\n", collect())
	_, err := db.Owner(t).Exec(t.Context(), `insert into infra_pki.backups (taken_at, bytes, certificates) values
		(to_timestamp(1700000000), 1, 1), (to_timestamp(1800000000.5), 1, 1), (to_timestamp(1600000000), 1, 1)`)
	require.NoError(t, err)
	require.Equal(t, "pki_backup_last_success_seconds 1.8000000005e+09\npki_collection_success{part=\"backups\"} 1\n", collect())
	_, err = db.Owner(t).Exec(t.Context(), "drop table infra_pki.backups")
	require.NoError(t, err)
	require.Equal(t, "pki_collection_success{part=\"backups\"} 0\n", collect())
}

func TestJournal(t *testing.T) {
	db := postgrestest.Start(t).Database()
	db.Migrate(t)
	collect := func() string {
		return figures(t, &part{name: "journal", collect: (&journal{db: db.Database, password: db.ReportsPassword}).collect})
	}
	require.Equal(t, "pki_collection_success{part=\"journal\"} 1\npki_journal_began_seconds 0\npki_journal_behind_bytes 0\npki_journal_following 0\n", collect())
	_, err := db.Owner(t).Exec(t.Context(), `select pg_create_logical_replication_slot('infra_pki_journal_20260131t030000z', 'pgoutput')`)
	require.NoError(t, err)
	db.Migrate(t) // writes to the log
	require.Equal(t, `pki_collection_success{part="journal"} 1
pki_journal_began_seconds 1.7698284e+09
pki_journal_behind_bytes N
pki_journal_following 0
`, vague(collect(), "pki_journal_behind_bytes"))
}

func TestPooler(t *testing.T) {
	db := postgrestest.Start(t).Database()
	db.Migrate(t)
	pgbouncer := db.Pooler(t, config.Sizes{Pool: 1, Clients: 200}, "")
	collect := func() string {
		return figures(t, &part{name: "pooler", collect: (&pooler{db: db.Database, password: db.ReportsPassword}).collect})
	}
	login := func() *postgrestest.Database {
		through := *db
		through.Database = db.Database.Pooler()
		return &through
	}
	first, second := login().Runtime(t), login().Runtime(t)
	_, err := first.Exec(t.Context(), "begin")
	require.NoError(t, err)
	waiting := make(chan error)
	go func() {
		_, err := second.Exec(context.WithoutCancel(t.Context()), "select 1")
		waiting <- err
	}()
	var got string
	require.Eventually(t, func() bool {
		got = collect()
		return strings.Contains(got, `pki_pooler_clients{state="waiting"} 1`)
	}, 10*time.Second, 100*time.Millisecond)
	time.Sleep(50 * time.Millisecond)
	require.Equal(t, `pki_collection_success{part="pooler"} 1
pki_pooler_clients{state="active"} 1
pki_pooler_clients{state="waiting"} 1
pki_pooler_longest_wait_seconds N
pki_pooler_servers{state="active"} 1
pki_pooler_servers{state="idle"} 0
pki_pooler_transactions_total N
pki_pooler_up 1
pki_pooler_wait_seconds_total N
`, vague(collect(), "pki_pooler_longest_wait_seconds", "pki_pooler_wait_seconds_total", "pki_pooler_transactions_total"))

	_, err = first.Exec(t.Context(), "commit")
	require.NoError(t, err)
	require.NoError(t, <-waiting)
	got = collect()
	require.Contains(t, got, "pki_pooler_longest_wait_seconds 0\n")
	require.Contains(t, got, `pki_pooler_servers{state="idle"} 1`)

	pgbouncer.Signal(t, syscall.SIGKILL)
	require.Equal(t, "pki_collection_success{part=\"pooler\"} 0\npki_pooler_up 0\n", collect())
}

// A real authority, one of whose provisioners could not be initialised.
func TestReplicas(t *testing.T) {
	idle := freeAddress(t)
	ca, err := stepcatest.New(t.TempDir(), stepcatest.Options{
		Provisioners: provisioner.List{
			&provisioner.ACME{Type: "ACME", Name: `with "quotes"`},
			&provisioner.OIDC{Type: "OIDC", Name: "sso", ClientID: "pki", ConfigurationEndpoint: "http://" + idle + "/.well-known/openid-configuration"},
		},
	})
	require.NoError(t, err)
	require.NoError(t, ca.Start())
	t.Cleanup(func() { require.NoError(t, ca.Stop()) })
	s := stepCAs{url: ca.URL, expected: 2, certs: ca.Certs}
	collect := func() string { return figures(t, &part{name: "replicas", collect: s.collect}) }

	require.Equal(t, `pki_collection_success{part="replicas"} 1
pki_provisioner_ready{provisioner="admin",replica="127.0.0.1"} 1
pki_provisioner_ready{provisioner="sso",replica="127.0.0.1"} 0
pki_provisioner_ready{provisioner="with \"quotes\"",replica="127.0.0.1"} 1
pki_replica_up{replica="127.0.0.1"} 1
pki_replicas_expected 2
`, collect())

	t.Run("one that proves itself with another root", func(t *testing.T) {
		other, err := stepcatest.New(t.TempDir(), stepcatest.Options{})
		require.NoError(t, err)
		s := s
		s.certs = other.Certs
		err = s.collect(t.Context(), func(*prometheus.Desc, prometheus.ValueType, float64, ...string) {})
		require.ErrorContains(t, err, "replica 127.0.0.1: asking ")
		require.ErrorContains(t, err, "certificate not trusted")
	})
	t.Run("one that takes the connection and says nothing", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // loopback
		require.NoError(t, err)
		defer l.Close() //nolint:errcheck // nobody is accepted
		s.url = "https://" + l.Addr().String()
		start := time.Now()
		require.Equal(t, "pki_collection_success{part=\"replicas\"} 0\npki_replica_up{replica=\"127.0.0.1\"} 0\npki_replicas_expected 2\n", collect())
		require.Less(t, time.Since(start), 5*time.Second, "a scrape and a health check have no longer")
	})
	t.Run("none", func(t *testing.T) {
		s.url = "https://nowhere.invalid:9000"
		require.Equal(t, "pki_collection_success{part=\"replicas\"} 0\npki_replicas_expected 2\n", collect())
	})
}

func TestCertificates(t *testing.T) {
	ca, err := stepcatest.New(t.TempDir(), stepcatest.Options{})
	require.NoError(t, err)
	other, err := stepcatest.New(t.TempDir(), stepcatest.Options{})
	require.NoError(t, err)
	collect := func() string {
		return figures(t, &part{name: "certificates", collect: certificates{dir: ca.Certs}.collect})
	}
	require.Len(t, regexp.MustCompile(`(?m)^pki_certificate_not_after_seconds\{fingerprint="[0-9a-f]{64}",name="(root|intermediate)"\} `).FindAllString(collect(), -1), 2)

	t.Run("two roots that take turns, one of them twice", func(t *testing.T) {
		path := filepath.Join(ca.Certs, rootFile)
		one, err := os.ReadFile(path)
		require.NoError(t, err)
		two, err := os.ReadFile(filepath.Join(other.Certs, rootFile))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(path, append(append(append([]byte{}, one...), two...), one...), 0o600))
		got := collect()
		require.Equal(t, 2, strings.Count(got, `name="root"`))
		require.Contains(t, got, `pki_collection_success{part="certificates"} 1`)
	})
	t.Run("a root that cannot be read does not hide the intermediate", func(t *testing.T) {
		require.NoError(t, os.WriteFile(filepath.Join(ca.Certs, rootFile), []byte("nothing"), 0o600))
		got := collect()
		require.NotContains(t, got, `name="root"`)
		require.Contains(t, got, `name="intermediate"`)
		require.Contains(t, got, `pki_collection_success{part="certificates"} 0`)
	})
}

func TestDisk(t *testing.T) {
	got := figures(t, &part{name: "disk", collect: disk{path: t.TempDir()}.collect})
	require.Equal(t, "pki_collection_success{part=\"disk\"} 1\npki_disk_free_bytes N\npki_disk_size_bytes N\n", vague(got, "pki_disk_free_bytes", "pki_disk_size_bytes"))
	require.Equal(t, "pki_collection_success{part=\"disk\"} 0\n", figures(t, &part{name: "disk", collect: disk{path: "/nowhere"}.collect}))
}

var anything = desc("anything", "For tests.")

func TestPartsAreIndependent(t *testing.T) {
	good := &part{name: "good", collect: func(_ context.Context, add emit) error {
		add(anything, prometheus.GaugeValue, 7)
		return nil
	}}
	stuck := &part{name: "stuck", collect: func(ctx context.Context, _ emit) error {
		<-ctx.Done()
		return ctx.Err()
	}}
	start := time.Now()
	require.Equal(t, "pki_anything 7\npki_collection_success{part=\"good\"} 1\npki_collection_success{part=\"stuck\"} 0\n",
		scrape(t, newExporter(t.Context(), slog.New(slog.DiscardHandler), stuck, good)))
	require.Less(t, time.Since(start), 5*time.Second)
}

func TestFiguresAreKeptForAWhile(t *testing.T) {
	times := 0
	e := newExporter(t.Context(), slog.New(slog.DiscardHandler), &part{name: "counted", collect: func(context.Context, emit) error {
		times++
		return nil
	}})
	scrape(t, e)
	scrape(t, e)
	require.Equal(t, 1, times, "for two scrapes and two health checks")
	e.taken = e.taken.Add(-keep)
	scrape(t, e)
	require.Equal(t, 2, times)
}

func TestTroubleIsLoggedOnce(t *testing.T) {
	var out strings.Builder
	log := slog.New(slog.NewJSONHandler(&out, nil))
	p := &part{name: "pooler"}
	for _, err := range []error{nil, io.EOF, io.EOF, io.ErrUnexpectedEOF, nil, nil} {
		p.tell(t.Context(), log, err)
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		var said struct{ Msg, Part, Reason string }
		require.NoError(t, json.Unmarshal([]byte(line), &said))
		got = append(got, strings.TrimSpace(said.Part+" "+said.Msg+" "+said.Reason))
	}
	require.Equal(t, []string{"pooler not collected EOF", "pooler not collected unexpected EOF", "pooler collected again"}, got)
}

// A password that the server does not take is in no figure and in no line of the log.
func TestSecretsStaySecret(t *testing.T) {
	db := postgrestest.New(t)
	db.Migrate(t)
	var out strings.Builder
	wrong := config.Secret("a-wrong-password-of-reports")
	e := newExporter(t.Context(), slog.New(slog.NewTextHandler(&out, nil)),
		&part{name: "database", collect: (&database{db: db.Database, password: wrong}).collect})
	got := scrape(t, e)
	require.Contains(t, got, "pki_database_up 0")
	require.Contains(t, out.String(), "28P01")
	require.NotContains(t, out.String()+got, wrong.Reveal())
}
