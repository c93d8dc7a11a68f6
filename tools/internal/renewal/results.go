package renewal

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
)

// Dir is where the results lie.
const Dir = "/var/lib/infra-pki"

const (
	resultsName = "renewal.json"
	lockName    = "renew.lock"
)

// Results is what is known of past runs.
type Results struct {
	// Of runs for everything that the host has. Zero: there has been none.
	LastRun     time.Time `json:"last_run,omitzero"`
	LastSuccess time.Time `json:"last_success,omitzero"`
	LastFailure time.Time `json:"last_failure,omitzero"`
	Errors      []string  `json:"errors,omitempty"` // of the last run

	Certificates map[string]Result `json:"certificates,omitempty"` // by file
}

// Result is what happened to one certificate.
type Result struct {
	Renewed       time.Time `json:"renewed,omitzero"`         // last
	Failed        time.Time `json:"failed,omitzero"`          // last
	Error         string    `json:"error,omitempty"`          // of the last run
	ReloadPending bool      `json:"reload_pending,omitempty"` // it changed, and who uses it was not told yet
}

// Load reads the results in dir; there may be none yet.
func Load(dir string) (Results, error) {
	var r Results
	data, err := os.ReadFile(filepath.Join(dir, resultsName))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, fmt.Errorf("reading the results of renewal: %w", err)
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("reading the results of renewal from %q: %w", filepath.Join(dir, resultsName), err)
	}
	return r, nil
}

// save writes the results, without those of certificates that are gone.
func (r *Results) save(dir string) error {
	maps.DeleteFunc(r.Certificates, func(path string, _ Result) bool {
		_, err := os.Lstat(path)
		return errors.Is(err, fs.ErrNotExist)
	})
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the results of renewal: %w", err)
	}
	_, err = durable.WriteIfChanged(filepath.Join(dir, resultsName), append(data, '\n'), 0o644)
	return err
}

// ran notes down how a run for everything ended.
func (r *Results) ran(now time.Time, problems []error) {
	r.LastRun, r.Errors = now, nil
	for _, err := range problems {
		r.Errors = append(r.Errors, err.Error())
	}
	if len(problems) > 0 {
		r.LastFailure = now
	} else {
		r.LastSuccess = now
	}
}

// note changes the result of a certificate.
func (r *Results) note(path string, change func(*Result)) {
	if r.Certificates == nil {
		r.Certificates = map[string]Result{}
	}
	result := r.Certificates[path]
	change(&result)
	r.Certificates[path] = result
}

// Textfile writes the figures for the textfile collector of Prometheus' node_exporter.
func (r *Results) Textfile(path string, pairs []Pair) error {
	registry := prometheus.NewRegistry()
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "pki_host_" + name, Help: help}, labels)
		registry.MustRegister(g)
		return g
	}
	gauge("renewal_last_success_seconds", "When renewal last went well, in seconds since 1970; 0 if it never did.").
		WithLabelValues().Set(seconds(r.LastSuccess))
	gauge("renewal_last_failure_seconds", "When renewal last failed, in seconds since 1970; 0 if it never did.").
		WithLabelValues().Set(seconds(r.LastFailure))
	until := gauge("certificate_not_after_seconds", "When a certificate of this host ends, in seconds since 1970.", "kind", "path")
	good := gauge("certificate_renewal_success", "Whether the last run had nothing to do for a certificate, or did it.", "kind", "path")
	for _, p := range pairs {
		good.WithLabelValues(string(p.Kind), p.Cert).Set(0)
		if r.Certificates[p.Cert].Error == "" {
			good.WithLabelValues(string(p.Kind), p.Cert).Set(1)
		}
		if c, err := p.Read(); err == nil {
			until.WithLabelValues(string(p.Kind), p.Cert).Set(float64(c.Until.Unix()))
		}
	}
	if err := prometheus.WriteToTextfile(path, registry); err != nil {
		return fmt.Errorf("writing the figures: %w", err)
	}
	return nil
}

func seconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.Unix())
}
