package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"go.step.sm/crypto/pemutil"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/anchor"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

const storesHelp = `  --stores LIST       of system, nss (Firefox; Chromium on Linux) and java, separated by
                      commas (default: all)
`

const sudoHelp = `The system's store needs root: without it, sudo is called. With "sudo pkictl …" the
browsers of whoever called sudo are served, with their own rights, and root's.
Java is the runtime of JAVA_HOME, or the one whose keytool is on the PATH.
`

var trustInstall = command{
	summary: "make this machine trust the CA",
	usage: `usage: pkictl trust install --ca-url URL --fingerprint HEX [flags]
       pkictl trust install --root FILE [--fingerprint HEX] [flags]

Gets the root from the CA or from a file, shows it, brings it into the trust stores of
this machine and reads it back. A store that has it is left alone; one that is not
there is skipped, with the reason. What is installed has a fingerprint that was given,
and is a root that is valid now: if anything else comes along, nothing is installed.

  --ca-url URL        address of the CA
  --fingerprint HEX   SHA-256 of the root, in hex, colons or not; again for a second root
  --root FILE         the root, PEM, for one that is brought by hand; a file of several
                      needs the fingerprint of each
` + storesHelp + `  --dry-run           get and show the root, say what would be done, and do nothing

` + sudoHelp + `
Examples:
  sudo pkictl trust install --ca-url https://ca.internal:9000 --fingerprint 4f1a…9c
  sudo pkictl trust install --root ./trust/root_ca.crt
  pkictl trust install --root ./trust/root_ca.crt --stores nss
`,
	setup: func(fs *flag.FlagSet) work {
		var t truster
		fs.StringVar(&t.url, "ca-url", "", "")
		fs.BoolVar(&t.dryRun, "dry-run", false, "")
		t.flags(fs)
		return t.install
	},
}

var trustUninstall = command{
	summary: "take the CA's root out of this machine's trust stores",
	usage: `usage: pkictl trust uninstall (--fingerprint HEX | --root FILE) [flags]

Looks for the root in every trust store, takes it out and looks again. It asks no CA,
and works for a root that has expired.

  --fingerprint HEX   SHA-256 of the root, in hex, colons or not; again for a second root
  --root FILE         the root, PEM
` + storesHelp + `  --dry-run           say what would be done, and do nothing

` + sudoHelp + `
Examples:
  sudo pkictl trust uninstall --fingerprint 4f1a…9c
  sudo pkictl trust uninstall --root ./trust/root_ca.crt
`,
	setup: func(fs *flag.FlagSet) work {
		var t truster
		fs.BoolVar(&t.dryRun, "dry-run", false, "")
		t.flags(fs)
		return t.uninstall
	},
}

var trustStatus = command{
	summary: "show which of this machine's trust stores trust the CA",
	usage: `usage: pkictl trust status (--fingerprint HEX | --root FILE) [flags]

Says for each trust store: trusted, not trusted, absent (and why), or unknown (it could
not be read). It changes nothing. Exit code 0 if all stores that are there trust the
root, 1 if not.

  --fingerprint HEX   SHA-256 of the root, in hex, colons or not; again for a second root
  --root FILE         the root, PEM
` + storesHelp + `  --json              for machines

` + sudoHelp + `
Examples:
  pkictl trust status --fingerprint 4f1a…9c
  pkictl trust status --root ./trust/root_ca.crt --json
`,
	setup: func(fs *flag.FlagSet) work {
		var t truster
		fs.BoolVar(&t.json, "json", false, "")
		t.flags(fs)
		return t.status
	},
}

type truster struct {
	url, root    string
	fingerprints []string
	stores       string
	dryRun, json bool
	kinds        []string // what stores says
}

func (t *truster) flags(fs *flag.FlagSet) {
	fs.StringVar(&t.root, "root", "", "")
	fs.StringVar(&t.stores, "stores", strings.Join(anchor.Kinds, ","), "")
	fs.Func("fingerprint", "", func(s string) error { t.fingerprints = append(t.fingerprints, s); return nil })
}

// check reads fingerprints and stores, all of them.
func (t *truster) check() []error {
	var problems []error
	for i, given := range t.fingerprints {
		fp, err := anchor.ParseFingerprint(given)
		if err != nil {
			problems = append(problems, fmt.Errorf("--fingerprint: %w", err))
		}
		t.fingerprints[i] = fp
	}
	for kind := range strings.SplitSeq(t.stores, ",") {
		if !slices.Contains(anchor.Kinds, kind) {
			problems = append(problems, fmt.Errorf("--stores: %q is none of %s", kind, strings.Join(anchor.Kinds, ", ")))
		}
		t.kinds = append(t.kinds, kind)
	}
	return problems
}

func (t *truster) install(ctx context.Context, log *slog.Logger) error {
	problems := t.check()
	switch {
	case (t.url == "") == (t.root == ""):
		problems = append(problems, errors.New("one of --ca-url and --root must say where the root is; a good value: --ca-url https://ca.internal:9000"))
	case t.url != "" && len(t.fingerprints) == 0:
		problems = append(problems, errors.New("--fingerprint must say which root is meant: without it anybody on the way could put in their own; trust/fingerprint on the CA host has it"))
	}
	if t.url != "" {
		if _, err := stepca.New(t.url); err != nil {
			problems = append(problems, fmt.Errorf("--ca-url: %w", err))
		}
	}
	if len(problems) > 0 {
		return oneshot.Usage(errors.Join(problems...))
	}
	roots, err := t.roots(ctx, time.Now())
	if err != nil {
		return err
	}
	for i, root := range roots {
		if i > 0 {
			fmt.Println()
		}
		if err := showRoot(root); err != nil {
			return fmt.Errorf("printing the root: %w", err)
		}
	}
	problems = nil
	for _, root := range roots {
		if t.dryRun {
			t.plan(ctx, log, x509util.Fingerprint(root), anchor.NotTrusted, "would install")
			continue
		}
		problems = append(problems, anchor.Install(ctx, root, log, t.kinds...))
	}
	return errors.Join(problems...)
}

