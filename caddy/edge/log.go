package edge

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
	"go.uber.org/zap"
)

// Anybody can make the edge refuse, so refusals must not be a way to fill a
// disk. Each source gets its first lines in full and is only counted after
// that, until the window ends; a source that is quiet can therefore not be
// hidden by one that is loud, which a single limit for all would allow.
// The worst case, linesPerSource from maxSources every window, is about
// 20 KB/s; Docker's log rotation bounds the rest.
const (
	window         = time.Minute
	linesPerSource = 5
	maxSources     = 1024
)

// Log writes one INFO line for a connection, with a decision and the source
// address, and passes the connection on. caddy-l4 itself says nothing about
// refusals above DEBUG (mholt/caddy-l4#204).
type Log struct {
	// Decision is the word that the line carries, for example "denied".
	Decision string `json:"decision,omitempty"`

	logger *zap.Logger
	tally  tally
	stop   chan struct{}
	done   chan struct{}
}

// CaddyModule returns the Caddy module information.
func (*Log) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.handlers.edge_log",
		New: func() caddy.Module { return new(Log) },
	}
}

var decisionWord = regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)

// Provision checks the decision and starts the window.
func (l *Log) Provision(ctx caddy.Context) error {
	if !decisionWord.MatchString(l.Decision) {
		return fmt.Errorf("decision %q: want lower-case letters and single dashes", l.Decision)
	}
	l.start(ctx.Logger())
	return nil
}

func (l *Log) start(logger *zap.Logger) {
	l.logger = logger.With(zap.String("decision", l.Decision))
	l.stop, l.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(l.done)
		ticker := time.NewTicker(window)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				l.summarise()
			case <-l.stop:
				l.summarise()
				return
			}
		}
	}()
}

// Cleanup writes what is still only counted. Caddy calls it at shutdown and
// when a reload replaces the configuration, and also when Provision refused.
func (l *Log) Cleanup() error {
	if l.stop != nil {
		close(l.stop)
		<-l.done
	}
	return nil
}

// Handle logs the connection and hands it to the next handler untouched.
func (l *Log) Handle(cx *layer4.Connection, next layer4.Handler) error {
	src := source(cx.RemoteAddr())
	if l.tally.note(src) {
		l.logger.Info("connection",
			zap.String("remote", cx.RemoteAddr().String()),
			zap.String("source", src),
		)
	}
	return next.Handle(cx)
}

// summarise accounts for the connections that had no line of their own.
func (l *Log) summarise() {
	bySource, unlisted := l.tally.drain()
	for src, n := range bySource {
		if n > linesPerSource {
			l.logger.Info("further connections", zap.String("source", src), zap.Int("suppressed", n-linesPerSource))
		}
	}
	if unlisted > 0 {
		l.logger.Info("further connections from more sources than are listed", zap.Int("suppressed", unlisted))
	}
}

// UnmarshalCaddyfile reads
//
//	edge_log <decision>
func (l *Log) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the handler's own name
	if !d.AllArgs(&l.Decision) {
		return d.ArgErr()
	}
	if d.NextBlock(d.Nesting()) {
		return d.Err("edge_log takes no block")
	}
	return nil
}

// source names whom a connection is counted against: an IPv4 address, or the
// /64 of an IPv6 address, since every host has a whole /64 to connect from.
func source(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return addr.String()
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	if !ip.Is6() {
		return ip.String()
	}
	return netip.PrefixFrom(ip, 64).Masked().String()
}

// tally counts the connections of one window by source, in bounded memory.
type tally struct {
	mu       sync.Mutex
	bySource map[string]int
	unlisted int
}

// note counts a connection and reports whether it gets a line of its own.
func (t *tally) note(src string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, known := t.bySource[src]
	if !known && len(t.bySource) >= maxSources {
		t.unlisted++
		return false
	}
	if t.bySource == nil {
		t.bySource = make(map[string]int)
	}
	t.bySource[src] = n + 1
	return n < linesPerSource
}

// drain returns the counts and begins a new window.
func (t *tally) drain() (bySource map[string]int, unlisted int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	bySource, unlisted = t.bySource, t.unlisted
	t.bySource, t.unlisted = nil, 0
	return bySource, unlisted
}

var (
	_ caddy.CleanerUpper    = (*Log)(nil)
	_ caddy.Provisioner     = (*Log)(nil)
	_ caddyfile.Unmarshaler = (*Log)(nil)
	_ layer4.NextHandler    = (*Log)(nil)
)
