package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	authority "github.com/smallstep/certificates/authority/config"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/pemutil"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

// templates are those of the repository.
const templates = "../../../step-ca/templates"

// volumes are the directories of a run, below $WORK.
var volumes = []string{"root-ca", "home/config", "home/certs", "home/secrets", "allow-list", "import"}

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"provisioner-init": inWork})
}

// inWork runs the program with its directories below $WORK.
func inWork() {
	work := os.Getenv("WORK")
	os.Args = append([]string{
		os.Args[0], "--home=" + work + "/home", "--root-ca=" + work + "/root-ca",
		"--allow-list=" + work + "/allow-list", "--import=" + work + "/import",
		"--provisioners=" + work + "/provisioners.d", "--templates=" + work + "/templates",
	}, os.Args[1:]...)
	main()
}

// settings is a complete environment, as Compose passes it.
var settings = map[string]string{
	"DOMAIN_CA": "ca.internal", "ALLOWED_IPS": "10.0.0.0/8 192.0.2.1 2001:db8::/32",
	"CA_PASSWORD": "secret \"of` the$ CA", "ROOT_CA_PASSWORD": "secret of the röot", "PROVISIONER_PASSWORD": "secret-of-the-admin",
	"SSH_HOST_PROVISIONER_PASSWORD": "secret-of-the-hosts",
}

// TestScripts drive the program against a PostgreSQL of their own. Further commands:
//
//	snapshot FILE   lists every file of the volumes: mode, time, SHA-256
//	root            puts the fingerprint of the CA's root into $ROOT
func TestScripts(t *testing.T) {
	params := postgrestest.Scripts("testdata/script")
	setup := params.Setup
	params.Setup = func(env *testscript.Env) error {
		if err := setup(env); err != nil {
			return err
		}
		for _, dir := range volumes {
			if err := os.MkdirAll(filepath.Join(env.WorkDir, dir), 0o700); err != nil {
				return err
			}
		}
		for name, value := range settings {
			env.Setenv(name, value)
		}
		if err := os.Mkdir(filepath.Join(env.WorkDir, "provisioners.d"), 0o700); err != nil {
			return err
		}
		shipped := os.DirFS(templates)
		return errors.Join(os.CopyFS(filepath.Join(env.WorkDir, "templates"), shipped), os.CopyFS(filepath.Join(env.WorkDir, "shipped"), shipped))
	}
	params.Cmds["snapshot"] = func(ts *testscript.TestScript, _ bool, args []string) {
		list, err := snapshot(ts.Getenv("WORK"))
		ts.Check(err)
		ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(list), 0o600))
	}
	params.Cmds["root"] = func(ts *testscript.TestScript, _ bool, _ []string) {
		cert, err := pemutil.ReadCertificate(ts.MkAbs("home/certs/root_ca.crt"))
		ts.Check(err)
		ts.Setenv("ROOT", x509util.Fingerprint(cert))
	}
	params.Condition = func(cond string) (bool, error) {
		if cond == "root" {
			if os.Getuid() != 0 && os.Getenv("CI") != "" {
				return false, errors.New("only root can mount: run the tests as root")
			}
			return os.Getuid() == 0, nil
		}
		return false, fmt.Errorf("unknown condition %q", cond)
	}
	testscript.Run(t, params)
}

func snapshot(work string) (string, error) {
	var list strings.Builder
	files := os.DirFS(work)
	for _, dir := range volumes {
		err := fs.WalkDir(files, dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			data, err := fs.ReadFile(files, path)
			fmt.Fprintf(&list, "%s %s %s %x\n", path, info.Mode(), info.ModTime(), sha256.Sum256(data))
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return list.String(), nil
}

// Whenever a first run is killed, the next one completes it: with the root that
// is recorded or on disk by then, and never with half a file.
func TestKilledAtAnyInstant(t *testing.T) {
	db := postgrestest.New(t)
	db.Migrate(t)
	owner := db.Owner(t)
	shipped, err := filepath.Abs(templates)
	require.NoError(t, err)
	const step = 60 * time.Millisecond
	finished := 0
	for delay := step; finished < 2 && delay < 10*time.Second; delay += step {
		work := t.TempDir()
		for _, dir := range volumes {
			require.NoError(t, os.MkdirAll(filepath.Join(work, dir), 0o700))
		}
		require.NoError(t, os.Mkdir(filepath.Join(work, "provisioners.d"), 0o700))
		require.NoError(t, os.Symlink(shipped, filepath.Join(work, "templates")))
		_, err := owner.Exec(t.Context(), "delete from infra_pki.root")
		require.NoError(t, err)
		start := func(ctx context.Context) (string, error) {
			cmd := exec.CommandContext(ctx, "provisioner-init") // testscript.Main has put it on PATH
			cmd.Env = append(os.Environ(), "WORK="+work, "POSTGRES_HOST="+db.Host, "POSTGRES_PORT="+strconv.Itoa(int(db.Port)),
				"POSTGRES_DB="+db.Name, "POSTGRES_USER="+db.Database.Owner, "STEP_CA_DB_PASSWORD="+db.RuntimePassword.Reveal())
			for name, value := range settings {
				cmd.Env = append(cmd.Env, name+"="+value)
			}
			out, err := cmd.CombinedOutput()
			return string(out), err
		}
		killed, cancel := context.WithTimeout(t.Context(), delay)
		_, err = start(killed)
		cancel()
		if err == nil {
			finished++
		}
		before, err := os.ReadFile(filepath.Join(work, "home/certs/root_ca.crt"))
		if !errors.Is(err, fs.ErrNotExist) {
			require.NoError(t, err)
		}
		out, err := start(t.Context())
		require.NoError(t, err, "after a kill at %s: %s", delay, out)
		after, err := os.ReadFile(filepath.Join(work, "home/certs/root_ca.crt"))
		require.NoError(t, err)
		if before != nil {
			require.Equal(t, before, after, "a kill at %s changed the root", delay)
		}
		_, err = authority.LoadConfiguration(filepath.Join(work, "home/config/ca.json"))
		require.NoError(t, err)
		files, err := snapshot(work)
		require.NoError(t, err)
		require.NotContains(t, files, ".tmp")
	}
	require.Equal(t, 2, finished, "no run was ever fast enough to finish")
}
