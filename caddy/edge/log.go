package edge

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
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

// Log counts a connection and writes one INFO line about it when it is over, with
// what became of it. caddy-l4 itself says nothing about connections above DEBUG
// (mholt/caddy-l4#204). Every admitted connection has a line; others have one
// within the bounds above.
//
// It recovers from panics behind it: one in the handling of a connection would
// otherwise end the process, and all other connections with it.
type Log struct {
	// Decision is the word for connections about which no handler behind this
	// one decides: "denied", "not-tls" or "admitted".
	Decision string `json:"decision,omitempty"`

	logger *zap.Logger
	tally  tally
	stop   chan struct{}
	done   chan struct{}
}

// outcome is what the handlers behind edge_log have to say about a connection.
type outcome struct {
	decision string
	upstream string // address of the replica, when one took it
	err      error  // why it was not served, or not to its end
}

const outcomeVar = "edge.outcome"

// conclude leaves the outcome for edge_log.
func conclude(cx *layer4.Connection, o outcome) { cx.SetVar(outcomeVar, o) }

// CaddyModule returns the Caddy module information.
func (*Log) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.handlers.edge_log",
		New: func() caddy.Module { return new(Log) },
	}
}

// Provision checks the decision and starts the window.
func (l *Log) Provision(ctx caddy.Context) error {
	switch l.Decision {
	case admitted, denied, notTLS:
	default:
		return fmt.Errorf("edge_log: decision %q: want %s, %s or %s", l.Decision, denied, notTLS, admitted)
	}
	l.start(ctx.Logger())
	return registerMetrics(ctx)
}

func (l *Log) start(logger *zap.Logger) {
	l.logger = logger
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

// Handle hands the connection on and accounts for it when it is over.
func (l *Log) Handle(cx *layer4.Connection, next layer4.Handler) error {
	start := time.Now()
	conn := &counted{Conn: cx.Conn}
	cx.Conn = conn
	panicked, err := l.handle(cx, next)

	o, decided := cx.GetVar(outcomeVar).(outcome)
	if !decided {
		o = outcome{decision: l.Decision}
	}
	if panicked != nil {
		o.err = panicked
	}
	received, sent := conn.received.Load(), conn.sent.Load()
	connectionsTotal.WithLabelValues(o.decision).Inc()
	bytesTotal.WithLabelValues("received").Add(float64(received))
	bytesTotal.WithLabelValues("sent").Add(float64(sent))

	src := source(cx.RemoteAddr())
	if o.decision != admitted && !l.tally.note(tallied{o.decision, src}) {
		return err
	}
	fields := append(make([]zap.Field, 0, 8),
		zap.String("decision", o.decision),
		zap.String("remote", cx.RemoteAddr().String()),
		zap.String("source", src),
		zap.Int64("received", received),
		zap.Int64("sent", sent),
		zap.Duration("duration", time.Since(start)),
	)
	if o.upstream != "" {
		fields = append(fields, zap.String("upstream", o.upstream))
	}
	if o.err != nil {
		fields = append(fields, zap.String("error", o.err.Error()))
	}
	l.logger.Info("connection", fields...)
	return err
}

// handle runs the handlers behind, and tells what they panicked with.
func (l *Log) handle(cx *layer4.Connection, next layer4.Handler) (panicked, err error) {
	defer func() {
		if r := recover(); r != nil {
			panicked = fmt.Errorf("panic: %v", r)
			l.logger.Error("handling connection", zap.Error(panicked), zap.Stack("stack"))
		}
	}()
	return nil, next.Handle(cx)
}

// counted counts the bytes of a connection.
type counted struct {
	net.Conn
	received, sent atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.received.Add(int64(n))
	return n, err
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n))
	return n, err
}

// CloseWrite passes half-close through.
func (c *counted) CloseWrite() error { return closeWrite(c.Conn) }

// closeWrite ends one direction of a connection and leaves the other open.
func closeWrite(conn net.Conn) error {
	half, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		return fmt.Errorf("%T cannot be half-closed", conn)
	}
	return half.CloseWrite()
}

// summarise accounts for the connections that had no line of their own.
func (l *Log) summarise() {
	bySource, unlisted := l.tally.drain()
	for of, n := range bySource {
		if n > linesPerSource {
			l.logger.Info("further connections",
				zap.String("decision", of.decision),
				zap.String("source", of.source),
				zap.Int("suppressed", n-linesPerSource),
			)
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

// tally counts the connections of one window by decision and source, in bounded
// memory.
type tally struct {
	mu       sync.Mutex
	bySource map[tallied]int
	unlisted int
}

type tallied struct{ decision, source string }

// note counts a connection and reports whether it gets a line of its own.
func (t *tally) note(of tallied) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, known := t.bySource[of]
	if !known && len(t.bySource) >= maxSources {
		t.unlisted++
		return false
	}
	if t.bySource == nil {
		t.bySource = make(map[tallied]int)
	}
	t.bySource[of] = n + 1
	return n < linesPerSource
}

// drain returns the counts and begins a new window.
func (t *tally) drain() (bySource map[tallied]int, unlisted int) {
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