// roots are the ones that may be installed, each vouched for.
func (t *truster) roots(ctx context.Context, now time.Time) ([]*x509.Certificate, error) {
	if t.url != "" {
		var roots []*x509.Certificate
		for _, fp := range t.fingerprints {
			bundle, err := anchor.Fetch(ctx, t.url, fp, now)
			if err != nil {
				return nil, err
			}
			roots = append(roots, bundle.Roots()...)
		}
		return roots, nil
	}
	bundle, err := trustbundle.Read(t.root, now)
	if err != nil {
		return nil, oneshot.WithHint(err, "it must be a root in PEM and nothing else, as trust/root_ca.crt on the CA host")
	}
	if len(t.fingerprints) > 0 {
		err = anchor.OnlyThese(bundle, t.fingerprints...)
	} else if n := len(bundle.Roots()); n > 1 {
		err = fmt.Errorf("it holds %d roots", n)
	}
	if err != nil {
		return nil, oneshot.WithHint(fmt.Errorf("checking the roots of %q: %w", t.root, err),
			"nothing was installed; a --fingerprint for each root of the file says that it is meant")
	}
	return bundle.Roots(), nil
}

func showRoot(root *x509.Certificate) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, line := range [][2]string{
		{"subject", root.Subject.String()},
		{"valid from", root.NotBefore.UTC().Format(time.RFC3339)},
		{"valid to", root.NotAfter.UTC().Format(time.RFC3339)},
		{"fingerprint", x509util.Fingerprint(root)},
	} {
		_, _ = fmt.Fprintf(w, "%s:\t%s\n", line[0], printable(line[1])) // Flush tells
	}
	return w.Flush()
}

func (t *truster) uninstall(ctx context.Context, log *slog.Logger) error {
	if err := t.named(); err != nil {
		return err
	}
	var problems []error
	for _, fp := range t.fingerprints {
		if t.dryRun {
			t.plan(ctx, log, fp, anchor.Trusted, "would uninstall")
			continue
		}
		problems = append(problems, anchor.Uninstall(ctx, fp, log, t.kinds...))
	}
	return errors.Join(problems...)
}

// named sees to it that fingerprints says which roots are meant. A root that is to go
// may be anything that was ever installed.
func (t *truster) named() error {
	problems := t.check()
	if (len(t.fingerprints) == 0) == (t.root == "") {
		problems = append(problems, errors.New("one of --fingerprint and --root must name the root; a good value: --root ./trust/root_ca.crt"))
	}
	if len(problems) > 0 {
		return oneshot.Usage(errors.Join(problems...))
	}
	if t.root == "" {
		return nil
	}
	certs, err := pemutil.ReadCertificateBundle(t.root)
	if err != nil {
		return fmt.Errorf("reading the root: %w", err)
	}
	for _, cert := range certs {
		t.fingerprints = append(t.fingerprints, x509util.Fingerprint(cert))
	}
	return nil
}

// plan says what would be done to the stores in one state.
func (t *truster) plan(ctx context.Context, log *slog.Logger, fp string, from anchor.Verdict, what string) {
	for _, s := range anchor.Status(ctx, fp, t.kinds...) {
		attrs := []slog.Attr{slog.String("store", s.Store), slog.String("root", fp), slog.String("path", s.Path)}
		switch s.State {
		case from:
			log.LogAttrs(ctx, slog.LevelInfo, what, attrs...)
		case anchor.Absent, anchor.Unknown:
			log.LogAttrs(ctx, slog.LevelInfo, "would skip", append(attrs, slog.String("because", s.Why))...)
		default:
			log.LogAttrs(ctx, slog.LevelInfo, "unchanged", attrs...)
		}
	}
}

func (t *truster) status(ctx context.Context, _ *slog.Logger) error {
	if err := t.named(); err != nil {
		return err
	}
	type report struct {
		Root   string         `json:"root"`
		Stores []anchor.State `json:"stores"`
	}
	var reports []report
	trusted := true
	for _, fp := range t.fingerprints {
		r := report{Root: fp, Stores: anchor.Status(ctx, fp, t.kinds...)}
		present := slices.DeleteFunc(slices.Clone(r.Stores), func(s anchor.State) bool { return s.State == anchor.Absent })
		trusted = trusted && len(present) > 0 && !slices.ContainsFunc(present, func(s anchor.State) bool { return s.State != anchor.Trusted })
		reports = append(reports, r)
	}
	if t.json {
		out := json.NewEncoder(os.Stdout)
		out.SetIndent("", "  ")
		if err := out.Encode(reports); err != nil {
			return fmt.Errorf("printing the status: %w", err)
		}
	} else {
		w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		for _, r := range reports {
			_, _ = fmt.Fprintf(w, "root %s\n", r.Root) // Flush tells
			for _, s := range r.Stores {
				_, _ = fmt.Fprintf(w, "  %s\t%s\t%s\n", s.Store, s.State, cmp.Or(strings.Join(slices.DeleteFunc([]string{s.Path, s.Why, s.Hint}, func(s string) bool { return s == "" }), "; "), "-"))
			}
		}
		if err := w.Flush(); err != nil {
			return fmt.Errorf("printing the status: %w", err)
		}
	}
	if !trusted {
		return oneshot.WithHint(errors.New("not every trust store of this machine trusts the root"), `"pkictl trust install" installs it`)
	}
	return nil
}
