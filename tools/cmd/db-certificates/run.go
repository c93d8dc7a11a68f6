package main

import (
	"context"
	"flag"
	"log/slog"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/dbtls"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const usage = `Usage: db-certificates [--keys /database-tls] [--public /database-ca]

Makes what TLS between step-ca, pgbouncer and PostgreSQL needs: a CA of its own, and a
certificate for each of the two servers. What is there is kept, until two thirds of its
life are over: the servers' live three years, the CA 30.

A server reads a new certificate when it starts: docker compose restart postgres pgbouncer

Flags:
  --keys DIR      ca, postgres and pgbouncer, each NAME.crt and NAME.key (/database-tls)
  --public DIR    ca.crt once more, for whoever connects (/database-ca)

Environment:
  LOG_FORMAT=json                                     one JSON object a line

Examples:
  docker compose run --rm db-certificates

Exit codes: 0 done, 1 failed, 2 misconfigured.
`

func run(ctx context.Context, args []string, log *slog.Logger) error {
	fs := flag.NewFlagSet("db-certificates", flag.ContinueOnError)
	keys := fs.String("keys", "/database-tls", "")
	public := fs.String("public", "/database-ca", "")
	if err := oneshot.Parse(fs, args, usage); err != nil {
		return err
	}
	if err := config.NewReader().Err(); err != nil {
		return err
	}
	return dbtls.Ensure(*keys, *public, time.Now(), func(outcome durable.Outcome, item string) {
		log.LogAttrs(ctx, slog.LevelInfo, string(outcome), slog.String("item", item))
	})
}
