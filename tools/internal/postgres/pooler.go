package postgres

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
)

// WritePoolerFiles gives the pooler what it has to know, in dir:
//
//   - settings.ini, what follows from the settings. Not its environment: Compose stops a
//     running container as soon as that changes, before anybody can refuse the edit.
//   - users.txt, the verifiers that the server has. The pooler verifies clients with
//     them, and the proof of a client (RFC 5802, ClientKey) is its own towards the server:
//     for that they must be the server's to the byte, and no password is needed.
//   - pgpass, with which its health check logs in to it as step-ca does.
//
// It is called after Migrate, by the one program that may read the verifiers. conn is
// the owner's.
func WritePoolerFiles(ctx context.Context, conn *pgx.Conn, dir string, db config.Database, sizes config.Sizes, runtime config.Secret, log *slog.Logger) error {
	var users strings.Builder
	for _, role := range []string{config.RuntimeRole, config.ReportsRole} {
		verifier, err := storedVerifier(ctx, conn, role)
		if err != nil {
			return err
		}
		// Letters, digits and "$:/+=-", so nothing to quote.
		fmt.Fprintf(&users, "%q %q\n", role, verifier)
	}
	inside := db
	inside.Host, inside.Port = "127.0.0.1", db.PoolerPort
	for _, file := range []struct{ item, name, content string }{
		{"pooler's settings", "settings.ini", poolerSettings(db, sizes)},
		{"pooler's users", "users.txt", users.String()},
		{"pooler's passfile", "pgpass", PassfileLine(inside, runtime)},
	} {
		// 0400, which is no wider than libpq takes.
		outcome, err := durable.WriteIfChanged(filepath.Join(dir, file.name), []byte(file.content), 0o400)
		if err != nil {
			return fmt.Errorf("%s: %w", file.item, err)
		}
		log.LogAttrs(ctx, slog.LevelInfo, string(outcome), slog.String("item", file.item))
	}
	return nil
}

// databaseTLS is where db-certificates writes, as the pooler sees it (postgres/tls.yml).
const databaseTLS = "/database-tls"

// poolerSettings is what postgres/pgbouncer/pgbouncer.ini includes.
func poolerSettings(db config.Database, sizes config.Sizes) string {
	s := fmt.Sprintf(`[databases]
%[1]s = host=%[2]s port=%[3]d dbname=%[1]s
[pgbouncer]
listen_port = %[4]d
default_pool_size = %[5]d
max_db_connections = %[5]d
max_client_conn = %[6]d
`, db.Name, db.Host, db.Port, db.PoolerPort, sizes.Pool, sizes.Clients)
	if db.SSLMode == "disable" {
		return s
	}
	// As step-ca insists on TLS to the pooler, the pooler does to the server.
	return s + fmt.Sprintf(`client_tls_sslmode = require
client_tls_cert_file = %[1]s/pgbouncer.crt
client_tls_key_file = %[1]s/pgbouncer.key
client_tls_protocols = tlsv1.3
server_tls_sslmode = %[2]s
server_tls_ca_file = %[1]s/ca.crt
`, databaseTLS, db.SSLMode)
}
