package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"go.step.sm/crypto/pemutil"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

// The limits are those of the alerts (tools/prometheus/alerts.yml).
const (
	rootSoon         = 365 * 24 * time.Hour
	intermediateSoon = 90 * 24 * time.Hour
	backupOld        = 36 * time.Hour
)

var caStatus = command{
	summary: "tell what is wrong with the CA, and what to do (\"make status\")",
	usage: `usage: pkictl ca status [flags] < SEEN

Tells on one screen how the CA is: its services, replicas, certificates, provisioners,
the last backup, whether everything is as declared, and as whom this machine arrives at
the edge. Then what is wrong, and what to do. It changes nothing.

"make status" runs it, with what only the CA's host can see on standard input, a line
each: "service JSON" (docker compose ps --format json), "upstreams JSON" (caddy upstreams
--json), "arrival TEXT" (caddy/seen.sh), "drift TEXT" and "check CODE" (provisioner-init
--check). What is not there is left out.

  --json           one object, for machines
  --certs DIR      the CA's certificates (default /home/step/certs)
  --declared FILE  ca.json (default /home/step/config/ca.json)
  --ca-url URL     address of the CA (default https://step-ca:9000)
  --root FILE      the root to trust, PEM (default /home/step/certs/root_ca.crt)

Environment, as in the stack's service status:
  POSTGRES_HOST, POSTGRES_PORT, POSTGRES_SSLMODE, POSTGRES_DB, POSTGRES_USER
  REPORTS_DB_PASSWORD or REPORTS_DB_PASSWORD_FILE

Exit codes: 0 all is well; 1 something is wrong; 2 wrong call.

Examples:
  make status
  make status JSON=1 | jq -r '.problems[].what'
  docker compose run --rm -T status </dev/null
`,
	setup: func(fs *flag.FlagSet) work {
		var s caStatusReader
		s.flags(fs, "https://step-ca:9000", "/home/step/certs/root_ca.crt")
		fs.StringVar(&s.declared, "declared", "/home/step/config/ca.json", "")
		fs.BoolVar(&s.json, "json", false, "")
		fs.StringVar(&s.certs, "certs", "/home/step/certs", "")
		return s.run
	},
}

type caStatusReader struct {
	lister
	certs string
}

// caState is the status for machines. Names of fields stay.
type caState struct {
	Well         bool            `json:"well"`
	Services     []service       `json:"services"`
	Replicas     []replica       `json:"replicas"` // as the edge sees them
	Arrivals     []string        `json:"arrivals"` // as whom connections from the CA's host arrive
	Certificates []caCertificate `json:"certificates"`
	Provisioners []verdict       `json:"provisioners"`
	Backup       *backupState    `json:"backup,omitempty"` // none if nobody knows
	Drift        *driftState     `json:"drift,omitempty"`
	Problems     problems        `json:"problems"`
}

// service is a container as Compose describes it.
type service struct {
	Service  string `json:"service"`
	Name     string `json:"name"`
	State    string `json:"state"`
	Health   string `json:"health,omitempty"`
	ExitCode int    `json:"exit_code"`
	Status   string `json:"status"`
}

// replica is one as "caddy upstreams" describes it.
type replica struct {
	Upstream string `json:"upstream"`
	Address  string `json:"address"`
	State    string `json:"state"`
	Active   int    `json:"active"`
	Error    string `json:"error,omitempty"`
}

type caCertificate struct {
	Name        string `json:"name"` // root or intermediate
	Fingerprint string `json:"fingerprint"`
	Until       string `json:"until"`
	Left        int64  `json:"seconds_left"`
}

type backupState struct {
	Last         string `json:"last,omitempty"` // none if there has been none
	Bytes        int64  `json:"bytes,omitempty"`
	Certificates int64  `json:"certificates,omitempty"`
}

type driftState struct {
	ExitCode int      `json:"exit_code"` // of provisioner-init --check
	Said     []string `json:"said"`
}

