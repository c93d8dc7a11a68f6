package stack

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const namespaces = "/run/netns"

// Host is a machine on a cable of its own: a network namespace behind a veth pair,
// with addresses that nobody else has. Containers cannot play that part: whatever
// bridge they are on, they arrive with the edge gateway's address.
type Host struct {
	Addr, Addr6       netip.Addr // its own
	Router, Router6   netip.Addr // this machine, as it sees it
	Subnet            netip.Prefix
	namespace, device string
}

// NewHost plugs in a machine for the length of the test.
func NewHost(tb testing.TB) *Host {
	tb.Helper()
	NeedRoot(tb, "to make network namespaces")
	if _, err := exec.LookPath("ip"); err != nil {
		missing(tb, "the command ip is needed: apt-get install iproute2")
	}
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
		missing(tb, "IPv6 is needed and off in this kernel: sysctl net.ipv6.conf.all.disable_ipv6=0")
	}
	addrs, err := net.InterfaceAddrs()
	require.NoError(tb, err)
	h := &Host{}
	for range 100 {
		n := byte(rand.UintN(256)) //nolint:gosec // any will do
		h.Subnet = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 203, n, 0}), 30)
		h.Router, h.Addr = h.Subnet.Addr().Next(), h.Subnet.Addr().Next().Next()
		h.Router6 = netip.MustParseAddr(fmt.Sprintf("fd0e:2e:%x::1", n))
		h.Addr6 = h.Router6.Next()
		h.namespace = fmt.Sprintf("%s%d-%d", prefix, os.Getpid(), n)
		h.device = fmt.Sprintf("e2e%d", n)
		if !taken(h.Subnet, addrs) {
			break
		}
	}
	tb.Cleanup(func() { require.NoError(tb, removeHost(h.namespace)) })
	for _, line := range []string{
		"netns add " + h.namespace,
		"link add " + h.device + " type veth peer name eth0 netns " + h.namespace,
		"addr add " + h.Router.String() + "/30 dev " + h.device,
		"-6 addr add " + h.Router6.String() + "/64 dev " + h.device + " nodad",
		"link set " + h.device + " up",
		"-n " + h.namespace + " link set lo up",
		"-n " + h.namespace + " addr add " + h.Addr.String() + "/30 dev eth0",
		"-n " + h.namespace + " -6 addr add " + h.Addr6.String() + "/64 dev eth0 nodad",
		"-n " + h.namespace + " link set eth0 up",
		"-n " + h.namespace + " route add default via " + h.Router.String(),
		"-n " + h.namespace + " -6 route add default via " + h.Router6.String(),
	} {
		out, err := exec.CommandContext(tb.Context(), "ip", strings.Fields(line)...).CombinedOutput()
		require.NoError(tb, err, "ip %s: %s", line, out)
	}
	return h
}

// Dial connects from the machine. The address is an IP address with a port.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		// A socket belongs to the namespace of the thread that makes it. Never
		// unlocked: the thread ends with the goroutine instead of going back among
		// those that other goroutines run on.
		runtime.LockOSThread()
		done <- func() (r result) {
			fd, err := unix.Open(filepath.Join(namespaces, h.namespace), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return result{err: err}
			}
			defer unix.Close(fd) //nolint:errcheck // read only
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return result{err: err}
			}
			dialer := net.Dialer{Timeout: 5 * time.Second}
			r.conn, r.err = dialer.DialContext(ctx, network, address)
			return r
		}()
	}()
	r := <-done
	return r.conn, r.err
}

// removeHosts removes the namespaces whose maker is chosen.
func removeHosts(chosen func(pid int) bool) error {
	entries, err := os.ReadDir(namespaces)
	if err != nil {
		return nil //nolint:nilerr // no namespaces
	}
	var problems []error
	for _, e := range entries {
		match := projectName.FindStringSubmatch(e.Name())
		if match == nil {
			continue
		}
		if pid, err := strconv.Atoi(match[1]); err == nil && chosen(pid) {
			problems = append(problems, removeHost(e.Name()))
		}
	}
	return errors.Join(problems...)
}

// removeHost removes a namespace, and with it its end of the cable and so both.
func removeHost(namespace string) error {
	if _, err := os.Stat(filepath.Join(namespaces, namespace)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	out, err := exec.CommandContext(context.Background(), "ip", "netns", "delete", namespace).CombinedOutput()
	if err != nil {
		return fmt.Errorf("removing network namespace %s: %w: %s", namespace, err, out)
	}
	return nil
}
