package edge

import (
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestLogReadsItsDecision(t *testing.T) {
	for name, tc := range map[string]struct {
		line    string
		problem string
	}{
		"refused":             {line: "edge_log denied"},
		"two words":           {line: "edge_log not-tls"},
		"no decision":         {line: "edge_log", problem: "wrong argument count"},
		"two decisions":       {line: "edge_log denied admitted", problem: "wrong argument count"},
		"a block":             {line: "edge_log denied {\n x\n}", problem: "edge_log takes no block"},
		"upper case":          {line: "edge_log Denied", problem: `decision "Denied": want denied, not-tls or admitted`},
		"a placeholder":       {line: "edge_log {env.X}", problem: `decision "{env.X}"`},
		"an empty decision":   {line: `edge_log ""`, problem: `decision ""`},
		"one of the limits'":  {line: "edge_log limited", problem: `decision "limited"`},
		"one of the upstream": {line: "edge_log no-upstream", problem: `decision "no-upstream"`},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
			defer cancel()
			var l Log
			err := l.UnmarshalCaddyfile(caddyfile.NewTestDispenser(tc.line))
			if err == nil {
				err = l.Provision(ctx)
			}
			if tc.problem != "" {
				require.ErrorContains(t, err, tc.problem)
			} else {
				require.NoError(t, err)
			}
			require.NoError(t, l.Cleanup())
		})
	}
}

func TestLogIsBoundedAndForgetsNoSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.InfoLevel)
		l := Log{Decision: denied}
		l.start(zap.New(core))
		passed := 0
		next := layer4.HandlerFunc(func(*layer4.Connection) error { passed++; return nil })
		connect := func(ip string) { require.NoError(t, l.Handle(connectionFrom(ip), next)) }

		for range 1000 {
			connect("192.0.2.66")
		}
		connect("192.0.2.7")
		require.Equal(t, 1001, passed, "logging must not stop a connection")
		require.Len(t, logs.All(), linesPerSource+1)
		require.Equal(t,
			map[string]any{
				"decision": "denied", "remote": "192.0.2.7:4711", "source": "192.0.2.7",
				"received": int64(0), "sent": int64(0), "duration": time.Duration(0),
			},
			logs.All()[linesPerSource].ContextMap(), "the quiet source is seen behind the loud one")

		logs.TakeAll()
		time.Sleep(window)
		synctest.Wait()
		require.Len(t, logs.All(), 1, "only the loud source has something suppressed")
		require.Equal(t,
			map[string]any{"decision": "denied", "source": "192.0.2.66", "suppressed": int64(1000 - linesPerSource)},
			logs.TakeAll()[0].ContextMap())

		connect("192.0.2.66")
		require.Len(t, logs.TakeAll(), 1, "a new window starts with lines again")

		for range linesPerSource {
			connect("192.0.2.66")
		}
		logs.TakeAll()
		require.NoError(t, l.Cleanup())
		require.Len(t, logs.TakeAll(), 1, "a reload or shutdown loses no count")
	})
}

func TestLogNeedsBoundedMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.InfoLevel)
		l := Log{Decision: denied}
		l.start(zap.New(core))
		next := layer4.HandlerFunc(func(*layer4.Connection) error { return nil })
		for i := range maxSources + 30 {
			ip := fmt.Sprintf("10.0.%d.%d", i/256, i%256)
			require.NoError(t, l.Handle(connectionFrom(ip), next))
		}
		require.Len(t, logs.TakeAll(), maxSources)
		require.NoError(t, l.Cleanup())
		require.Len(t, logs.All(), 1)
		require.Equal(t, map[string]any{"suppressed": int64(30)}, logs.All()[0].ContextMap())
	})
}

func TestLogHasALineForEveryAdmittedConnection(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	l := Log{Decision: notTLS, logger: zap.New(core)}
	next := layer4.HandlerFunc(func(cx *layer4.Connection) error {
		conclude(cx, outcome{decision: admitted, upstream: "10.9.8.7:9000", err: io.ErrUnexpectedEOF})
		return nil
	})
	for range linesPerSource + 3 {
		require.NoError(t, l.Handle(connectionFrom("192.0.2.7"), next))
	}
	require.Len(t, logs.All(), linesPerSource+3)
	line := logs.All()[0].ContextMap()
	require.Equal(t, "admitted", line["decision"])
	require.Equal(t, "10.9.8.7:9000", line["upstream"])
	require.Equal(t, "unexpected EOF", line["error"])
}

func TestLogKeepsAPanicFromEndingTheEdge(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	l := Log{Decision: notTLS, logger: zap.New(core)}
	var limit Limit
	limit.MaxConnections, limit.MaxPerSource, limit.RatePerSource = 1, 1, 1000
	for range 3 {
		require.NoError(t, l.Handle(connectionFrom("192.0.2.77"), layer4.HandlerFunc(func(cx *layer4.Connection) error {
			return limit.Handle(cx, layer4.HandlerFunc(func(*layer4.Connection) error { panic("a slip") }))
		})), "the connection counts no longer, so that there is room for the next")
	}
	require.Len(t, logs.FilterLevelExact(zapcore.ErrorLevel).All(), 3)
	require.Contains(t, logs.All()[0].ContextMap()["stack"], "TestLogKeepsAPanic")
	require.Equal(t, "panic: a slip", logs.All()[5].ContextMap()["error"])
}

func TestSourceOfAConnection(t *testing.T) {
	for name, tc := range map[string]struct{ remote, want string }{
		"IPv4 is itself":                      {"192.0.2.7", "192.0.2.7"},
		"IPv4 on a dual-stack port is itself": {"::ffff:192.0.2.7", "192.0.2.7"},
		"IPv6 is its network":                 {"2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, tc.want, source(connectionFrom(tc.remote).RemoteAddr()))
		})
	}
}
