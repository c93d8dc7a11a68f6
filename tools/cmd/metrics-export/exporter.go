package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

const (
	// A part that takes longer will not end well. Below the five seconds that a
	// health check has.
	partTimeout = 3 * time.Second
	// Figures are collected no more often than this: each time costs step-ca a line
	// in its log, and the database two logins.
	keep = 15 * time.Second
)

// emit hands over one figure.
type emit func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string)

// part is what is collected together and fails together.
type part struct {
	name    string
	collect func(context.Context, emit) error

	trouble string // as last logged
}

// exporter collects all parts at once, each on its own: what holds one up or stops it
// does not do so to the others.
type exporter struct {
	ctx   context.Context //nolint:containedctx // of the program: a collector gets none with the question
	log   *slog.Logger
	parts []*part

	mu      sync.Mutex
	figures []prometheus.Metric
	taken   time.Time
}

func newExporter(ctx context.Context, log *slog.Logger, parts ...*part) *exporter {
	return &exporter{ctx: ctx, log: log, parts: parts}
}

// Describe says nothing in advance: which figures there are depends on who answers.
func (e *exporter) Describe(chan<- *prometheus.Desc) {}

// Collect hands over the figures, of now or of a moment ago.
func (e *exporter) Collect(out chan<- prometheus.Metric) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.taken.IsZero() || time.Since(e.taken) >= keep {
		e.figures = e.collect()
		e.taken = time.Now()
	}
	for _, m := range e.figures {
		out <- m
	}
}

var collectionSuccess = desc("collection_success", "Whether all figures of this part could be collected.", "part")

func (e *exporter) collect() []prometheus.Metric {
	var (
		mu      sync.Mutex
		figures []prometheus.Metric
		work    sync.WaitGroup
	)
	add := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		m := prometheus.MustNewConstMetric(d, kind, value, labels...)
		mu.Lock()
		defer mu.Unlock()
		figures = append(figures, m)
	}
	for _, p := range e.parts {
		work.Go(func() {
			ctx, cancel := context.WithTimeout(e.ctx, partTimeout)
			defer cancel()
			err := p.collect(ctx, add)
			p.tell(e.ctx, e.log, err)
			add(collectionSuccess, prometheus.GaugeValue, number(err == nil), p.name)
		})
	}
	work.Wait()
	return figures
}

// tell logs what changed since the last time, and nothing else.
func (p *part) tell(ctx context.Context, log *slog.Logger, err error) {
	if ctx.Err() != nil {
		return // stopped: err says so, if anything
	}
	said := ""
	if err != nil {
		said = err.Error()
	}
	if said == p.trouble {
		return
	}
	p.trouble = said
	if err == nil {
		log.LogAttrs(ctx, slog.LevelInfo, "collected again", slog.String("part", p.name))
		return
	}
	attrs := []slog.Attr{slog.String("part", p.name), slog.String("reason", said)}
	for _, hint := range oneshot.Hints(err) {
		attrs = append(attrs, slog.String("hint", hint))
	}
	log.LogAttrs(ctx, slog.LevelError, "not collected", attrs...)
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("pki_"+name, help, labels, nil)
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
