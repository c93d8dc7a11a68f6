//go:build linux

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/smallstep/certificates/api"
	authorityconfig "github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/smallstep/certificates/ca"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/x509util"
	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/dotenv"
	"github.com/infra-pki/infra-pki/tools/internal/host"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
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
			"ca": startCA, "closer": startCloser, "stat": stat, "secrets": secrets, "host": joined, "sshd": startSSHD, "stale": stale,
		},
		Condition: func(name string) (bool, error) {
			if name != "sshd" {
				return false, fmt.Errorf("unknown condition %q", name)
			}
			return haveSSHD()
		},
	})
}

// The CA of these works on the database.
func TestScriptsWithDatabase(t *testing.T) {
	params := postgrestest.Scripts("testdata/database")
	base := params.Setup
	params.Setup = func(env *testscript.Env) error {
		env.Setenv("GORACE", "atexit_sleep_ms=0") // as above
		return errors.Join(base(env), os.WriteFile(filepath.Join(env.WorkDir, "password"), []byte(stepcatest.Password), 0o600))
	}
	maps.Copy(params.Cmds, map[string]func(*testscript.TestScript, bool, []string){"ca": startCA, "issue": issue, "register": register})
	testscript.Run(t, params)
}

// startCA NAME [SWITCH...]: an authority in $WORK/NAME whose address is $NAME, with
// its configuration in $WORK/NAME/ca.json. Switches: eab for an ACME provisioner
// that demands a binding, oidc for one whose provider is away, enroller for a JWK
// provisioner ssh-host-jwk, ssh for all of SSH, brief for certificates that are good for
// seconds (without ca.json). In a script with a database the authority works on it
// and signs for SSH.
func startCA(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	o := stepcatest.Options{Adjust: func(c *authorityconfig.Config) {
		data, err := json.MarshalIndent(c, "", "  ") //nolint:gosec // G117: it has no password in it
		ts.Check(err)
		ts.Check(os.WriteFile(filepath.Join(dir, "ca.json"), data, 0o600))
	}}
	for _, name := range args[1:] {
		switch name {
		case "eab":
			o.Provisioners = append(o.Provisioners, &provisioner.ACME{Type: "ACME", Name: "acme", RequireEAB: true})
		case "oidc":
			o.Provisioners = append(o.Provisioners, &provisioner.OIDC{
				Type: "OIDC", Name: "sso", ClientID: "step-ca", ClientSecret: "hunter2",
				ConfigurationEndpoint: "https://127.0.0.1:1/.well-known/openid-configuration",
			})
		case "brief": // certificates may be good for seconds
			brief := provisioner.Duration{Duration: time.Second}
			o.Adjust = func(c *authorityconfig.Config) { c.AuthorityConfig.Claims = &provisioner.Claims{MinTLSDur: &brief} }
		case "enroller":
			jwk, err := stepcatest.JWK("ssh-host-jwk")
			ts.Check(err)
			o.Provisioners = append(o.Provisioners, jwk)
		case "ssh":
			jwk, err := stepcatest.JWK("ssh-host-jwk")
			ts.Check(err)
			o.SSH = true
			jwk.Claims = &provisioner.Claims{EnableSSHCA: &o.SSH}
			o.Provisioners = append(o.Provisioners, jwk, stepcatest.SSHPOP())
		default:
			ts.Fatalf("ca: unknown switch %q", name)
		}
	}
	if db := database(ts); db.Host != "" {
		passfile := filepath.Join(ts.Getenv("WORK"), "pgpass")
		ts.Check(os.WriteFile(passfile, []byte(postgres.PassfileLine(db, config.Secret(ts.ReadFile("stepca-password")))), 0o600))
		o.DataSource, o.SSH = postgres.RuntimeDSN(db, passfile), true
	}
	ca, err := stepcatest.New(dir, o)
	ts.Check(err)
	ts.Check(ca.Start())
	ts.Defer(func() { ts.Check(ca.Stop()) })
	ts.Setenv(args[0], ca.URL)
}

func database(ts *testscript.TestScript) config.Database {
	port, _ := strconv.ParseUint(ts.Getenv("POSTGRES_PORT"), 10, 16) // 0 where there is none
	return config.Database{
		Host: ts.Getenv("POSTGRES_HOST"), Port: uint16(port), SSLMode: ts.Getenv("POSTGRES_SSLMODE"),
		Name: ts.Getenv("POSTGRES_DB"), Owner: ts.Getenv("POSTGRES_USER"),
	}
}

