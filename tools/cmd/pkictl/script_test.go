package main

import (
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/dotenv"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // step-ca's own words
	testscript.Main(m, map[string]func(){"pkictl": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireUniqueNames:  true,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			// With -race a program sleeps for a second before it ends, unless told not to.
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			return os.WriteFile(filepath.Join(env.WorkDir, "password"), []byte(stepcatest.Password), 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"ca": startCA, "closer": startCloser, "stat": stat, "secrets": secrets,
		},
	})
}

// startCA NAME: an authority in $WORK/NAME whose address is $NAME.
func startCA(ts *testscript.TestScript, _ bool, args []string) {
	ca, err := stepcatest.New(ts.MkAbs(args[0]), stepcatest.Options{})
	ts.Check(err)
	ts.Check(ca.Start())
	ts.Defer(func() { ts.Check(ca.Stop()) })
	ts.Setenv(args[0], ca.URL)
}

// startCloser NAME: $NAME is an address that ends each connection, as the edge does
// with strangers.
func startCloser(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	ts.Check(err)
	ts.Defer(func() { ts.Check(l.Close()) })
	ts.Setenv(args[0], "https://"+l.Addr().String())
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.Close() // nothing to do about it
		}
	}()
}

// stat FILE OUT: mode, inode and modification time of FILE.
func stat(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Lstat(ts.MkAbs(args[0]))
	ts.Check(err)
	line := fmt.Sprintf("%s %d %d\n", info.Mode(), info.Sys().(*syscall.Stat_t).Ino, info.ModTime().UnixNano())
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(line), 0o600))
}

var generated = regexp.MustCompile(`^[A-Za-z0-9_-]{32}$`)

// secrets FILE NAME...: each is generated, different, and in no output of the last program.
func secrets(ts *testscript.TestScript, _ bool, args []string) {
	values, err := dotenv.Read(ts.MkAbs(args[0]))
	ts.Check(err)
	seen := map[string]bool{}
	for _, name := range args[1:] {
		value := values[name]
		if !generated.MatchString(value) || seen[value] {
			ts.Fatalf("%s is not a generated secret of its own", name)
		}
		seen[value] = true
		if strings.Contains(ts.ReadFile("stdout")+ts.ReadFile("stderr"), value) {
			ts.Fatalf("%s was printed", name)
		}
	}
}

func TestEverySubcommandHelps(t *testing.T) {
	for name, cmd := range commands {
		t.Run(name, func(t *testing.T) {
			require.True(t, strings.HasPrefix(cmd.usage, "usage: pkictl "+name+" "), cmd.usage)
			require.Contains(t, cmd.usage, "\nExamples:\n  ")
			require.Contains(t, help(), cmd.summary)
		})
	}
}

func TestReplacedFileKeepsItsOwner(t *testing.T) {
	if os.Getuid() != 0 {
		const advice = "only root can give a file away: run the tests as root"
		if os.Getenv("CI") != "" {
			t.Fatal(advice)
		}
		t.Skip(advice)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, ".env")
	require.NoError(t, os.WriteFile(filepath.Join(dir, ".env.example"), []byte("A=1\n"), 0o600))
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, os.Chown(path, 1234, 4321))
	require.NoError(t, run(t.Context(), []string{"env", path}, slog.New(slog.DiscardHandler)))
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, uint32(1234), info.Sys().(*syscall.Stat_t).Uid)
	require.Equal(t, uint32(4321), info.Sys().(*syscall.Stat_t).Gid)
	require.Equal(t, int64(4), info.Size())
}
