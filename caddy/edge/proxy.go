package edge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
	"go.uber.org/zap"
)

// Proxy hands a connection to one of the replicas behind a name and copies bytes
// in both directions, of which it understands none.
//
// It does what caddy-l4's own proxy does not: it has a limit for connecting (that
// one hangs for 135 s where packets vanish), counts the connections that there are
// and not all there ever were, finds replicas through DNS, and checks them with
// the questions that matter.
type Proxy struct {
	// Upstream is host:port. All IPv4 addresses of the host are replicas.
	Upstream string `json:"upstream,omitempty"`
	// Root is a PEM file that the replicas' certificate has to verify against.
	Root string `json:"root,omitempty"`
	// ServerName is the name that it has to carry.
	ServerName string `json:"server_name,omitempty"`
	// DialTimeout bounds one attempt to connect. Default: 2s.
	DialTimeout caddy.Duration `json:"dial_timeout,omitempty"`
	// TryDuration bounds all attempts for one client. Default: 5s.
	TryDuration caddy.Duration `json:"try_duration,omitempty"`

	pool   *pool
	logger *zap.Logger
}

const (
	tryInterval = 100 * time.Millisecond // between two looks for a replica

	// firstAnswer is how long a replica may take for its ServerHello while it
	// says nothing to others either.
	firstAnswer = 2 * time.Second

	// afterHalfClose is how long one direction may go on when the other has
	// ended. step-ca gives up an idle connection after 15 s and a slow answer
	// too; without the limit a client that never closes would keep its
	// descriptors for good.
	afterHalfClose = 30 * time.Second

	// Two for each connection, thousands of them: about what a request to
	// step-ca or its answer needs. Not the kernel's splice, which Go offers
	// through io.Copy: it takes two further descriptors for each direction.
	bufferSize = 4096
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// CaddyModule returns the Caddy module information.
func (*Proxy) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.handlers.edge_proxy",
		New: func() caddy.Module { return new(Proxy) },
	}
}

// Provision joins the pool of the upstream.
func (p *Proxy) Provision(ctx caddy.Context) error {
	host, port, err := net.SplitHostPort(p.Upstream)
	if err != nil || host == "" {
		return fmt.Errorf("edge_proxy: upstream %q: want host:port", p.Upstream)
	}
	if p.Root == "" || p.ServerName == "" {
		return errors.New("edge_proxy: root and server_name are needed to check the replicas")
	}
	if p.DialTimeout == 0 {
		p.DialTimeout = caddy.Duration(2 * time.Second)
	}
	if p.TryDuration == 0 {
		p.TryDuration = caddy.Duration(5 * time.Second)
	}
	if err := registerMetrics(ctx); err != nil {
		return err
	}
	p.logger = ctx.Logger()
	p.pool, err = openPool(p.key(host, port))
	return err
}

func (p *Proxy) key(host, port string) poolKey { return poolKey{host, port, p.Root, p.ServerName} }

// Cleanup leaves the pool, which goes on where another configuration uses it.
func (p *Proxy) Cleanup() error {
	if p.pool == nil { // Provision refused
		return nil
	}
	_, err := pools.Delete(p.pool.poolKey)
	return err
}

// Handle proxies the connection. It is the last handler.
func (p *Proxy) Handle(cx *layer4.Connection, _ layer4.Handler) error {
	hello := bytes.Clone(cx.MatchingBytes())
	if _, err := io.ReadFull(cx, hello); err != nil {
		return err
	}
	up, r, err := p.connect(cx.Context, nil)
	if err != nil {
		conclude(cx, outcome{decision: noUpstream, err: err})
		return nil
	}
	defer func() {
		_ = up.Close()
		p.pool.release(r)
	}()
	if err := p.greet(cx, up, r, hello); err != nil {
		if secondUp, second, noSecond := p.connect(cx.Context, r); noSecond == nil {
			_ = up.Close()
			p.pool.release(r)
			up, r = secondUp, second
			_, _ = up.Write(hello) // an error comes again in copyBoth
		}
	}
	o := outcome{decision: admitted, upstream: p.pool.address(r)}
	conclude(cx, o) // in case of a panic
	o.err = p.copyBoth(cx, up, r)
	conclude(cx, o)
	return nil
}