// issue CA tls|user|host NAME FILE: FILE gets a certificate for NAME, $serial and
// $hex its serial in decimal and in hex with colons.
func issue(ts *testscript.TestScript, _ bool, args []string) {
	url, root := ts.Getenv(args[0]), filepath.Join(ts.MkAbs(args[0]), "certs", "root_ca.crt")
	var serial *big.Int
	var file []byte
	if args[1] == "tls" {
		bundle, err := trustbundle.Read(root, time.Now())
		ts.Check(err)
		client, err := stepca.New(url, bundle.Roots()...)
		ts.Check(err)
		jwk, err := client.JWK(context.Background(), stepcatest.Provisioner, stepcatest.Password)
		ts.Check(err)
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		ts.Check(err)
		cert, err := client.Issue(context.Background(), jwk, args[2], time.Hour, key)
		ts.Check(err)
		serial, file = cert.Leaf().SerialNumber, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Leaf().Raw})
	} else {
		p, err := ca.NewProvisioner(stepcatest.Provisioner, "", url, []byte(stepcatest.Password), ca.WithRootFile(root))
		ts.Check(err)
		token, err := p.SSHToken(args[1], args[2], []string{args[2]})
		ts.Check(err)
		public, _, err := ed25519.GenerateKey(rand.Reader)
		ts.Check(err)
		key, err := ssh.NewPublicKey(public)
		ts.Check(err)
		answer, err := p.SSHSign(&api.SSHSignRequest{PublicKey: key.Marshal(), OTT: token, CertType: args[1], KeyID: args[2], Principals: []string{args[2]}})
		ts.Check(err)
		serial, file = new(big.Int).SetUint64(answer.Certificate.Serial), ssh.MarshalAuthorizedKey(answer.Certificate.Certificate)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[3]), file, 0o600))
	ts.Setenv("serial", serial.String())
	var pairs []string
	for _, b := range serial.Bytes() {
		pairs = append(pairs, fmt.Sprintf("%02X", b))
	}
	ts.Setenv("hex", strings.Join(pairs, ":"))
}

// joined CA DIR LIFETIME RELOAD: DIR is what "pkictl join" leaves on a host with one TLS
// certificate, web.crt with web.key, both of them in DIR.
func joined(ts *testscript.TestScript, _ bool, args []string) {
	url, dir := ts.Getenv(args[0]), ts.MkAbs(args[1])
	lifetime, err := time.ParseDuration(args[2])
	ts.Check(err)
	bundle, err := trustbundle.Read(filepath.Join(ts.MkAbs(args[0]), "certs", "root_ca.crt"), time.Now())
	ts.Check(err)
	client, err := stepca.New(url, bundle.Roots()...)
	ts.Check(err)
	jwk, err := client.JWK(context.Background(), stepcatest.Provisioner, stepcatest.Password)
	ts.Check(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	cert, err := client.Issue(context.Background(), jwk, "web.internal", lifetime, key)
	ts.Check(err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	ts.Check(err)
	web := host.TLS{Names: []string{"web.internal"}, Cert: filepath.Join(dir, "web.crt"), Key: filepath.Join(dir, "web.key"), Reload: args[3]}
	ts.Check(os.MkdirAll(dir, 0o750))
	ts.Check(os.WriteFile(web.Cert, trustbundle.PEM(cert.Chain...), 0o600))
	ts.Check(os.WriteFile(web.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	ts.Check(os.WriteFile(host.Root(dir), bundle.PEM(), 0o600))
	_, err = host.Record{CAURL: url, Fingerprint: x509util.Fingerprint(bundle.Current()), TLS: []host.TLS{web}}.Save(dir)
	ts.Check(err)
}

// register CA FILE: an ACME account, with the key that FILE holds as "eab add" prints it.
func register(ts *testscript.TestScript, neg bool, args []string) {
	values, err := dotenv.Read(ts.MkAbs(args[1]))
	ts.Check(err)
	secret, err := base64.RawURLEncoding.DecodeString(values["EAB_HMAC_KEY"])
	ts.Check(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	bundle, err := trustbundle.Read(filepath.Join(ts.MkAbs(args[0]), "certs", "root_ca.crt"), time.Now())
	ts.Check(err)
	roots := x509.NewCertPool()
	for _, r := range bundle.Roots() {
		roots.AddCert(r)
	}
	client := &acme.Client{
		Key: key, DirectoryURL: ts.Getenv(args[0]) + "/acme/acme/directory",
		HTTPClient: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}},
		// step-ca answers the second use of a key with a status that is tried again otherwise.
		RetryBackoff: func(int, *http.Request, *http.Response) time.Duration { return 0 },
	}
	_, err = client.Register(context.Background(), &acme.Account{
		ExternalAccountBinding: &acme.ExternalAccountBinding{KID: values["EAB_KID"], Key: secret},
	}, acme.AcceptTOS)
	if (err != nil) != neg {
		ts.Fatalf("registering: %v", err)
	}
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

// What changes something has a dry run, or is one until it is told --apply.
func TestEverySubcommandThatChangesSomethingHasADryRun(t *testing.T) {
	changesNothing := []string{
		"acme eab list", "backup verify", "ca status", "completion", "probe", "provisioners", "status", "token", "trust status",
		// Each makes new files or rows and replaces nothing; the service journal, "make backup" and "make backup-key" are made of them.
		"backup create", "backup journal", "backup keygen", "backup record", "backup store",
	}
	for name := range commands {
		names, _ := flagsOf(name)
		require.True(t, slices.Contains(changesNothing, name) || slices.Contains(names, "dry-run") || slices.Contains(names, "apply"), name)
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
