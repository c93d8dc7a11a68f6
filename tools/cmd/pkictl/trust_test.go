//go:build linux

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

// They keep to stores below $WORK: the machine's own is for tools/e2e, in a container.
func TestTrust(t *testing.T) {
	for _, tool := range []string{"certutil", "keytool"} {
		if _, err := exec.LookPath(tool); err != nil {
			const advice = "%s is missing: apt-get install libnss3-tools default-jre-headless"
			if os.Getenv("CI") != "" {
				t.Fatalf(advice, tool)
			}
			t.Skipf(advice, tool)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/trust",
		RequireUniqueNames:  true,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("GORACE", "atexit_sleep_ms=0") // see TestScripts
			env.Setenv("HOME", env.WorkDir+"/home")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"ca": startCA, "stat": stat, "certificate": certificate, "impostor": startImpostor,
		},
	})
}

// certificate NAME root|expired|leaf|intermediate: makes one, in $WORK/NAME.crt, with
// $NAME its fingerprint.
func certificate(ts *testscript.TestScript, _ bool, args []string) {
	now := time.Now()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	ts.Check(err)
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: args[0]},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	issuer := c
	switch args[1] {
	case "expired":
		c.NotBefore, c.NotAfter = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	case "leaf":
		c.IsCA = false
	case "intermediate":
		issuer = &x509.Certificate{Subject: pkix.Name{CommonName: "issuer"}}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	der, err := x509.CreateCertificate(rand.Reader, c, issuer, key.Public(), key)
	ts.Check(err)
	made, err := x509.ParseCertificate(der)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]+".crt"), trustbundle.PEM(made), 0o600))
	ts.Setenv(args[0], x509util.Fingerprint(made))
}

// startImpostor NAME FILE...: $NAME is the address of somebody who serves what is in
// the files in the place of the root, as step-ca would.
func startImpostor(ts *testscript.TestScript, _ bool, args []string) {
	var data string
	for _, file := range args[1:] {
		data += ts.ReadFile(file)
	}
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string]string{"ca": data}) // the client notices
	}))
	ts.Defer(server.Close)
	ts.Setenv(args[0], server.URL)
}
