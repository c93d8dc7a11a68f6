// Command metrics-export serves what neither step-ca nor the edge counts, for
// Prometheus: the database, the pooler, the ends of the CA's certificates, the
// provisioners of each replica, the last backup and the room on the disk.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
)

const usage = `usage: metrics-export [flags]
       metrics-export --health

Serves figures of the whole stack for Prometheus on /metrics, until it is stopped. They
are collected when they are asked for, and at most every 15 seconds. What cannot be
collected is missing, and pki_collection_success{part} says so; the log says why.

  --listen ADDRESS     where to serve (default :9187)
  --certs DIR          the CA's directory of certificates (default /home/step/certs):
                       root_ca.crt and intermediate_ca.crt, one or several each
  --ca-url URL         the replicas: every address that its host has (default
                       https://step-ca:9000)
  --replicas N         how many replicas there are to be (default 2)
  --journal            a journal is to follow the database (postgres/journal.yml)
  --health             ends with 0 if the figures are served, else with 1

Figures (times are in seconds since 1970):
  pki_collection_success{part}                         1 or 0: database, pooler, certificates,
                                                       replicas, backups, disk, journal
  pki_database_up                                      1 or 0
  pki_database_size_bytes
  pki_database_connections{state}                      of clients
  pki_database_max_connections
  pki_database_oldest_transaction_seconds              how long it has been open
  pki_database_checksum_failures_total                 damaged pages that were read
  pki_database_rows{table}                             as the server estimates them
  pki_database_table_bytes{table}                      with indexes
  pki_database_wal_bytes                               write-ahead log on disk
  pki_database_archive_failing                         1: the last try to archive failed
  pki_pooler_up                                        1 or 0
  pki_pooler_clients{state="active|waiting"}           waiting: for a connection to the server
  pki_pooler_servers{state="active|idle"}
  pki_pooler_longest_wait_seconds                      of the clients that wait now
  pki_pooler_wait_seconds_total                        of all clients so far
  pki_pooler_transactions_total
  pki_certificate_not_after_seconds{name="root|intermediate",fingerprint}
  pki_replicas_expected                                --replicas
  pki_replica_up{replica}                              1 or 0: it answers
  pki_provisioner_ready{replica,provisioner}           1 or 0
  pki_backup_last_success_seconds                      0: there has been none
  pki_journal_following                                1 or 0; these three with --journal
  pki_journal_behind_bytes                             of write-ahead log, not yet in it
  pki_journal_began_seconds                            0: there is none
  pki_disk_size_bytes, pki_disk_free_bytes             of the file system that --certs is on, as a
                                                       rule the one of all of the stack's volumes

Environment:
  POSTGRES_HOST, POSTGRES_PORT, POSTGRES_SSLMODE      the server
  PGBOUNCER_HOST, PGBOUNCER_PORT                      the pooler
  POSTGRES_DB, POSTGRES_USER                          the database and its owner
  REPORTS_DB_PASSWORD or REPORTS_DB_PASSWORD_FILE     the password of the role reports
  LOG_FORMAT=json                                     one JSON object a line

Examples:
  metrics-export --replicas 3
  docker compose exec metrics-export metrics-export --health

Exit codes: 0 stopped, or healthy; 1 not healthy, or failed; 2 misconfigured.
`

func main() { oneshot.Main("metrics-export", run) }

func run(ctx context.Context, args []string, log *slog.Logger) error {
	flags := flag.NewFlagSet("metrics-export", flag.ContinueOnError)
	listen := flags.String("listen", ":9187", "")
	certs := flags.String("certs", "/home/step/certs", "")
	caURL := flags.String("ca-url", "https://step-ca:9000", "")
	replicas := flags.Int("replicas", 2, "")
	withJournal := flags.Bool("journal", false, "")
	health := flags.Bool("health", false, "")
	if err := oneshot.Parse(flags, args, usage); err != nil {
		return err
	}
	if _, err := stepca.New(*caURL); err != nil {
		return oneshot.Usage(err)
	}
	if _, _, err := net.SplitHostPort(*listen); err != nil {
		return oneshot.Usage(fmt.Errorf("--listen %q is not of the form HOST:PORT or :PORT", *listen))
	}
	if *replicas < 1 {
		return oneshot.Usage(fmt.Errorf("--replicas %d is not a number of replicas", *replicas))
	}
	if *health {
		return healthy(ctx, *listen)
	}

	settings := config.NewReader()
	db, password := settings.Database(), settings.ReportsPassword()
	if err := settings.Err(); err != nil {
		return err
	}
	for _, w := range settings.Warnings() {
		log.LogAttrs(ctx, slog.LevelWarn, w)
	}
	parts := []*part{
		{name: "database", collect: (&database{db: db, password: password}).collect},
		{name: "pooler", collect: (&pooler{db: db, password: password}).collect},
		{name: "certificates", collect: certificates{dir: *certs}.collect},
		{name: "replicas", collect: stepCAs{url: *caURL, expected: *replicas, certs: *certs}.collect},
		{name: "backups", collect: (&backups{db: db, password: password}).collect},
		{name: "disk", collect: disk{path: *certs}.collect},
	}
	if *withJournal {
		parts = append(parts, &part{name: "journal", collect: (&journal{db: db, password: password}).collect})
	}
	return serve(ctx, *listen, newExporter(ctx, log, parts...))
}

func serve(ctx context.Context, address string, e *exporter) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(e)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorHandling:       promhttp.ContinueOnError, // what is good is served
		MaxRequestsInFlight: 10,
	}))
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("serving the figures: %w", err)
	}
	e.log.LogAttrs(ctx, slog.LevelInfo, "serving", slog.String("address", l.Addr().String()))
	server := &http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() }) // an answer cut short is a missed scrape
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the figures: %w", err)
	}
	return nil
}

// healthy asks for the figures, as Prometheus does. That costs nothing: they are
// collected as often as before.
func healthy(ctx context.Context, listen string) error {
	_, port, _ := net.SplitHostPort(listen) // checked by run
	ctx, cancel := context.WithTimeout(ctx, 4500*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:"+port+"/metrics", http.NoBody)
	if err != nil {
		return fmt.Errorf("asking for the figures: %w", err)
	}
	resp, err := new(http.Transport).RoundTrip(req)
	if err != nil {
		return oneshot.WithHint(fmt.Errorf("asking for the figures: %w", err), "docker compose logs metrics-export")
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return fmt.Errorf("asking for the figures: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return oneshot.WithHint(fmt.Errorf("asking for the figures: status %d", resp.StatusCode), "docker compose logs metrics-export")
	}
	return nil
}
