//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/tern/v2/migrate"
	"github.com/rogpeppe/go-internal/testscript"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/pki"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

// A stack is a database and directories in place of the volumes: $WORK/STACK/root-ca,
// $WORK/STACK/home, and so on.
func TestScriptsOfBackups(t *testing.T) {
	params := postgrestest.Scripts("testdata/backup")
	base := params.Setup
	params.Setup = func(env *testscript.Env) error {
		env.Setenv("GORACE", "atexit_sleep_ms=0")
		env.Setenv("uid", strconv.Itoa(os.Getuid()))
		env.Setenv("gid", strconv.Itoa(os.Getgid()))
		return base(env)
	}
	maps.Copy(params.Cmds, map[string]func(*testscript.TestScript, bool, []string){
		"volumes": volumes, "authority": newAuthority, "for-volumes": forVolumes, "stat-mode": statMode, "edit": edit, "forge": forge, "die": die, "append-lines": appendLines, "setenv": setenv, "migrate-to": migrateTo,
		"kill-journal": killJournal,
	})
	testscript.Run(t, params)
}

var volumeNames = []string{"root-ca", "home/config", "home/secrets", "home/certs", "home/trusted-roots", "provisioners.d", "templates"}

// volumes STACK...: empty ones.
func volumes(ts *testscript.TestScript, _ bool, args []string) {
	for _, stack := range args {
		for _, name := range volumeNames {
			ts.Check(os.MkdirAll(filepath.Join(ts.MkAbs(stack), name), 0o700))
		}
	}
}

// newAuthority STACK: what provisioner-init leaves in volumes and database, $root, and
// $WORK/STACK/dotenv.
func newAuthority(ts *testscript.TestScript, _ bool, args []string) {
	volumes(ts, false, args)
	dir := ts.MkAbs(args[0])
	store := pki.Store{Root: filepath.Join(dir, "root-ca"), Certs: filepath.Join(dir, "home/certs"), Secrets: filepath.Join(dir, "home/secrets")}
	passwords := pki.Passwords{Root: "the root's password", CA: `the CA's "password"`, Provisioner: "admin's password", SSHHost: "host's password"}
	now := time.Now()
	contents, err := store.Open(passwords, pki.Names{PKI: "Test", RootLifetime: 48 * time.Hour, IntermediateLifetime: 24 * time.Hour, Now: now}, now)
	ts.Check(err)
	for _, f := range contents.Missing() {
		ts.Check(f.Create())
	}
	ts.Setenv("root", x509util.Fingerprint(contents.Root))
	for name, data := range map[string]string{
		"dotenv":                      "CA_PASSWORD='the CA\\'s \"password\"'\nROOT_CA_PASSWORD='the root\\'s password'\nPROVISIONERS_DIR=/etc/provisioners\n",
		"home/config/ca.json":         "{}\n",
		"home/secrets/.leftover.tmp":  "half\n",
		"provisioners.d/sso.json":     "{}\n",
		"provisioners.d/README.md":    "of the repository\n",
		"templates/tls-leaf.tpl":      "{{ .Subject }}\n",
		"home/trusted-roots/corp.crt": "a certificate\n",
	} {
		ts.Check(os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600))
	}
}

// migrateTo VERSION: the schema of an earlier release, in the database of POSTGRES_DB.
func migrateTo(ts *testscript.TestScript, _ bool, args []string) {
	version, err := strconv.ParseInt(args[0], 10, 32)
	ts.Check(err)
	ctx := context.Background()
	conn, err := postgres.Owner(database(ts), config.Secret(ts.ReadFile("owner-password")), time.Minute).Connect(ctx)
	ts.Check(err)
	defer conn.Close(ctx) //nolint:errcheck // everything is committed
	_, err = conn.Exec(ctx, "create schema infra_pki")
	ts.Check(err)
	m, err := migrate.NewMigrator(ctx, conn, "infra_pki.version")
	ts.Check(err)
	ts.Check(m.LoadMigrations(os.DirFS(postgrestest.Migrations())))
	ts.Check(m.MigrateTo(ctx, int32(version)))
}

// setenv NAME FILE: the first line of a file.
func setenv(ts *testscript.TestScript, _ bool, args []string) {
	line, _, _ := strings.Cut(ts.ReadFile(args[1]), "\n")
	ts.Setenv(args[0], line)
}