func (s *caStatusReader) run(ctx context.Context, log *slog.Logger) error {
	settings := config.NewReader()
	db, password := settings.Database(), settings.ReportsPassword()
	if err := settings.Err(); err != nil {
		return err
	}
	now := time.Now()
	st := caState{
		Services: []service{}, Replicas: []replica{}, Arrivals: []string{}, Certificates: []caCertificate{}, Provisioners: []verdict{}, Problems: problems{},
	}
	if err := st.seen(os.Stdin); err != nil {
		return err
	}
	st.certificates(s.certs, now)
	verdicts, err := s.verdicts(ctx, slog.New(warnings{log.Handler()}))
	if err != nil {
		st.Problems.err(err)
	}
	st.provisioners(verdicts)
	if err := st.backup(ctx, postgres.Reports(db, password), now); err != nil {
		st.Problems.err(err)
	}
	st.Well = len(st.Problems) == 0
	if s.json {
		return errors.Join(printJSON(st), wrong(st.Problems))
	}
	return st.screen(now).print(st.Problems)
}

// seen reads what the CA's host sees.
func (st *caState) seen(r io.Reader) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	drift := driftState{Said: []string{}}
	for lines.Scan() {
		kind, text, _ := strings.Cut(lines.Text(), " ")
		var err error
		switch kind {
		case "service":
			var one struct { // Compose's names
				Service, Name, State, Health string
				ExitCode                     int
				Status                       string
			}
			err = json.Unmarshal([]byte(text), &one)
			st.Services = append(st.Services, service(one))
		case "upstreams":
			err = json.Unmarshal([]byte(text), &st.Replicas)
		case "arrival":
			if text != "" {
				st.Arrivals = append(st.Arrivals, text)
			}
		case "drift":
			if text != "" && !strings.Contains(text, "msg=unchanged") {
				drift.Said = append(drift.Said, text)
			}
		case "check":
			_, err = fmt.Sscan(text, &drift.ExitCode)
			st.Drift = &drift
		}
		if err != nil {
			return fmt.Errorf("reading what the host sees: line %q: %w", lines.Text(), err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("reading what the host sees: %w", err)
	}
	st.services()
	st.replicas()
	st.drift()
	return nil
}

// The services that a stack always has: those that stay, and those that end.
var (
	staying  = []string{"postgres", "pgbouncer", "step-ca", "caddy"}
	oneShots = []string{"config-check", "db-migrate", "db-wait", "provisioner-init", "trust-export"}
)

func (st *caState) services() {
	if len(st.Services) == 0 {
		return
	}
	for _, s := range st.Services {
		logs := fmt.Sprintf(`"docker compose logs %s" says why; "make up" starts it`, s.Service)
		switch {
		case slices.Contains(oneShots, s.Service):
			if s.State == "exited" && s.ExitCode != 0 {
				st.Problems.add(fmt.Sprintf("%s ended with %d", s.Name, s.ExitCode), fmt.Sprintf(`the last lines of "docker compose logs %s" say what and what to do`, s.Service))
			}
		case s.State != "running":
			st.Problems.add(fmt.Sprintf("%s does not run: %s", s.Name, s.Status), logs)
		case s.Health == "unhealthy":
			st.Problems.add(fmt.Sprintf("%s is unhealthy", s.Name), fmt.Sprintf(`"docker compose logs %s", and README, "When something is wrong"`, s.Service))
		}
	}
	for _, name := range staying {
		if !slices.ContainsFunc(st.Services, func(s service) bool { return s.Service == name }) {
			st.Problems.add(name+" is not there", `"make up" starts it`)
		}
	}
}

func (st *caState) replicas() {
	for _, r := range st.Replicas {
		switch r.State {
		case "alive":
			st.Problems.add(fmt.Sprintf("%s at %s answers, and not from its database: %s", r.Upstream, r.Address, r.Error), `"docker compose ps postgres pgbouncer"`)
		case "out":
			st.Problems.add(fmt.Sprintf("%s at %s does not answer: %s", r.Upstream, r.Address, r.Error), `"docker compose logs step-ca"`)
		}
	}
}

func (st *caState) drift() {
	switch {
	case st.Drift == nil || st.Drift.ExitCode == 0:
	case st.Drift.ExitCode == 3:
		st.Problems.add("what is rendered is not what .env declares: "+strings.Join(st.Drift.Said, "; "), `"make init" applies it`)
	default:
		st.Problems.add("provisioner-init --check ended badly: "+strings.Join(st.Drift.Said, "; "), `"make check" tests .env`)
	}
}

func (st *caState) certificates(dir string, now time.Time) {
	for _, kind := range []struct {
		name string
		soon time.Duration
		do   string
	}{
		{"root", rootSoon, "make the next root now and spread it beside the old one; drop this one when nothing under it is valid any more"},
		{"intermediate", intermediateSoon, "make the next one with the root key while this one is valid; roots at clients stay as they are"},
	} {
		bundle, err := pemutil.ReadCertificateBundle(filepath.Join(dir, kind.name+"_ca.crt"))
		if err != nil {
			st.Problems.err(fmt.Errorf("reading the %s certificate: %w", kind.name, err))
			continue
		}
		for _, c := range bundle {
			left := c.NotAfter.Sub(now)
			st.Certificates = append(st.Certificates, caCertificate{kind.name, x509util.Fingerprint(c), stamp(c.NotAfter), int64(max(0, left) / time.Second)})
			if left < kind.soon {
				st.Problems.add(fmt.Sprintf("the %s certificate ends on %s", kind.name, stamp(c.NotAfter)), kind.do)
			}
		}
	}
}

func (st *caState) provisioners(verdicts []verdict) {
	st.Provisioners = append(st.Provisioners, verdicts...)
	for _, v := range verdicts {
		if v.State == uninitialized {
			st.Problems.add(fmt.Sprintf("the CA could not initialise provisioner %q%s, which refuses everybody: %s", v.Name, v.where(), v.Reason), initHint(v))
		}
		if err := v.drift(); err != nil {
			st.Problems.add(err.Error(), driftHint)
		}
	}
}

func (st *caState) backup(ctx context.Context, login postgres.Login, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := login.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // nothing was written
	var taken time.Time
	var last backupState
	err = conn.QueryRow(ctx, "select taken_at, bytes, certificates from infra_pki.backups order by taken_at desc limit 1").
		Scan(&taken, &last.Bytes, &last.Certificates)
	const nightly = `"make backup", every night; README, "Back up and restore"`
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		st.Backup = &last
		st.Problems.add("there is no backup: a lost disk is the end of this CA", nightly)
		return nil
	case err != nil:
		return fmt.Errorf("looking for the last backup: %w", err)
	}
	last.Last = stamp(taken)
	st.Backup = &last
	if age := now.Sub(taken); age > backupOld {
		st.Problems.add(fmt.Sprintf("the last backup is %s old", span(age)), nightly)
	}
	return nil
}

