package edge

import (
	"context"
	"errors"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// Caddy's own TCP listener is a socket of its own for every configuration. When
// the old one is closed, the kernel resets the connections that wait in it. And
// caddy-l4 ends its accept loop for good at the first error that is no time-out,
// such as a lack of descriptors (layer4/server.go, serve). So here one socket is
// shared by all configurations, and errors stay below.

// acceptRetry is how long to wait after an error, which is nearly always a lack
// of descriptors, before trying again.
const acceptRetry = 100 * time.Millisecond

// sockets are the open ones by address.
var sockets = caddy.NewUsagePool()

// socket is one listening socket, whichever configuration uses it.
type socket struct {
	net.Listener
	accepted chan net.Conn
	done     chan struct{}
	log      *zap.Logger
}

// listener is one configuration's share of a socket.
type listener struct {
	*socket
	address string
	closed  chan struct{}
	once    sync.Once
}

// openListener opens "edge/host:port", or shares it where it is open already.
func openListener(ctx context.Context, _, host, port string, offset uint, config net.ListenConfig) (any, error) {
	first, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, err
	}
	address := net.JoinHostPort(host, strconv.FormatUint(first+uint64(offset), 10))
	shared, _, err := sockets.LoadOrNew(address, func() (caddy.Destructor, error) {
		ln, err := config.Listen(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		s := &socket{ln, make(chan net.Conn), make(chan struct{}), caddy.Log().Named("edge.listener")}
		go s.serve()
		return s, nil
	})
	if err != nil {
		return nil, err
	}
	return &listener{socket: shared.(*socket), address: address, closed: make(chan struct{})}, nil
}

// serve hands every connection to one of the configurations that listen.
func (s *socket) serve() {
	var reported time.Time
	for {
		conn, err := s.Accept()
		switch {
		case err == nil:
			select {
			case s.accepted <- conn:
			case <-s.done:
				_ = conn.Close()
				return
			}
		case errors.Is(err, net.ErrClosed):
			return
		default:
			if time.Since(reported) > window {
				reported = time.Now()
				s.log.Error("accepting connections; trying again", zap.Error(err))
			}
			time.Sleep(acceptRetry)
		}
	}
}

// Destruct closes the socket, once no configuration uses it.
func (s *socket) Destruct() error {
	close(s.done)
	return s.Close()
}

// Accept waits for the next connection.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.accepted:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close ends this configuration's share.
func (l *listener) Close() (err error) {
	l.once.Do(func() {
		close(l.closed)
		_, err = sockets.Delete(l.address)
	})
	return err
}
