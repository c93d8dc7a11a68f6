package edge

import (
	"errors"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"
)

// What became of a connection: the word in the log and in the counter.
const (
	admitted   = "admitted"    // handed to a replica
	denied     = "denied"      // not on the allow-list
	limited    = "limited"     // over one of the limits
	notTLS     = "not-tls"     // no ClientHello, or none in time
	noUpstream = "no-upstream" // no replica took it
)

// The counters outlive the configuration, so that a reload resets none.
var (
	connectionsTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "edge_connections_total", Help: "Connections that are over, by what became of them.",
	}, []string{"decision"})
	bytesTotal = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "edge_bytes_total", Help: "Bytes received from clients and sent to them, in connections that are over.",
	}, []string{"direction"})
	dialFailures = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "edge_dial_failures_total", Help: "Failed attempts to connect to a replica for a client.",
	})
	activeConnections = prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "edge_active_connections", Help: "Connections that count against the limits now.",
	}, func() float64 { return float64(admission.active()) })
	upstreamsDesc = prometheus.NewDesc("edge_upstreams",
		"Replicas by state, for every upstream whose name has ever resolved.", []string{"upstream", "state"}, nil)
)

func init() {
	for _, decision := range []string{admitted, denied, limited, notTLS, noUpstream} {
		connectionsTotal.WithLabelValues(decision)
	}
	for _, direction := range []string{"received", "sent"} {
		bytesTotal.WithLabelValues(direction)
	}
}

// registerMetrics makes the counters part of a configuration's registry. Each
// handler calls it, so all but the first find them there.
func registerMetrics(ctx caddy.Context) error {
	for _, c := range []prometheus.Collector{connectionsTotal, bytesTotal, dialFailures, activeConnections, upstreamCounts{}} {
		err := ctx.GetMetricsRegistry().Register(c)
		if _, known := errors.AsType[prometheus.AlreadyRegisteredError](err); err != nil && !known {
			return err
		}
	}
	return nil
}

// upstreamCounts counts the replicas when it is asked.
type upstreamCounts struct{}

// Describe implements prometheus.Collector.
func (upstreamCounts) Describe(ch chan<- *prometheus.Desc) { ch <- upstreamsDesc }

// Collect implements prometheus.Collector. A name that never resolved, such as
// that of a service which this stack does not have, is left out.
func (upstreamCounts) Collect(ch chan<- prometheus.Metric) {
	counts := make(map[string]map[string]int)
	for _, p := range openPools() {
		statuses, known := p.statuses()
		if known && counts[p.name()] == nil {
			counts[p.name()] = make(map[string]int)
		}
		for _, s := range statuses {
			counts[p.name()][s.State]++
		}
	}
	for name, count := range counts {
		for _, state := range []string{ready, alive, out, draining} {
			ch <- prometheus.MustNewConstMetric(upstreamsDesc, prometheus.GaugeValue, float64(count[state]), name, state)
		}
	}
}
