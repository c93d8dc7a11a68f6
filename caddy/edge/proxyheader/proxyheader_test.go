package proxyheader

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/stretchr/testify/require"
)

// FuzzProxyHeader feeds the edge what a balancer, or whoever has its address, may
// send. Whatever it is: a TCP address comes out of a header, or an error, and not
// a byte behind the header is lost.
func FuzzProxyHeader(f *testing.F) {
	f.Add([]byte("PROXY TCP4 203.0.113.5 192.0.2.1 4711 9000\r\nand then TLS"))
	f.Add([]byte("PROXY TCP6 2001:db8::5 2001:db8::1 65535 9000\r\nand then TLS"))
	f.Add(append(append([]byte{}, proxyproto.SIGV2...), 0x21, 0x11, 0, 12, 203, 0, 113, 5, 192, 0, 2, 1, 0, 1, 0, 2, 0x16, 3, 1))
	f.Add(append(append([]byte{}, proxyproto.SIGV2...), 0x21, 0x12, 0, 12, 203, 0, 113, 5, 192, 0, 2, 1, 0, 1, 0, 2)) // UDP
	f.Add([]byte("PROXY UNKNOWN\r\n"))
	f.Add([]byte("PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n"))
	f.Add([]byte("PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n"))
	f.Add(append(append([]byte{}, proxyproto.SIGV2...), 0x20, 0x00, 0x00, 0x00))              // LOCAL
	f.Add(append(append([]byte{}, proxyproto.SIGV2...), 0x21, 0x11, 0xff, 0xff))              // longer than it is
	f.Add(append(append([]byte{}, proxyproto.SIGV2...), 0x21, 0x13, 0x00, 0x0c))              // no such transport
	f.Add(append(append([]byte{}, proxyproto.SIGV2...), 0x21, 0x31, 0x00, 0xd8, 'x', 0, 'y')) // a Unix socket
	f.Add([]byte{0x16, 3, 1, 0, 5})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, sent []byte) {
		conn := &received{Reader: bytes.NewReader(sent)}
		u, err := Read(conn, time.Second)
		if err != nil {
			return
		}
		require.IsType(t, &net.TCPAddr{}, u.RemoteAddr())
		_, err = netip.ParseAddrPort(u.RemoteAddr().String())
		require.NoError(t, err, "the allow-list reads this")
		rest, err := io.ReadAll(u)
		require.NoError(t, err)
		require.True(t, bytes.HasSuffix(sent, rest))
		require.Less(t, len(rest), len(sent), "there was a header")
	})
}

// received is a connection on which the client has sent all there is.
type received struct {
	net.Conn
	io.Reader
}

func (r *received) Read(b []byte) (int, error)      { return r.Reader.Read(b) }
func (r *received) SetReadDeadline(time.Time) error { return nil }
func (r *received) RemoteAddr() net.Addr            { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 1} }