// greet sends a replica the ClientHello and hands its first answer to the client.
// A replica that has died or frozen since its last check gives none; the hello can
// then go to another one, since nobody has acted on it. It returns an error only
// where there was no answer, and leaves the replica's state alone: there are hellos
// that deserve none.
func (p *Proxy) greet(cx *layer4.Connection, up net.Conn, r *replica, hello []byte) error {
	if len(hello) == 0 { // the route has not waited for one
		return nil
	}
	defer func() { _ = up.SetReadDeadline(time.Time{}) }()
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	if _, err := up.Write(hello); err != nil {
		return err
	}
	for {
		start := time.Now()
		_ = up.SetReadDeadline(start.Add(firstAnswer))
		n, err := up.Read(buffer[:])
		switch {
		case n > 0:
			r.heard.Store(time.Now().UnixNano())
			_, _ = cx.Conn.Write(buffer[:n]) // an error comes again in copyBoth
			return nil
		case isTimeout(err) && r.heard.Load() > start.UnixNano():
			// It is busy with others and not frozen.
		default:
			return err
		}
	}
}

// connect tries one replica after the other, besides one, until one answers or the
// time is over. Where that one is all there is, it returns at once.
func (p *Proxy) connect(ctx context.Context, besides *replica) (net.Conn, *replica, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(p.TryDuration))
	defer cancel()
	dialer := net.Dialer{Timeout: time.Duration(p.DialTimeout)}
	failed := errors.New("no replica is in service")
	for {
		r := p.pool.pick(besides)
		if r != nil {
			up, err := dialer.DialContext(ctx, "tcp", p.pool.address(r))
			if err == nil {
				return up, r, nil
			}
			p.pool.release(r)
			dialFailures.Inc()
			failed = err
			if ctx.Err() == nil && !ourOwn(err) {
				p.pool.setHealth(r, err)
				continue
			}
		}
		if r == nil && besides != nil || !sleep(ctx, tryInterval, nil) {
			return nil, nil, failed
		}
	}
}

// copyBoth copies until both directions have ended, and passes half-close on.
func (p *Proxy) copyBoth(cx *layer4.Connection, up net.Conn, r *replica) error {
	down := cx.Conn
	done := make(chan error, 1)
	go func() {
		readErr, writeErr := transfer(up, cx, func() {})
		_ = closeWrite(up)
		_ = up.SetReadDeadline(time.Now().Add(afterHalfClose))
		if readErr != nil {
			_ = up.Close() // the client is gone, so nobody waits for the answer
		}
		done <- firstError(readErr, writeErr)
	}()
	readErr, writeErr := transfer(down, up, func() { r.heard.Store(time.Now().UnixNano()) })
	_ = closeWrite(down)
	_ = down.SetReadDeadline(time.Now().Add(afterHalfClose))
	if readErr != nil || writeErr != nil {
		_ = down.Close()
	}
	return firstError(readErr, writeErr, <-done)
}

// transfer copies until src ends and calls heard whenever src sends.
func transfer(dst io.Writer, src io.Reader, heard func()) (readErr, writeErr error) {
	// In a goroutine of its own edge_log does not see a panic.
	defer func() {
		if r := recover(); r != nil {
			readErr = fmt.Errorf("panic: %v", r)
		}
	}()
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	for {
		n, err := src.Read(buffer[:])
		if n > 0 {
			heard()
			if _, err := dst.Write(buffer[:n]); err != nil {
				return nil, err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
	}
}

// firstError prefers the error that is not merely the other's consequence.
func firstError(errs ...error) error {
	var consequence error
	for _, err := range errs {
		if errors.Is(err, net.ErrClosed) {
			consequence = err
		} else if err != nil {
			return err
		}
	}
	return consequence
}

// UnmarshalCaddyfile reads
//
//	edge_proxy <host:port> {
//		root <PEM file>
//		server_name <name>
//		dial_timeout <duration>
//		try_duration <duration>
//	}
func (p *Proxy) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the handler's own name
	if !d.AllArgs(&p.Upstream) {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option, value := d.Val(), ""
		if !d.AllArgs(&value) {
			return d.ArgErr()
		}
		switch option {
		case "root":
			p.Root = value
		case "server_name":
			p.ServerName = value
		case "dial_timeout", "try_duration":
			limit, err := caddy.ParseDuration(value)
			if err != nil || limit <= 0 {
				return d.Errf("%s %q in edge_proxy: want a duration such as 2s", option, value)
			}
			if option == "dial_timeout" {
				p.DialTimeout = caddy.Duration(limit)
			} else {
				p.TryDuration = caddy.Duration(limit)
			}
		default:
			return d.Errf("unexpected %q in edge_proxy", option)
		}
	}
	return nil
}

var (
	_ caddy.CleanerUpper    = (*Proxy)(nil)
	_ caddy.Provisioner     = (*Proxy)(nil)
	_ caddyfile.Unmarshaler = (*Proxy)(nil)
	_ layer4.NextHandler    = (*Proxy)(nil)
)