func (st *caState) screen(now time.Time) *screen {
	s := new(screen)
	for _, one := range st.Services {
		s.row(one.Service, one.Status, one.Name)
	}
	for _, r := range st.Replicas {
		s.row("edge", r.State, fmt.Sprintf("%s at %s, %d connections", r.Upstream, r.Address, r.Active))
	}
	for _, c := range st.Certificates {
		s.row(c.Name, span(time.Duration(c.Left)*time.Second)+" left", c.Fingerprint)
	}
	for _, v := range st.Provisioners {
		text := v.State
		if v.Declared != same {
			text += ", declared: " + orDash(v.Declared)
		}
		s.row("provisioner", text, printable(v.Name)+v.where())
	}
	last := "none"
	if st.Backup == nil {
		last = "unknown"
	} else if st.Backup.Last != "" {
		at, _ := time.Parse(time.RFC3339, st.Backup.Last) // stamp wrote it
		last = span(now.Sub(at)) + " ago"
	}
	s.row("backup", last)
	if st.Drift != nil {
		s.row("declared", map[bool]string{true: "as in .env", false: "not as in .env"}[st.Drift.ExitCode == 0])
	}
	for _, a := range st.Arrivals {
		to, from, _ := strings.Cut(strings.TrimPrefix(a, "a connection to "), " ")
		s.row("arrival", from, to)
	}
	return s
}
