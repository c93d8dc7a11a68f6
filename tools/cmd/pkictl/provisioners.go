package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
)

var provisioners = command{
	summary: "compare the CA's provisioners with the declared ones",
	usage: `usage: pkictl provisioners [flags]

Lists the provisioners that the CA has, and compares each with its declaration in
ca.json: the same fields, the same values. Exit code 3 if any differs, is missing or is
not declared. Values are never printed. Every replica behind the address of the CA is
asked; where they differ, it says which.

A provisioner that the CA could not initialise when it last read ca.json, an OIDC one
whose provider was away for example, is there and refuses everybody. It is named in a
warning with step-ca's reason.

The CA fills in some defaults of cloud and SCEP provisioners, which count as declared.
It hides the secrets of a SCEP provisioner, which are not compared.

  --declared FILE  ca.json (default /home/step/config/ca.json); empty: only list
  --json           one array of objects
  --ca-url URL     address of the CA (default https://step-ca:9000)
  --root FILE      the root to trust, PEM (default /home/step/certs/root_ca.crt)

Examples:
  docker compose run --rm pkictl provisioners
  pkictl provisioners --declared "" --ca-url https://ca.internal:9000 --root trust/root_ca.crt
`,
	setup: func(fs *flag.FlagSet) work {
		var l lister
		l.flags(fs, "https://step-ca:9000", "/home/step/certs/root_ca.crt")
		fs.StringVar(&l.declared, "declared", "/home/step/config/ca.json", "")
		fs.BoolVar(&l.json, "json", false, "")
		return l.run
	},
}

type lister struct {
	authority
	declared string
	json     bool
}

// object is a provisioner as JSON has it.
type object map[string]any

func (o object) text(field string) string {
	s, _ := o[field].(string)
	return s
}

// verdict is one line of the comparison.
type verdict struct {
	Name     string   `json:"name"`
	Type     string   `json:"type"`
	State    string   `json:"state"` // of the live one
	Reason   string   `json:"reason,omitempty"`
	Declared string   `json:"declared,omitempty"`
	Fields   []string `json:"fields,omitempty"`
	Replicas []string `json:"replicas,omitempty"` // addresses; empty if it is the same on all
}

// where says on which replicas, if not on all.
func (v verdict) where() string {
	if len(v.Replicas) == 0 {
		return ""
	}
	return " (on " + strings.Join(v.Replicas, ", ") + ")"
}

// How a provisioner compares.
const (
	same       = "same"
	differs    = "differs"
	undeclared = "no"
	missing    = "missing in the CA"

	ready         = "Ready"
	uninitialized = "Uninitialized" // step-ca's own word
)

func (l *lister) run(ctx context.Context, log *slog.Logger) error {
	verdicts, err := l.verdicts(ctx, log)
	if err != nil {
		return err
	}
	if err := l.print(verdicts); err != nil {
		return fmt.Errorf("printing the provisioners: %w", err)
	}
	return judge(ctx, verdicts, log)
}

// verdicts asks every replica.
func (l *lister) verdicts(ctx context.Context, log *slog.Logger) ([]verdict, error) {
	var declared []object
	if l.declared != "" {
		var err error
		if declared, err = readDeclared(l.declared); err != nil {
			return nil, oneshot.WithHint(err, "provisioner-init writes ca.json; --declared names it")
		}
	}
	client, err := l.client(ctx, time.Now(), log)
	if err != nil {
		return nil, err
	}
	replicas, err := client.Replicas(ctx)
	if err != nil {
		return nil, l.explain(err)
	}
	var verdicts []verdict
	for _, address := range slices.SortedFunc(maps.Keys(replicas), netip.Addr.Compare) {
		live, err := provisionersOf(ctx, replicas[address])
		if err != nil {
			return nil, l.explain(err)
		}
		verdicts = merge(verdicts, compare(declared, live, l.declared != ""), address.String())
	}
	everywhere(verdicts, len(replicas))
	return verdicts, nil
}

func provisionersOf(ctx context.Context, client *stepca.Client) ([]object, error) {
	answer, err := client.Provisioners(ctx)
	if err != nil {
		return nil, err
	}
	live := make([]object, len(answer))
	for i, data := range answer {
		if err := decode(data, &live[i]); err != nil {
			return nil, fmt.Errorf("reading the CA's provisioners: %w", err)
		}
	}
	return live, nil
}

// merge adds the verdicts on one replica to those on others: what is said of several is
// said once.
func merge(all, found []verdict, replica string) []verdict {
	for _, v := range found {
		i := slices.IndexFunc(all, func(known verdict) bool {
			known.Replicas = nil
			return reflect.DeepEqual(known, v)
		})
		if i < 0 {
			i, all = len(all), append(all, v)
		}
		all[i].Replicas = append(all[i].Replicas, replica)
	}
	return all
}

// everywhere leaves the replicas out where all of them agree.
func everywhere(verdicts []verdict, replicas int) {
	for i := range verdicts {
		if len(verdicts[i].Replicas) == replicas {
			verdicts[i].Replicas = nil
		}
	}
}

func readDeclared(path string) ([]object, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the declared provisioners: %w", err)
	}
	var ca struct {
		Authority *struct {
			Provisioners []object `json:"provisioners"`
		} `json:"authority"`
	}
	if err := decode(data, &ca); err != nil {
		return nil, fmt.Errorf("reading the declared provisioners from %q: %w", path, err)
	}
	if ca.Authority == nil {
		return nil, fmt.Errorf("reading the declared provisioners from %q: it has no authority", path)
	}
	return ca.Authority.Provisioners, nil
}

