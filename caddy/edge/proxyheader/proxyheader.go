// Package proxyheader takes the PROXY protocol's header off a connection. It is a
// package of its own so that its fuzz target builds in seconds.
package proxyheader

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/pires/go-proxyproto"
)

// ErrSilent is a peer that only looks whether the port is open.
var ErrSilent = errors.New("closed without a byte")

// Conn is a connection behind its header.
type Conn struct {
	net.Conn
	reader *bufio.Reader // over Conn: it may hold more than the header
	remote net.Addr
}

// Read takes a header of version 1 or 2 off a connection, and returns the
// connection as the header tells of it. It fails after the timeout, and where there
// is no header. One of version 1 has to come in one piece, as the protocol has its
// senders do (section 2 of its specification).
func Read(conn net.Conn, timeout time.Duration) (*Conn, error) {
	if err := conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return nil, err
	}
	c := &Conn{Conn: conn, reader: bufio.NewReaderSize(conn, 1024)}
	if _, err := c.reader.Peek(1); errors.Is(err, io.EOF) {
		return nil, ErrSilent
	}
	header, err := proxyproto.Read(c.reader)
	if err != nil {
		return nil, fmt.Errorf("reading PROXY header: %w", err)
	}
	c.remote = conn.RemoteAddr()
	if !header.Command.IsLocal() {
		// A balancer's connection on its own behalf (LOCAL, UNKNOWN) keeps its
		// own address. Any other has to be somebody's TCP connection.
		source, _, ok := header.TCPAddrs()
		if !ok {
			return nil, fmt.Errorf("reading PROXY header: %v is no TCP address", header.SourceAddr)
		}
		c.remote = source
	}
	return c, conn.SetReadDeadline(time.Time{})
}

// Read reads what comes behind the header.
func (c *Conn) Read(b []byte) (int, error) { return c.reader.Read(b) }

// RemoteAddr is the client's address.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// CloseWrite passes half-close through.
func (c *Conn) CloseWrite() error {
	half, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok {
		return fmt.Errorf("%T cannot be half-closed", c.Conn)
	}
	return half.CloseWrite()
}
