package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/eab"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

var eabAdd = command{
	summary: "make a key with which one ACME account can be registered",
	usage: `usage: pkictl acme eab add [--reference TEXT] [--dry-run]

Makes a key for External Account Binding (RFC 8555 section 7.3.4). Where
ACME_REQUIRE_EAB is true, an ACME client needs one to register its account; each is
good for one registration, at any of the CA's ACME provisioners. The two lines on
standard output are all that the client needs. The second one is a secret, and it is
shown this once.

  --reference TEXT   what the key is for, in your own words; may be used again when the
                     key before it is spent
  --dry-run          look whether a key can be made, and make none

` + databaseEnvironment + `
Examples:
  docker compose run --rm pkictl acme eab add --reference web.lan
  pkictl acme eab add --reference web.lan > eab.env && . ./eab.env
  certbot register --eab-kid "$EAB_KID" --eab-hmac-key "$EAB_HMAC_KEY" …
  lego --eab --kid "$EAB_KID" --hmac "$EAB_HMAC_KEY" …
`,
	setup: func(fs *flag.FlagSet) work {
		reference := fs.String("reference", "", "")
		dryRun := fs.Bool("dry-run", false, "")
		return func(ctx context.Context, log *slog.Logger) error {
			if err := eab.CheckReference(*reference); err != nil {
				return oneshot.Usage(fmt.Errorf("--reference: %w; a good value: web.lan", err))
			}
			return withKeys(ctx, *dryRun, func(conn eab.DB) error {
				id, secret, err := eab.Add(ctx, conn, *reference, time.Now())
				if errors.Is(err, eab.ErrTaken) {
					return oneshot.WithHint(err, `use that key, or end it with "pkictl acme eab revoke" if its secret is lost`)
				}
				if err != nil {
					return err
				}
				if *dryRun {
					log.LogAttrs(ctx, slog.LevelInfo, "would be created", slog.String("reference", *reference))
					return nil
				}
				log.LogAttrs(ctx, slog.LevelInfo, "created", slog.String("kid", id), slog.String("reference", *reference))
				_, err = fmt.Printf("EAB_KID=%s\nEAB_HMAC_KEY=%s\n", id, eab.Encode(secret))
				if err != nil {
					return oneshot.WithHint(fmt.Errorf("printing the key: %w", err), `"pkictl acme eab revoke %s" ends it, then add another`, id)
				}
				return nil
			})
		}
	},
}

var eabList = command{
	summary: "list the keys for ACME accounts",
	usage: `usage: pkictl acme eab list [--json]

Lists the keys that "pkictl acme eab add" made, the oldest first, without their secrets.

  unused        an account can be registered with it, once
  bound         an account was; the key itself is spent
  deactivated   an account was, and it is deactivated
  revoked       no account was, and none can be

  --json   one array of objects

` + databaseEnvironment + `
Examples:
  docker compose run --rm pkictl acme eab list
  pkictl acme eab list --json | jq -r '.[] | select(.state == "unused") | .kid'
`,
	setup: func(fs *flag.FlagSet) work {
		asJSON := fs.Bool("json", false, "")
		return func(ctx context.Context, _ *slog.Logger) error {
			return withDatabase(ctx, noSettings, func(conn *pgx.Conn) error {
				keys, err := eab.List(ctx, conn)
				if err != nil {
					return err
				}
				return printKeys(keys, *asJSON)
			})
		}
	},
}

func printKeys(keys []eab.Key, asJSON bool) error {
	type line struct {
		KID       string     `json:"kid"`
		Reference string     `json:"reference"`
		State     eab.State  `json:"state"`
		Created   time.Time  `json:"created"`
		Account   string     `json:"account,omitempty"`
		Ended     *time.Time `json:"ended,omitempty"`
	}
	lines := []line{}
	for _, k := range keys {
		l := line{KID: k.ID, Reference: k.Reference, State: k.State, Created: k.CreatedAt, Account: k.Account}
		if !k.EndedAt.IsZero() {
			at := k.EndedAt.UTC().Truncate(time.Second)
			l.Ended = &at
		}
		lines = append(lines, l)
	}
	if asJSON {
		return printJSON(lines)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "KID\tSTATE\tCREATED\tENDED\tACCOUNT\tREFERENCE") // Flush tells
	for _, l := range lines {
		ended := ""
		if l.Ended != nil {
			ended = l.Ended.Format(time.RFC3339)
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", l.KID, l.State, l.Created.Format(time.RFC3339), orDash(ended), orDash(l.Account), orDash(l.Reference)) // as above
	}
	return w.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func printJSON(v any) error {
	enc := json.NewEncoder(os.Stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

var eabRevoke = command{
	summary: "make such a key unusable, or deactivate the account it is bound to",
	usage: `usage: pkictl acme eab revoke [--deactivate-account] [--dry-run] KID

An unused key becomes unusable, at once: registering with it is refused. It stays in
the list. A client that was being registered at that very moment may still get its
account; the list then shows the key as bound.

A bound key is spent. The account that was registered with it no longer needs it, so
revoking the key stops nothing; to stop the account, deactivate it. That is for good:
the CA refuses whatever is signed with the account's key from then on, new orders and
pending ones. Certificates that the account has already stay valid until they end or
are revoked ("pkictl revoke").

  --deactivate-account   if the key is bound, deactivate its account
  --dry-run              say what would be done

` + databaseEnvironment + `
Examples:
  docker compose run --rm pkictl acme eab revoke bT2vWqgZ5mJ0xK7nLhRcYdUeSiPfAoG4
  pkictl acme eab revoke --deactivate-account bT2vWqgZ5mJ0xK7nLhRcYdUeSiPfAoG4
`,
	operands: []string{"KID"},
	setup: func(fs *flag.FlagSet) work {
		deactivate := fs.Bool("deactivate-account", false, "")
		dryRun := fs.Bool("dry-run", false, "")
		return func(ctx context.Context, log *slog.Logger) error {
			return withKeys(ctx, *dryRun, func(conn eab.DB) error {
				k, changed, err := eab.Revoke(ctx, conn, fs.Arg(0), *deactivate, time.Now())
				switch {
				case errors.Is(err, eab.ErrBound):
					return oneshot.WithHint(err, "account %s was registered with it at %s and goes on working; --deactivate-account stops it, for good",
						k.Account, k.EndedAt.UTC().Format(time.RFC3339))
				case errors.Is(err, eab.ErrUnknown):
					return oneshot.WithHint(err, `"pkictl acme eab list" shows them`)
				case err != nil:
					return err
				}
				outcome := "unchanged"
				if changed {
					outcome = string(k.State)
					if *dryRun {
						outcome = "would be " + outcome
					}
				}
				log.LogAttrs(ctx, slog.LevelInfo, outcome, slog.String("kid", k.ID), slog.String("reference", k.Reference),
					slog.String("state", string(k.State)), slog.String("account", k.Account))
				return nil
			})
		}
	},
}

func noSettings(*config.Reader) {}

// withKeys does work on the keys, which a dry run takes back.
func withKeys(ctx context.Context, dryRun bool, do func(eab.DB) error) error {
	return withDatabase(ctx, noSettings, func(conn *pgx.Conn) error {
		if !dryRun {
			return do(conn)
		}
		tx, err := conn.Begin(ctx)
		if err != nil {
			return fmt.Errorf("beginning a dry run: %w", err)
		}
		return errors.Join(do(tx), tx.Rollback(context.WithoutCancel(ctx)))
	})
}