// decode keeps numbers as they are written.
func decode(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	return d.Decode(into)
}

// compare lists the declared ones in their order, then those that are only live.
func compare(declared, live []object, against bool) []verdict {
	byName := map[string]object{}
	for _, o := range live {
		byName[o.text("name")] = o
	}
	var verdicts []verdict
	for _, d := range declared {
		name := d.text("name")
		actual, ok := byName[name]
		if !ok {
			verdicts = append(verdicts, verdict{Name: name, Type: d.text("type"), State: "-", Declared: missing})
			continue
		}
		delete(byName, name)
		v := describe(actual)
		v.Declared = same
		if v.Fields = difference(d, actual); len(v.Fields) > 0 {
			v.Declared = differs
		}
		verdicts = append(verdicts, v)
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		v := describe(byName[name])
		if against {
			v.Declared = undeclared
		}
		verdicts = append(verdicts, v)
	}
	return verdicts
}

func describe(actual object) verdict {
	v := verdict{Name: actual.text("name"), Type: actual.text("type"), State: ready}
	if state := actual.text("state"); state != "" {
		v.State, v.Reason = state, actual.text("stateReason")
	}
	return v
}

// filled is what step-ca v0.30.2 writes into a provisioner that does not say it
// (Init in authority/provisioner/{aws,azure,gcp,scep}.go), and the zero values that
// its answer spells out and ca.json leaves out (api/models/scep.go).
var filled = map[string]object{
	"AWS":   {"imdsVersions": []any{"v2", "v1"}},
	"AZURE": {"audience": "https://management.azure.com/"},
	"GCP":   {"disableSSHCAUser": true, "disableSSHCAHost": false},
	"SCEP": {
		"forceCN": false, "includeRoot": false, "excludeIntermediate": false,
		"minimumPublicKeyLength": json.Number("2048"), "encryptionAlgorithmIdentifier": json.Number("0"),
	},
}

// hidden is what step-ca v0.30.2 replaces in its answer (api/api.go, scepFromProvisioner).
var hidden = map[string][]string{
	"SCEP": {"challenge", "decrypterCertificate", "decrypterKeyPEM", "decrypterKey", "decrypterKeyPassword"},
}

// difference names the fields in which the live provisioner is not as declared.
func difference(declared, actual object) []string {
	kind := strings.ToUpper(declared.text("type"))
	want, got := maps.Clone(declared), maps.Clone(actual)
	for field, value := range filled[kind] {
		if said := want[field]; said == nil || said == "" {
			want[field] = value
		}
	}
	for _, field := range hidden[kind] {
		delete(want, field)
		delete(got, field)
	}
	if got.text("state") == uninitialized {
		delete(got, "state")
		delete(got, "stateReason")
		// It may not have come as far as to fill them in.
		for field := range filled[kind] {
			if _, said := got[field]; !said {
				delete(want, field)
			}
		}
	}
	all := maps.Clone(want)
	maps.Copy(all, got)
	var fields []string
	for _, field := range slices.Sorted(maps.Keys(all)) {
		w, inWant := want[field]
		g, inGot := got[field]
		if inWant != inGot || !reflect.DeepEqual(w, g) {
			fields = append(fields, field)
		}
	}
	return fields
}

func (l *lister) print(verdicts []verdict) error {
	if l.json {
		return printJSON(append([]verdict{}, verdicts...))
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "NAME\tTYPE\tSTATE\tDECLARED") // Flush tells
	for _, v := range verdicts {
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", printable(v.Name), v.Type, v.State, orDash(v.Declared)+v.where()) // as above
	}
	return w.Flush()
}

// judge warns of what does not work and ends with all that is not as declared.
func judge(ctx context.Context, verdicts []verdict, log *slog.Logger) error {
	var problems []error
	for _, v := range verdicts {
		if v.State == uninitialized {
			log.LogAttrs(ctx, slog.LevelWarn, "the CA could not initialise a provisioner, which refuses everybody until the CA reads ca.json again",
				slog.String("name", v.Name+v.where()), slog.String("reason", v.Reason), slog.String("hint", initHint(v)))
		}
		if err := v.drift(); err != nil {
			problems = append(problems, err)
		}
	}
	if len(problems) == 0 {
		return nil
	}
	return oneshot.WithHint(oneshot.WithExitCode(errors.Join(problems...), oneshot.ExitDrift), driftHint)
}

const driftHint = `"make init" makes the CA take what is declared; "docker compose logs step-ca" tells why it did not`

// drift says what is not as declared.
func (v verdict) drift() error {
	switch v.Declared {
	case missing:
		return fmt.Errorf("provisioner %q is declared and the CA does not have it%s", v.Name, v.where())
	case undeclared:
		return fmt.Errorf("provisioner %q is not declared and the CA has it%s", v.Name, v.where())
	case differs:
		return fmt.Errorf("provisioner %q is not as declared: %s%s", v.Name, strings.Join(v.Fields, ", "), v.where())
	}
	return nil
}

func initHint(v verdict) string {
	if strings.EqualFold(v.Type, "OIDC") {
		return `the provider must answer at OIDC_ENDPOINT, with a certificate that step-ca trusts; once it does, "make restart" or the health check makes the CA ask again`
	}
	return `correct its declaration, then "make init"`
}
