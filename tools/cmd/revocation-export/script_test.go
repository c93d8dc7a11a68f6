package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	authority "github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/db"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

func TestMain(m *testing.M) {
	log.SetOutput(io.Discard) // step-ca's own words
	testscript.Main(m, map[string]func(){"revocation-export": main})
}

// Scripts have a real server, a real step-ca over it, and:
//
//	ca new | start | stop      its CRL is at $CRL, its certificates are in $CERTS
//	revoke x509|ssh SERIAL     as step-ca does
//	shows REGEXP COMMAND...    again and again until it prints that
func TestScripts(t *testing.T) {
	params := postgrestest.Scripts("testdata/script")
	setUp := params.Setup
	params.Setup = func(env *testscript.Env) error {
		env.Values[caKey{}] = &testCA{}
		env.Setenv("CERTS", filepath.Join(env.WorkDir, "ca", "certs"))
		env.Setenv("EXPORT", filepath.Join(env.WorkDir, "revocation"))
		if err := os.Mkdir(env.Getenv("EXPORT"), 0o755); err != nil { //nolint:gosec // as in the image
			return err
		}
		return setUp(env)
	}
	params.Cmds["ca"], params.Cmds["revoke"], params.Cmds["shows"] = caCommand, revokeCommand, showsCommand
	testscript.Run(t, params)
}

type caKey struct{}

// testCA is a step-ca whose CRL is on.
type testCA struct{ *stepcatest.CA }

func caCommand(ts *testscript.TestScript, _ bool, args []string) {
	c := ts.Value(caKey{}).(*testCA)
	switch args[0] {
	case "new":
		l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // for its port
		ts.Check(err)
		ts.Check(l.Close())
		c.CA, err = stepcatest.New(ts.MkAbs("ca"), stepcatest.Options{SSH: true, DataSource: database(ts).DataSource, Adjust: func(a *authority.Config) {
			a.InsecureAddress = l.Addr().String()
			a.CRL = &authority.CRLConfig{
				Enabled:       true,
				CacheDuration: &provisioner.Duration{Duration: time.Hour}, RenewPeriod: &provisioner.Duration{Duration: time.Second},
			}
		}})
		ts.Check(err)
		ts.Setenv("CRL", "http://"+l.Addr().String()+"/1.0/crl")
	case "start":
		ts.Check(c.Start())
		until(ts, func() (bool, string) {
			resp, err := http.Get(ts.Getenv("CRL")) //nolint:noctx // until it answers
			if err != nil {
				return false, err.Error()
			}
			return resp.StatusCode == http.StatusOK, errors.Join(errors.New(resp.Status), resp.Body.Close()).Error()
		})
	case "stop":
		ts.Check(c.Stop())
	default:
		ts.Fatalf("usage: ca new|start|stop")
	}
}

func database(ts *testscript.TestScript) *db.Config {
	u := url.URL{
		Scheme: "postgresql", User: url.UserPassword(config.RuntimeRole, ts.ReadFile("stepca-password")),
		Host: net.JoinHostPort(ts.Getenv("POSTGRES_HOST"), ts.Getenv("POSTGRES_PORT")), Path: ts.Getenv("POSTGRES_DB"),
		RawQuery: "sslmode=disable",
	}
	return &db.Config{Type: "postgresql", DataSource: u.String()}
}

func revokeCommand(ts *testscript.TestScript, _ bool, args []string) {
	records, err := db.New(database(ts))
	ts.Check(err)
	info := &db.RevokedCertificateInfo{Serial: args[1], RevokedAt: time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)}
	switch args[0] {
	case "x509":
		ts.Check(records.Revoke(info))
	case "ssh":
		ts.Check(records.(*db.DB).RevokeSSH(info))
	default:
		ts.Fatalf("usage: revoke x509|ssh SERIAL")
	}
	ts.Check(records.Shutdown())
}

func showsCommand(ts *testscript.TestScript, _ bool, args []string) {
	pattern := regexp.MustCompile(args[0])
	until(ts, func() (bool, string) {
		err := ts.Exec(args[1], args[2:]...)
		said := ts.ReadFile("stdout") + ts.ReadFile("stderr")
		return err == nil && pattern.MatchString(said), fmt.Sprintf("%s: %v: %s", strings.Join(args[1:], " "), err, said)
	})
}

func until(ts *testscript.TestScript, done func() (bool, string)) {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		ok, said := done()
		if ok {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("not in time: %s", said)
		}
	}
}
