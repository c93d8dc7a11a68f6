package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/krl"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

const krlFile = "ssh.krl"

// krlTable is step-ca's table of revoked SSH certificates. step-ca itself looks at it
// when it renews one, and makes no list of it.
type krlTable struct {
	db         config.Database
	password   config.Secret
	certs, out string
}

func (k *krlTable) renew(ctx context.Context) (summary, error) {
	var list krl.List
	for _, name := range []string{"ssh_host_ca_key.pub", "ssh_user_ca_key.pub"} {
		ca, err := trustbundle.ReadSSHKey(filepath.Join(k.certs, name))
		if err != nil {
			return summary{}, err
		}
		list.CAs = append(list.CAs, ca)
	}
	conn, err := postgres.Runtime(k.db, k.password).Connect(ctx)
	if err != nil {
		return summary{}, err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing was written
	skipped, err := read(ctx, conn, &list)
	if err != nil {
		return summary{}, fmt.Errorf("reading the table revoked_ssh_certs: %w", err)
	}
	if _, err := durable.WriteIfChanged(filepath.Join(k.out, krlFile), list.Marshal(), published); err != nil {
		return summary{}, err
	}
	return summary{revoked: len(list.Serials), skipped: skipped}, nil
}

// read fills in the serials. Each stands under both CAs: for step-ca too it is one
// space of numbers (db/db.go, IsSSHRevoked), and which of the two CAs signed a
// certificate is known only as long as nobody clears up the table of certificates.
//
// Version and date follow from the rows, so that the same rows are the same file.
// The version is their number: step-ca only adds rows, so it grows with each,
// whatever the clocks say.
func read(ctx context.Context, conn *pgx.Conn, list *krl.List) (skipped int, err error) {
	rows, err := conn.Query(ctx, "select nkey, nvalue from public.revoked_ssh_certs")
	if err != nil {
		return 0, err
	}
	var key, value []byte
	_, err = pgx.ForEachRow(rows, []any{&key, &value}, func() error {
		serial, err := strconv.ParseUint(string(key), 10, 64)
		if err != nil || serial == 0 {
			skipped++
			return nil //nolint:nilerr // counted
		}
		list.Serials = append(list.Serials, serial)
		var info struct{ RevokedAt time.Time }
		// A date that cannot be read is no reason to leave a certificate valid.
		if json.Unmarshal(value, &info) == nil && info.RevokedAt.After(list.Generated) {
			list.Generated = info.RevokedAt
		}
		return nil
	})
	slices.Sort(list.Serials)
	list.Serials = slices.Compact(list.Serials)
	list.Version = uint64(len(list.Serials))
	return skipped, err
}
