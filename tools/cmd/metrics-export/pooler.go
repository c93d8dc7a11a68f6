package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

// The database that is not one: PgBouncer's own figures, for the roles in stats_users.
const console = "pgbouncer"

type pooler struct {
	db       config.Database
	password config.Secret
}

var (
	poolerUp           = desc("pooler_up", "Whether the role reports can log in to the pooler's console.")
	poolerClients      = desc("pooler_clients", "Clients of the pooler, by whether they wait for a connection to the server.", "state")
	poolerServers      = desc("pooler_servers", "Connections of the pooler to the server, by whether a client has them.", "state")
	poolerLongest      = desc("pooler_longest_wait_seconds", "How long the client that is next has been waiting, 0 if none waits.")
	poolerWaited       = desc("pooler_wait_seconds_total", "Time that clients have spent waiting.")
	poolerTransactions = desc("pooler_transactions_total", "Transactions that went through the pooler.")
)

func (p *pooler) collect(ctx context.Context, add emit) error {
	db := p.db.Pooler()
	db.Name = console
	conn, err := postgres.Reports(db, p.password).Connect(ctx)
	add(poolerUp, prometheus.GaugeValue, number(err == nil))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing was written

	pools, err := show(ctx, conn.PgConn(), "pools")
	if err != nil {
		return err
	}
	add(poolerClients, prometheus.GaugeValue, pools.sum("cl_active"), "active")
	add(poolerClients, prometheus.GaugeValue, pools.sum("cl_waiting"), "waiting")
	add(poolerServers, prometheus.GaugeValue, pools.sum("sv_active"), "active")
	// "used" have been idle for long enough to be tested before they are used again.
	add(poolerServers, prometheus.GaugeValue, pools.sum("sv_idle")+pools.sum("sv_used"), "idle")
	add(poolerLongest, prometheus.GaugeValue, pools.longest())

	stats, err := show(ctx, conn.PgConn(), "stats")
	if err != nil {
		return err
	}
	add(poolerWaited, prometheus.CounterValue, stats.sum("total_wait_time")/1e6) // microseconds
	add(poolerTransactions, prometheus.CounterValue, stats.sum("total_xact_count"))
	return nil
}

// table is what the console answers, without the rows of the console itself.
type table []map[string]float64

// show asks for a list. The console knows simple queries only, and its columns change
// from version to version: they are told by their names.
func show(ctx context.Context, conn *pgconn.PgConn, what string) (table, error) {
	results, err := conn.Exec(ctx, "SHOW "+what).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("asking the pooler for its %s: %w", what, err)
	}
	var t table
	for _, r := range results {
		for _, values := range r.Rows {
			row, own := map[string]float64{}, false
			for i, f := range r.FieldDescriptions {
				if f.Name == "database" {
					own = string(values[i]) == console
				}
				if n, err := strconv.ParseFloat(string(values[i]), 64); err == nil {
					row[f.Name] = n
				}
			}
			if !own {
				t = append(t, row)
			}
		}
	}
	return t, nil
}

func (t table) sum(column string) float64 {
	var all float64
	for _, row := range t {
		all += row[column]
	}
	return all
}

func (t table) longest() float64 {
	var most float64
	for _, row := range t {
		most = max(most, row["maxwait"]+row["maxwait_us"]/1e6)
	}
	return most
}
