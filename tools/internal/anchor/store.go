package anchor

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"slices"
	"strings"

	"github.com/smallstep/truststore"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// Kinds of trust stores.
const (
	System = "system" // the operating system's: curl, OpenSSL, Go, Python …
	NSS    = "nss"    // Firefox's profiles, and Chromium's database on Linux
	Java   = "java"   // the JVM's cacerts
)

// Kinds are all kinds, in the order in which they are served. The system comes
// first: Debian's tools bring what they have into Java's store by themselves.
var Kinds = []string{System, NSS, Java}

// prefix is of every name that a root gets in a store; the serial number follows. It
// must never change: by it a root is found again.
const prefix = "infra-pki-"

// store is one place on this machine where programs look for trust anchors.
type store interface {
	// where is the path, empty if there is none.
	where() string
	// absent says why the store cannot be used, nil if it can.
	absent() error
	// find looks for a certificate, which is nil if it is not there; trusted says
	// whether programs take it from there.
	find(ctx context.Context, fingerprint string) (cert *x509.Certificate, trusted bool, err error)
	install(ctx context.Context, cert *x509.Certificate) error
	uninstall(ctx context.Context, cert *x509.Certificate) error
}

func stores(kind string) []store {
	switch kind {
	case System:
		return []store{systemStore()}
	case NSS:
		return nssStores()
	}
	return []store{javaStore()}
}

// State is what one store makes of a root.
type State struct {
	Store string  `json:"store"` // its kind
	Path  string  `json:"path,omitempty"`
	State Verdict `json:"state"`
	Why   string  `json:"why,omitempty"`
	Hint  string  `json:"hint,omitempty"`
}

// Verdict is one word on a store.
type Verdict string

// Verdicts.
const (
	Trusted    Verdict = "trusted"
	NotTrusted Verdict = "not trusted"
	Absent     Verdict = "absent"  // or cannot be used
	Unknown    Verdict = "unknown" // it could not be read
)

// Status tells for each store of these kinds, all if none is named, whether it
// trusts the root with a fingerprint (lower hex). It changes nothing.
func Status(ctx context.Context, fingerprint string, kinds ...string) []State {
	var states []State
	each(kinds, func(kind string, s store) {
		state := State{Store: kind, Path: s.where(), State: NotTrusted}
		err := s.absent()
		if err != nil {
			state.State = Absent
		} else {
			var trusted bool
			if _, trusted, err = s.find(ctx, fingerprint); err != nil {
				state.State = Unknown
			} else if trusted {
				state.State = Trusted
			}
		}
		if err != nil {
			state.Why, state.Hint = err.Error(), strings.Join(oneshot.Hints(err), "; ")
		}
		states = append(states, state)
	})
	return states
}

// Install brings root into the stores of these kinds, all if none is named, and
// reads it back. A store that trusts it is left alone; one that is absent is
// skipped, except for the system's, which is what most programs go by. It goes on
// after a failure, and tells all of them.
func Install(ctx context.Context, root *x509.Certificate, log *slog.Logger, kinds ...string) error {
	fp := x509util.Fingerprint(root)
	return converge(ctx, fp, log, kinds, "installed", func(s store, begin func()) (bool, error) {
		_, trusted, err := s.find(ctx, fp)
		if err != nil || trusted {
			return false, err
		}
		begin()
		if err := s.install(ctx, root); err != nil {
			return false, err
		}
		if _, trusted, err = s.find(ctx, fp); err == nil && !trusted {
			err = errors.New("reading it back: every step went well, and the store does not trust the root")
		}
		return true, err
	})
}

// Uninstall takes the root with a fingerprint (lower hex) out of the stores of these
// kinds, all if none is named, and looks that it is gone. It needs neither the CA nor
// the root itself, which may have expired.
func Uninstall(ctx context.Context, fingerprint string, log *slog.Logger, kinds ...string) error {
	return converge(ctx, fingerprint, log, kinds, "uninstalled", func(s store, begin func()) (bool, error) {
		cert, _, err := s.find(ctx, fingerprint)
		if err != nil || cert == nil {
			return false, err
		}
		begin()
		if err := s.uninstall(ctx, cert); err != nil {
			return false, err
		}
		if cert, _, err = s.find(ctx, fingerprint); err == nil && cert != nil {
			err = oneshot.WithHint(errors.New("reading it back: the root is still there, under a name that is not ours"),
				"whoever put it there has to take it away")
		}
		return true, err
	})
}

func converge(ctx context.Context, fp string, log *slog.Logger, kinds []string, done string, act func(s store, begin func()) (changed bool, err error)) error {
	var problems []error
	each(kinds, func(kind string, s store) {
		what := []slog.Attr{slog.String("store", kind), slog.String("root", fp)}
		if s.where() != "" {
			what = append(what, slog.String("path", s.where()))
		}
		if err := ctx.Err(); err != nil {
			problems = append(problems, err)
			return
		}
		if err := s.absent(); err != nil {
			if kind == System && done == "installed" {
				problems = append(problems, fmt.Errorf("%s store: %w", kind, err))
				return
			}
			what = append(what, slog.String("because", err.Error()))
			if hints := oneshot.Hints(err); len(hints) > 0 {
				what = append(what, slog.String("hint", strings.Join(hints, "; ")))
			}
			log.LogAttrs(ctx, slog.LevelInfo, "skipped", what...)
			return
		}
		// A distribution's tool or a Java takes seconds.
		changed, err := act(s, func() { log.LogAttrs(ctx, slog.LevelInfo, "changing", what...) })
		switch {
		case err != nil:
			problems = append(problems, fmt.Errorf("%s store %q: %w", kind, s.where(), err))
		case changed:
			log.LogAttrs(ctx, slog.LevelInfo, done, what...)
		default:
			log.LogAttrs(ctx, slog.LevelInfo, "unchanged", what...)
		}
	})
	return errors.Join(problems...)
}

func each(kinds []string, do func(kind string, s store)) {
	for _, kind := range Kinds {
		if len(kinds) > 0 && !slices.Contains(kinds, kind) {
			continue
		}
		for _, s := range stores(kind) {
			do(kind, s)
		}
	}
}

// nickname is what truststore calls cert, given our prefix.
func nickname(cert *x509.Certificate) string { return prefix + cert.SerialNumber.String() }

// find looks for a certificate in PEM among others, and other text.
func find(data []byte, fingerprint string) (*x509.Certificate, error) {
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if sum := sha256.Sum256(block.Bytes); hex.EncodeToString(sum[:]) == fingerprint {
			return x509.ParseCertificate(block.Bytes)
		}
	}
	return nil, nil
}

// explainCommand puts what a command of truststore's said into its error.
func explainCommand(err error) error {
	var failed *truststore.CmdError
	if errors.As(err, &failed) {
		return said(failed.Cmd(), failed.Err(), failed.Out())
	}
	return err
}

const maxSaid = 500

func said(cmd *exec.Cmd, err error, out []byte) error {
	text := strings.Join(strings.Fields(string(out)), " ")
	if len(text) > maxSaid {
		text = text[:maxSaid] + "…"
	}
	return fmt.Errorf("running %q: %w: %s", strings.Join(cmd.Args, " "), err, text)
}
