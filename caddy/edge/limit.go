package edge

import (
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
	"golang.org/x/time/rate"
)

// Limit passes a connection on while there is room, and else ends the handling
// with the decision "limited", which closes it. Every edge_limit counts into the
// same totals, over all listeners and reloads; only the numbers are its own.
type Limit struct {
	// MaxConnections is how many there may be at a time.
	MaxConnections int `json:"max_connections,omitempty"`
	// MaxPerSource is how many there may be at a time from one IPv4 address or
	// one IPv6 /64.
	MaxPerSource int `json:"max_per_source,omitempty"`
	// RatePerSource is how many such a source may open within a second.
	RatePerSource int `json:"rate_per_source,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Limit) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.handlers.edge_limit",
		New: func() caddy.Module { return new(Limit) },
	}
}

// Provision refuses a limit that is missing: without one, a client that misbehaves
// takes the descriptors of all others.
func (l *Limit) Provision(ctx caddy.Context) error {
	for _, s := range l.settings() {
		if *s.value < 1 {
			return fmt.Errorf("edge_limit: %s is %d: want 1 or more", s.name, *s.value)
		}
	}
	return registerMetrics(ctx)
}

type limitSetting struct {
	name  string
	value *int
}

func (l *Limit) settings() []limitSetting {
	return []limitSetting{
		{"max_connections", &l.MaxConnections},
		{"max_per_source", &l.MaxPerSource},
		{"rate_per_source", &l.RatePerSource},
	}
}

// Handle counts the connection for as long as the handlers behind have it.
func (l *Limit) Handle(cx *layer4.Connection, next layer4.Handler) error {
	src := source(cx.RemoteAddr())
	if err := admission.admit(src, l, time.Now()); err != nil {
		conclude(cx, outcome{decision: limited, err: err})
		return nil
	}
	defer admission.release(src)
	return next.Handle(cx)
}

// UnmarshalCaddyfile reads a block of three lines, in any order, which is what
// provisioner-init renders:
//
//	edge_limit {
//		max_connections <number>
//		max_per_source <number>
//		rate_per_source <number>
//	}
func (l *Limit) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the handler's own name
	if d.NextArg() {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var value *int
		for _, s := range l.settings() {
			if s.name == d.Val() {
				value = s.value
			}
		}
		if value == nil {
			return d.Errf("unexpected %q in edge_limit", d.Val())
		}
		name, number := d.Val(), ""
		if *value != 0 {
			return d.Errf("a second %s in edge_limit", name)
		}
		if !d.AllArgs(&number) {
			return d.ArgErr()
		}
		n, err := strconv.Atoi(number)
		if err != nil || n < 1 {
			return d.Errf("%s %q in edge_limit: want a number, 1 or more", name, number)
		}
		*value = n
	}
	for _, s := range l.settings() {
		if *s.value == 0 {
			return d.Errf("no %s in edge_limit", s.name)
		}
	}
	return nil
}

// admission counts what all edge_limit handlers have admitted.
var admission limiter

// limiter counts connections by source. A source is forgotten once it has none
// and could open as many as it may: the memory is bounded by the connections that
// there are and by those of the last two seconds.
type limiter struct {
	mu      sync.Mutex
	total   int
	sources map[string]*openings
	swept   time.Time
}

type openings struct {
	active int
	rate   *rate.Limiter
}

func (l *limiter) admit(src string, limit *Limit, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= limit.MaxConnections {
		return fmt.Errorf("max_connections %d", limit.MaxConnections)
	}
	s, known := l.sources[src]
	if !known {
		l.sweep(now)
		s = &openings{rate: rate.NewLimiter(rate.Limit(limit.RatePerSource), limit.RatePerSource)}
		if l.sources == nil {
			l.sources = make(map[string]*openings)
		}
		l.sources[src] = s
	}
	if s.active >= limit.MaxPerSource {
		return fmt.Errorf("max_per_source %d", limit.MaxPerSource)
	}
	if s.rate.Burst() != limit.RatePerSource { // changed by a reload
		s.rate.SetLimitAt(now, rate.Limit(limit.RatePerSource))
		s.rate.SetBurstAt(now, limit.RatePerSource)
	}
	if !s.rate.AllowN(now, 1) {
		return fmt.Errorf("rate_per_source %d", limit.RatePerSource)
	}
	s.active++
	l.total++
	return nil
}

func (l *limiter) release(src string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sources[src].active--
	l.total--
}

// sweep forgets sources, at most once a second.
func (l *limiter) sweep(now time.Time) {
	if now.Sub(l.swept) < time.Second {
		return
	}
	l.swept = now
	for src, s := range l.sources {
		if s.active == 0 && s.rate.TokensAt(now) >= float64(s.rate.Burst()) {
			delete(l.sources, src)
		}
	}
}

func (l *limiter) active() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}

var (
	_ caddy.Provisioner     = (*Limit)(nil)
	_ caddyfile.Unmarshaler = (*Limit)(nil)
	_ layer4.NextHandler    = (*Limit)(nil)
)
