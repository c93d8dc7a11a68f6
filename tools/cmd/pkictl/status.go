package main

import (
	"context"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"time"

	"go.step.sm/crypto/x509util"
	"golang.org/x/crypto/ssh"

	"github.com/infra-pki/infra-pki/tools/internal/anchor"
	"github.com/infra-pki/infra-pki/tools/internal/enrol"
	"github.com/infra-pki/infra-pki/tools/internal/host"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/renewal"
	"github.com/infra-pki/infra-pki/tools/internal/schedule"
	"github.com/infra-pki/infra-pki/tools/internal/sshd"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

// late is how long after its time something may happen before it counts as wrong. The
// schedule has at most 25 minutes between two runs.
const late = time.Hour

var status = command{
	summary: "tell what is wrong with this host's certificates, and what to do",
	usage: `usage: pkictl status [flags]

Tells on one screen how this host stands with its CA: whether the CA answers, whether
its root is trusted, how long each certificate is good, whether sshd offers those that
it should, whether renewal is scheduled and how it went. Then what is wrong, and what to
do. It changes nothing. It needs root, as the keys do.

  --json       one object, for machines
  --dir DIR    the host's record (default ` + host.Dir + `)
  --state DIR  where results of renewal are kept (default ` + renewal.Dir + `)

Exit codes: 0 all is well; 1 something is wrong; 2 wrong call.

Examples:
  pkictl status
  pkictl status --json | jq -r '.problems[].what'
  watch --color pkictl status
`,
	setup: func(fs *flag.FlagSet) work {
		var s statusReader
		fs.BoolVar(&s.json, "json", false, "")
		fs.StringVar(&s.dir, "dir", host.Dir, "")
		fs.StringVar(&s.state, "state", renewal.Dir, "")
		return s.run
	},
}

type statusReader struct {
	json       bool
	dir, state string
}

// hostStatus is the status for machines. Names of fields stay.
type hostStatus struct {
	Well         bool                `json:"well"`
	CA           *membership         `json:"ca,omitempty"` // none before the host has joined
	Certificates []certificateStatus `json:"certificates"`
	SSHD         *sshdStatus         `json:"sshd,omitempty"` // of a host with SSH certificates
	Schedule     *schedule.State     `json:"schedule,omitempty"`
	Renewal      *renewalStatus      `json:"renewal,omitempty"`
	Problems     problems            `json:"problems"`
}

type membership struct {
	URL         string `json:"url"`
	Answers     bool   `json:"answers"`
	Fingerprint string `json:"fingerprint"`
	RootUntil   string `json:"root_until,omitempty"`
	Trusted     *bool  `json:"trusted,omitempty"` // by the system; none if it was not asked for
}

type certificateStatus struct {
	Kind    renewal.Kind `json:"kind"`
	Path    string       `json:"path"`
	State   string       `json:"state"` // good, due, expired, "not yet valid" or unreadable
	Names   []string     `json:"names,omitempty"`
	Serial  string       `json:"serial,omitempty"`
	From    string       `json:"from,omitempty"`
	Due     string       `json:"due,omitempty"`
	Until   string       `json:"until,omitempty"`
	Left    int64        `json:"seconds_left"`
	Renewed string       `json:"renewed,omitempty"`
}

type sshdStatus struct {
	DropIn  string `json:"drop_in"`
	Used    bool   `json:"used"` // its configuration has what the drop-in says
	Running bool   `json:"running"`
	Offers  bool   `json:"offers"` // it shows the certificates
}

type renewalStatus struct {
	LastRun     string   `json:"last_run,omitempty"`
	LastSuccess string   `json:"last_success,omitempty"`
	LastFailure string   `json:"last_failure,omitempty"`
	Errors      []string `json:"errors,omitempty"` // of the last run
}

func (s *statusReader) run(ctx context.Context, _ *slog.Logger) error {
	now := time.Now()
	st := s.read(ctx, now)
	st.Well = len(st.Problems) == 0
	if s.json {
		return errors.Join(printJSON(st), wrong(st.Problems))
	}
	return st.screen(now).print(st.Problems)
}

func (s *statusReader) read(ctx context.Context, now time.Time) hostStatus {
	st := hostStatus{Certificates: []certificateStatus{}, Problems: problems{}}
	record, err := host.Load(s.dir)
	if err != nil {
		st.Problems.err(explainRecord(err))
		return st
	}
	results, err := renewal.Load(s.state)
	if err != nil {
		st.Problems.err(err)
	}
	st.ca(ctx, s.dir, record, now)
	var certs []*ssh.Certificate
	for _, p := range renewal.Pairs(record) {
		st.certificate(p, results.Certificates[p.Cert], now)
		if p.Kind == renewal.SSH {
			if cert, err := enrol.ReadSSHCertificate(p.Cert); err == nil { // else it is in the problems
				certs = append(certs, cert)
			}
		}
	}
	if record.SSH != nil {
		st.sshd(ctx, s.dir, *record.SSH, certs)
	}
	st.schedule(ctx, s.dir, record)
	st.renewal(results, now)
	return st
}

func (st *hostStatus) ca(ctx context.Context, dir string, record host.Record, now time.Time) {
	st.CA = &membership{URL: record.CAURL, Fingerprint: record.Fingerprint}
	roots, err := trustbundle.Read(host.Root(dir), now)
	if err != nil {
		st.Problems.err(oneshot.WithHint(err, `"pkictl join" with a new token fetches the CA's roots`))
	} else {
		st.CA.RootUntil = stamp(roots.Current().NotAfter)
		if !slices.ContainsFunc(roots.Roots(), func(r *x509.Certificate) bool { return x509util.Fingerprint(r) == record.Fingerprint }) {
			st.Problems.add(fmt.Sprintf("%q does not hold the root that this host joined", host.Root(dir)), `"pkictl join" with a new token fetches it`)
		}
		err := ask(ctx, record.CAURL, roots)
		st.CA.Answers = err == nil
		if err != nil {
			st.Problems.err(explainCA(err, record.CAURL))
		}
	}
	if !record.Trust {
		return
	}
	for _, store := range anchor.Status(ctx, record.Fingerprint, anchor.System) {
		trusted := store.State == anchor.Trusted
		st.CA.Trusted = &trusted
		if !trusted {
			what := fmt.Sprintf("the system's trust store has the CA's root as: %s", store.State)
			if store.Why != "" {
				what += ": " + store.Why
			}
			do := store.Hint
			if do == "" {
				do = fmt.Sprintf("pkictl trust install --root %s", host.Root(dir))
			}
			st.Problems.add(what, do)
		}
	}
}

func ask(ctx context.Context, url string, roots trustbundle.Bundle) error {
	client, err := stepca.New(url, roots.Roots()...)
	if err != nil {
		return err
	}
	return client.Health(ctx)
}

func (st *hostStatus) certificate(p renewal.Pair, result renewal.Result, now time.Time) {
	line := certificateStatus{Kind: p.Kind, Path: p.Cert, State: "unreadable", Renewed: stamp(result.Renewed)}
	c, err := p.Read()
	if err != nil {
		hint := `"pkictl join" with a new token gets a new one`
		if errors.Is(err, fs.ErrPermission) {
			hint = "run it as root"
		}
		st.Problems.err(oneshot.WithHint(err, "%s", hint))
		st.Certificates = append(st.Certificates, line)
		return
	}
	line.Names, line.Serial, line.From, line.Due, line.Until = c.Names, c.Serial, stamp(c.From), stamp(c.Due()), stamp(c.Until)
	line.Left = int64(max(0, c.Until.Sub(now)) / time.Second)
	switch {
	case !now.Before(c.Until):
		line.State = "expired"
		st.Problems.add(fmt.Sprintf("%q expired on %s", p.Cert, line.Until), `the CA does not renew it any more: "pkictl token" on the CA host prints a new "pkictl join" for this host`)
	case now.Before(c.From):
		line.State = "not yet valid"
		st.Problems.add(fmt.Sprintf("%q begins on %s, and the clock of this host says %s", p.Cert, line.From, stamp(now)), "set the clock, and keep it set with NTP")
	case now.Before(c.Due()):
		line.State = "good"
	default:
		line.State = "due"
		if now.Sub(c.Due()) > late && result.Error == "" {
			st.Problems.add(fmt.Sprintf("%q is to be renewed since %s", p.Cert, line.Due), `"pkictl renew" does it and says why not`)
		}
	}
	st.Certificates = append(st.Certificates, line)
}

func (st *hostStatus) sshd(ctx context.Context, dir string, record host.SSH, certs []*ssh.Certificate) {
	st.SSHD = &sshdStatus{DropIn: record.DropIn}
	effective, err := sshd.Server{Config: record.Config}.Effective(ctx)
	if err != nil {
		st.Problems.err(err)
		return
	}
	var paths []string
	for _, key := range record.Keys {
		paths = append(paths, record.Cert(key))
	}
	if st.SSHD.Used = effective.Shows(paths, host.UserCA(dir)); !st.SSHD.Used {
		st.Problems.add(fmt.Sprintf("sshd does not do what %q says", record.DropIn),
			`"sshd -T" shows what it does; it needs "Include /etc/ssh/sshd_config.d/*.conf" at the top of its configuration`)
	}
	st.SSHD.Running = effective.Runs(ctx)
	if !st.SSHD.Running {
		return // that may be meant
	}
	st.SSHD.Offers = !slices.ContainsFunc(certs, func(c *ssh.Certificate) bool { return !effective.Offers(ctx, c) })
	if st.SSHD.Used && !st.SSHD.Offers {
		st.Problems.add(fmt.Sprintf("sshd at %s does not offer the certificates that are there", effective.Address()), "systemctl reload ssh (or sshd)")
	}
}

func (st *hostStatus) schedule(ctx context.Context, dir string, record host.Record) {
	state := schedule.Schedule{Dir: dir}.State(ctx)
	st.Schedule = &state
	if record.Schedule == "" {
		return // somebody else sees to it
	}
	for _, what := range state.Problems {
		st.Problems.add("renewal is not scheduled: "+what, `"pkictl join" schedules it; "systemctl enable --now infra-pki-renew.timer" or a cron daemon runs it`)
	}
}

func (st *hostStatus) renewal(results renewal.Results, now time.Time) {
	st.Renewal = &renewalStatus{
		LastRun: stamp(results.LastRun), LastSuccess: stamp(results.LastSuccess), LastFailure: stamp(results.LastFailure), Errors: results.Errors,
	}
	if !results.LastRun.IsZero() && now.Sub(results.LastRun) > late {
		st.Problems.add(fmt.Sprintf("renewal last ran on %s", st.Renewal.LastRun), `"journalctl -u infra-pki-renew.service", or the log of cron, says why; "pkictl renew" runs it now`)
	}
	for _, text := range results.Errors {
		st.Problems.add("at the last renewal: "+text, `"pkictl renew" tries again now and says what to do`)
	}
}

func (st hostStatus) screen(now time.Time) *screen {
	s := new(screen)
	if st.CA == nil {
		return s
	}
	answers := map[bool]string{true: "answers", false: "was not reached"}
	s.row("ca", answers[st.CA.Answers], st.CA.URL)
	trusted := "of no concern to the system: join was told so"
	if st.CA.Trusted != nil {
		trusted = map[bool]string{true: "trusted by the system", false: "not trusted by the system"}[*st.CA.Trusted]
	}
	s.row("root", trusted, st.CA.Fingerprint)
	for _, c := range st.Certificates {
		text := c.State
		if c.Until != "" {
			text = fmt.Sprintf("%s, %s left, due %s", c.State, span(time.Duration(c.Left)*time.Second), c.Due)
		}
		s.row(string(c.Kind), text, strings.Join(append([]string{c.Path}, c.Names...), " "))
	}
	if st.SSHD != nil {
		text := "does not use it"
		switch {
		case st.SSHD.Used && !st.SSHD.Running:
			text = "uses it, and does not run"
		case st.SSHD.Used && st.SSHD.Offers:
			text = "offers the certificates"
		case st.SSHD.Used:
			text = "uses it, and does not offer the certificates"
		}
		s.row("sshd", text, st.SSHD.DropIn)
	}
	active := map[bool]string{true: "active", false: strings.Join(st.Schedule.Problems, ", ")}
	s.row("schedule", active[st.Schedule.Active], string(st.Schedule.Kind))
	last, verdict := "", "has not run yet"
	if st.Renewal.LastRun != "" {
		at, _ := time.Parse(time.RFC3339, st.Renewal.LastRun) // stamp wrote it
		last = fmt.Sprintf("%s (%s ago)", st.Renewal.LastRun, span(now.Sub(at)))
		verdict = map[bool]string{true: "good", false: "failed"}[len(st.Renewal.Errors) == 0]
	}
	s.row("renewal", verdict, last)
	return s
}

// stamp is a time for people and machines, nothing if it is zero.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