// forVolumes A B: the volumes that a restore writes are the same in both.
func forVolumes(ts *testscript.TestScript, neg bool, args []string) {
	listing := func(stack string) (text string) {
		files := os.DirFS(ts.MkAbs(stack))
		for _, name := range volumeNames[:4] {
			ts.Check(fs.WalkDir(files, name, func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				info, err := d.Info()
				if err != nil {
					return err
				}
				data, err := fs.ReadFile(files, path)
				text += fmt.Sprintf("%s %s %x\n", info.Mode(), path, sha256.Sum256(data))
				return err
			}))
		}
		return text
	}
	if a, b := listing(args[0]), listing(args[1]); (a == b) == neg {
		ts.Fatalf("%s:\n%s%s:\n%s", args[0], a, args[1], b)
	}
}

// statMode FILE MODE
func statMode(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Stat(ts.MkAbs(args[0]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", info.Mode().Perm()); got != args[1] {
		ts.Fatalf("%s has mode %s", args[0], got)
	}
}

// edit FROM TO cut|cut-half|cut-header|flip|tail: a damaged copy.
func edit(ts *testscript.TestScript, _ bool, args []string) {
	data := []byte(ts.ReadFile(args[0]))
	switch args[2] {
	case "cut":
		data = data[:len(data)-1]
	case "cut-header":
		data = data[:100]
	case "cut-half":
		data = data[:len(data)/2]
	case "flip":
		data[len(data)/2] ^= 1
	case "tail":
		data = append(data, "more"...)
	default:
		ts.Fatalf("edit: unknown %q", args[2])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), data, 0o600))
}

// appendLines FILE LINE...
func appendLines(ts *testscript.TestScript, _ bool, args []string) {
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_APPEND|os.O_WRONLY, 0)
	ts.Check(err)
	_, err = f.WriteString(strings.Join(args[1:], "\n") + "\n")
	ts.Check(errors.Join(err, f.Close()))
}

// forge FROM IDENTITY TO HOW: what somebody makes who knows the recipient.
func forge(ts *testscript.TestScript, _ bool, args []string) {
	identities, err := age.ParseIdentities(strings.NewReader(ts.ReadFile(args[1])))
	ts.Check(err)
	recipient := identities[0].(*age.X25519Identity).Recipient() // as keygen makes it
	var entries []*tar.Header
	content := map[*tar.Header][]byte{}
	add := func(h *tar.Header, data []byte) {
		h.Size, h.Format = int64(len(data)), tar.FormatPAX
		entries, content[h] = append(entries, h), data
	}
	opened, err := age.Decrypt(bytes.NewReader([]byte(ts.ReadFile(args[0]))), identities...)
	ts.Check(err)
	unpacked, err := gzip.NewReader(opened)
	ts.Check(err)
	for r := tar.NewReader(unpacked); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		ts.Check(err)
		data, err := io.ReadAll(r)
		ts.Check(err)
		add(&tar.Header{Typeflag: h.Typeflag, Name: h.Name, Mode: h.Mode}, data)
	}
	last := entries[len(entries)-1]
	replace := func(name, before, after string) {
		for _, h := range entries {
			if h.Name == name {
				old := content[h]
				data := bytes.Replace(old, []byte(before), []byte(after), 1)
				content[h], h.Size = data, int64(len(data))
				sum := func(data []byte) []byte { s := sha256.Sum256(data); return []byte(hex.EncodeToString(s[:])) }
				content[last] = bytes.Replace(content[last], sum(old), sum(data), 1)
				last.Size = int64(len(content[last]))
			}
		}
	}
	switch how := args[3]; how {
	case "nothing":
	case "traversal", "absolute", "foreign", "symlink", "twice", "backslash":
		h := &tar.Header{Typeflag: tar.TypeReg, Mode: 0o600, Name: map[string]string{
			"traversal": "files/certs/../../../etc/passwd", "absolute": "/etc/passwd", "foreign": "files/postgres-data/PG_VERSION",
			"symlink": "files/certs/link", "twice": "files/env", "backslash": `files/certs/..\x`,
		}[how]}
		if how == "symlink" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, "/etc/passwd"
		}
		add(h, nil)
		entries = append(entries[:2:2], append([]*tar.Header{h}, entries[2:len(entries)-1]...)...)
	case "newer":
		replace("infra-pki-backup", "1", "2")
	case "no-manifest":
		entries = entries[:len(entries)-1]
	case "no-table":
		entries = slices.DeleteFunc(entries, func(h *tar.Header) bool { return strings.HasPrefix(h.Name, "tables/public.used_ott/") })
	case "other-file":
		content[entries[1]] = bytes.Replace(content[entries[1]], []byte("CA"), []byte("XX"), 1)
	case "other-root":
		replace("tables/infra_pki.root/000000", ts.Getenv("root"), strings.Repeat("0", 64))
	case "other-password":
		replace("files/env", "CA_PASSWORD='the CA", "CA_PASSWORD='no CA!")
	case "bad-key":
		replace("files/secrets/intermediate_ca_key", "-----BEGIN", "-----BEGUN")
	case "foreign-tar":
		entries = entries[1:]
	case "newer-schema":
		for _, h := range entries {
			if h.Name == "manifest.json" {
				content[h] = bytes.Replace(content[h], []byte(`"schema": `), []byte(`"schema": 9`), 1)
				h.Size = int64(len(content[h]))
			}
		}
	default:
		ts.Fatalf("forge: unknown %q", how)
	}
	var out bytes.Buffer
	sealed, err := age.Encrypt(&out, recipient)
	ts.Check(err)
	packed := gzip.NewWriter(sealed)
	w := tar.NewWriter(packed)
	for _, h := range entries {
		ts.Check(w.WriteHeader(h))
		_, err := w.Write(content[h])
		ts.Check(err)
	}
	ts.Check(errors.Join(w.Close(), packed.Close(), sealed.Close()))
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), out.Bytes(), 0o600))
}

