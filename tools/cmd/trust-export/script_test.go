package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // step-ca's own words
	testscript.Main(m, map[string]func(){"trust-export": main})
}

// With -race a program sleeps for a second before it ends, unless told not to.
const promptExit = "atexit_sleep_ms=0"

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireUniqueNames:  true,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Values["cas"] = map[string]*stepcatest.CA{}
			env.Setenv("GORACE", promptExit)
			return os.Mkdir(filepath.Join(env.WorkDir, "trust"), 0o755) //nolint:gosec // as in the image
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"ca": newCA, "start": startCA, "cert": makeCert, "snapshot": snapshot, "powerless": powerless,
		},
	})
}

// newCA NAME [ssh] [serves OTHER]: an authority in $WORK/NAME whose address is $NAME.
func newCA(ts *testscript.TestScript, _ bool, args []string) {
	name, cas := args[0], ts.Value("cas").(map[string]*stepcatest.CA)
	var o stepcatest.Options
	for i, arg := range args[1:] {
		switch arg {
		case "ssh":
			o.SSH = true
		case "serves":
			o.Served = append(o.Served, cas[args[i+2]].Root)
		}
	}
	ca, err := stepcatest.New(ts.MkAbs(name), o)
	ts.Check(err)
	cas[name] = ca
	ts.Setenv(name, ca.URL)
	fp := sha256.Sum256(ca.Root.Raw)
	ts.Setenv(name+"_root", fmt.Sprintf("%x", fp))
}

// startCA NAME: from here on it serves.
func startCA(ts *testscript.TestScript, _ bool, args []string) {
	ca := ts.Value("cas").(map[string]*stepcatest.CA)[args[0]]
	ts.Check(ca.Start())
	ts.Defer(func() { ts.Check(ca.Stop()) })
}

// makeCert FILE KIND...: appends to FILE a certificate of each KIND.
func makeCert(ts *testscript.TestScript, _ bool, args []string) {
	file, err := os.OpenFile(ts.MkAbs(args[0]), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	ts.Check(err)
	defer file.Close() //nolint:errcheck // encoding checks the writes
	for _, kind := range args[1:] {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		ts.Check(err)
		c := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: kind}, BasicConstraintsValid: true, IsCA: true,
			NotBefore: time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2120, 1, 1, 0, 0, 0, 0, time.UTC),
		}
		switch kind {
		case "root":
		case "leaf":
			c.IsCA = false
		case "expired":
			c.NotAfter = time.Date(2021, 1, 1, 0, 0, 0, 0, time.UTC)
		default:
			ts.Fatalf("unknown kind %q", kind)
		}
		der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
		ts.Check(err)
		ts.Check(pem.Encode(file, &pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
}

// snapshot DIR FILE: name, mode, content and modification time of everything in DIR.
func snapshot(ts *testscript.TestScript, _ bool, args []string) {
	entries, err := os.ReadDir(ts.MkAbs(args[0]))
	ts.Check(err)
	var out strings.Builder
	for _, e := range entries {
		info, err := e.Info()
		ts.Check(err)
		data, err := os.ReadFile(filepath.Join(ts.MkAbs(args[0]), e.Name()))
		ts.Check(err)
		fmt.Fprintf(&out, "%s %s %x %d\n", e.Name(), info.Mode(), sha256.Sum256(data), info.ModTime().UnixNano())
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(out.String()), 0o600))
}

// powerless COMMAND...: as a user for whom permissions hold, which root is not.
func powerless(ts *testscript.TestScript, neg bool, args []string) {
	if os.Getuid() == 0 {
		if _, err := exec.LookPath("setpriv"); err != nil {
			ts.Fatalf("setpriv is missing: apt-get install util-linux")
		}
		args = append([]string{"setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search", "--"}, args...)
	}
	err := ts.Exec(args[0], args[1:]...)
	if neg != (err != nil) {
		ts.Fatalf("%v: %v", args, err)
	}
}

// A writer that is killed at any instant leaves whole files, and the next run
// completes them.
func TestKilledAtAnyInstant(t *testing.T) {
	t.Setenv("GORACE", promptExit)
	dir := t.TempDir()
	ca, err := stepcatest.New(dir, stepcatest.Options{SSH: true})
	require.NoError(t, err)
	require.NoError(t, ca.Start())
	t.Cleanup(func() { require.NoError(t, ca.Stop()) })
	// run ends the program without mercy once it has logged that many lines.
	run := func(out string, lines int) error {
		require.NoError(t, os.MkdirAll(out, 0o755)) //nolint:gosec // as in the image
		cmd := exec.CommandContext(t.Context(), "trust-export", "--certs", ca.Certs, "--out", out, "--ca-url", ca.URL)
		stderr, err := cmd.StderrPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		for log := bufio.NewScanner(stderr); log.Scan(); {
			if lines--; lines == 0 {
				_ = cmd.Process.Kill() // or it was faster
			}
		}
		return cmd.Wait()
	}
	whole := filepath.Join(dir, "whole")
	require.NoError(t, run(whole, 0))

	killed := 0
	for i := 1; i < len(names); i++ {
		out := filepath.Join(dir, fmt.Sprint(i))
		if run(out, i) != nil {
			killed++
		}
		requireWhole(t, whole, out)
		require.NoError(t, run(out, 0))
		requireWhole(t, whole, out)
		entries, err := os.ReadDir(out)
		require.NoError(t, err)
		require.Len(t, entries, len(names), "all files and no leftover")
		check := exec.CommandContext(t.Context(), "sha256sum", "--check", "--strict", "SHA256SUMS")
		check.Dir = out
		text, err := check.CombinedOutput()
		require.NoError(t, err, string(text))
	}
	t.Logf("%d of %d runs were killed", killed, len(names)-1)
}

// requireWhole wants each published file either absent or complete. The trust store
// and the sums over it differ from run to run; sha256sum checks those.
func requireWhole(t *testing.T, whole, dir string) {
	t.Helper()
	for _, name := range names {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if os.IsNotExist(err) {
			continue
		}
		require.NoError(t, err)
		want, err := os.ReadFile(filepath.Join(whole, name))
		require.NoError(t, err)
		if name == "truststore.p12" || name == "SHA256SUMS" {
			require.Len(t, got, len(want), name)
			continue
		}
		require.Equal(t, want, got, name)
	}
}