// die N COMMAND...: the program is killed at once after its start, N ms after it, and so
// on in growing steps, until it ends by itself. At least one run has to be killed, and
// none may fail otherwise.
func die(ts *testscript.TestScript, _ bool, args []string) {
	step, err := strconv.Atoi(args[0])
	ts.Check(err)
	killed := 0
	for delay, more := time.Duration(0), time.Duration(step)*time.Millisecond; ; delay, more = delay+more, more*5/4 {
		ctx, cancel := context.WithCancel(context.Background())
		cmd := exec.CommandContext(ctx, args[1], args[2:]...)
		cmd.Dir, cmd.Env = ts.Getenv("WORK"), environment(ts)
		var said bytes.Buffer
		cmd.Stderr = &said
		if in := ts.Getenv("STDIN"); in != "" {
			cmd.Stdin = strings.NewReader(ts.ReadFile(in))
		}
		ts.Check(cmd.Start())
		timer := time.AfterFunc(delay, cancel)
		err := cmd.Wait()
		timer.Stop()
		cancel()
		if err == nil {
			if killed == 0 {
				ts.Fatalf("no run was killed")
			}
			ts.Logf("%d runs were killed", killed)
			return
		}
		if cmd.ProcessState.ExitCode() >= 0 {
			ts.Fatalf("after %d killed runs: %v: %s", killed, err, said.String())
		}
		killed++
	}
}

// killJournal TIMES COMMAND...: the journal is started and killed, ever later, while
// tokens are used without pause. At last it catches up and is stopped.
func killJournal(ts *testscript.TestScript, _ bool, args []string) {
	times, err := strconv.Atoi(args[0])
	ts.Check(err)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	connect := func() *pgx.Conn {
		conn, err := postgres.Owner(database(ts), config.Secret(ts.ReadFile("owner-password")), time.Minute).Connect(ctx)
		ts.Check(err)
		return conn
	}
	using, watching := connect(), connect()
	defer watching.Close(context.Background()) //nolint:errcheck // it only reads
	start := func() *exec.Cmd {
		cmd := exec.Command(args[1], args[2:]...) //nolint:noctx // it is killed below
		cmd.Dir, cmd.Env = ts.Getenv("WORK"), environment(ts)
		ts.Check(cmd.Start())
		return cmd
	}
	used, ended := 0, make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			if _, err := using.Exec(ctx, "insert into public.used_ott values (convert_to(gen_random_uuid()::text, 'UTF8'), 'used')"); err == nil {
				used++
			}
		}
	}()
	for i := range times {
		cmd := start()
		time.Sleep(time.Duration(i*i) * 40 * time.Millisecond)
		ts.Check(cmd.Process.Kill())
		_ = cmd.Wait() // was killed
	}
	cancel()
	<-ended
	ctx = context.Background()
	cmd := start()
	var now string
	ts.Check(watching.QueryRow(ctx, "select pg_current_wal_insert_lsn()::text").Scan(&now))
	for done := false; !done; time.Sleep(20 * time.Millisecond) {
		ts.Check(watching.QueryRow(ctx, "select coalesce(bool_or(active and confirmed_flush_lsn >= $1::text::pg_lsn), false) from pg_replication_slots", now).Scan(&done))
	}
	ts.Check(cmd.Process.Signal(syscall.SIGTERM))
	ts.Check(cmd.Wait())
	ts.Logf("%d tokens were used", used)
}

func environment(ts *testscript.TestScript) []string {
	var env []string
	for _, name := range []string{
		"PATH", "TMPDIR", "POSTGRES_HOST", "POSTGRES_PORT", "POSTGRES_SSLMODE", "POSTGRES_DB", "POSTGRES_USER",
		"POSTGRES_PASSWORD_FILE", "BACKUP_RECIPIENTS", "GORACE",
	} {
		env = append(env, name+"="+ts.Getenv(name))
	}
	return env
}
