package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/durable"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/provisioner"
	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/trustbundle"
)

const (
	minTokenLifetime = 10 * time.Second
	maxTokenLifetime = 24 * time.Hour
)

var token = command{
	summary: "make one-time tokens with which a host can join",
	usage: `usage: pkictl token --name NAME [--name NAME]... [--ssh] [--tls] [flags]

Makes one-time tokens for one host and prints the command that the host's
administrator runs. Each token is good for one certificate, for exactly these names,
and for a quarter of an hour. One token for SSH is enough for all host keys.

  --name NAME         DNS name or address of the host, its own name first; repeatable
  --ssh               a token for SSH host certificates, by the provisioner
                      ssh-host-jwk (this is the default)
  --tls               a token for a TLS certificate, by the provisioner admin; the
                      first label may be a star where POLICY_WILDCARDS allows it
  --lifetime LENGTH   of the tokens, 10s to 24h (default 15m)
  --env-file FILE     write CA_URL, FINGERPRINT and TOKEN to a new file (mode 0600)
                      for "pkictl join --env-file"; - is standard output
  --public-url URL    the CA as the host has to address it (default
                      https://DOMAIN_CA:CA_PORT if they are set, else --ca-url)
  --ca-url URL        address of the CA from here (default https://step-ca:9000)
  --root FILE         the root to trust, PEM (default /home/step/certs/root_ca.crt)

The passwords of the provisioners come from the files that
SSH_HOST_PROVISIONER_PASSWORD_FILE (--ssh) and PROVISIONER_PASSWORD_FILE (--tls) name,
or from the variables without _FILE.

Whoever has a token until it is used or ends can be that host. The command that is
printed shows it to no process list; it does show it to the shell's history.

Examples:
  docker compose run --rm -T pkictl token --name web.lan --name 10.0.0.5
  docker compose run --rm -T pkictl token --name web.lan --ssh --tls --env-file - > web.env
  pkictl token --name web.lan --ca-url https://ca.internal:9000 --root root_ca.crt
`,
	setup: func(fs *flag.FlagSet) work {
		var t tokenMaker
		t.flags(fs, "https://step-ca:9000", "/home/step/certs/root_ca.crt")
		fs.Func("name", "", func(name string) error { t.names = append(t.names, name); return nil })
		fs.BoolVar(&t.ssh, "ssh", false, "")
		fs.BoolVar(&t.tls, "tls", false, "")
		fs.DurationVar(&t.lifetime, "lifetime", 15*time.Minute, "")
		fs.StringVar(&t.envFile, "env-file", "", "")
		fs.StringVar(&t.publicURL, "public-url", "", "")
		return t.run
	},
}

type tokenMaker struct {
	authority
	names     []string
	ssh, tls  bool
	lifetime  time.Duration
	envFile   string
	publicURL string

	sshPassword, tlsPassword config.Secret
}

func (t *tokenMaker) run(ctx context.Context, log *slog.Logger) error {
	if err := t.check(); err != nil {
		return oneshot.Usage(err)
	}
	settings := config.NewReader()
	if t.ssh {
		t.sshPassword = settings.SSHHostPassword()
	}
	if t.tls {
		t.tlsPassword = settings.ProvisionerPassword()
	}
	if err := settings.Err(); err != nil {
		return err
	}
	bundle, err := trustbundle.Read(t.root, time.Now())
	if err != nil {
		return oneshot.WithHint(err, "trust-export publishes the root as root_ca.crt")
	}
	client, err := t.client(ctx, time.Now(), log)
	if err != nil {
		return err
	}
	host := stepca.Host{CAURL: t.publicURL, Fingerprint: x509util.Fingerprint(bundle.Current()), Names: t.names, Lifetime: t.lifetime}
	tokens, err := t.make(ctx, client, host)
	if err != nil {
		return t.explain(err)
	}
	log.LogAttrs(ctx, slog.LevelInfo, "made one-time tokens", slog.Any("names", t.names), slog.Int("tokens", len(tokens)),
		slog.Time("until", time.Now().Add(t.lifetime).UTC().Truncate(time.Second)))
	return t.hand(host, tokens)
}

// check reads what was asked for, all of it.
func (t *tokenMaker) check() error {
	if !t.ssh && !t.tls {
		t.ssh = true
	}
	var problems []error
	if len(t.names) == 0 {
		problems = append(problems, errors.New("--name is missing; a good value: web.lan"))
	}
	for i, name := range t.names {
		switch addr, err := netip.ParseAddr(name); {
		case slices.Contains(t.names[:i], name):
			problems = append(problems, fmt.Errorf("--name: %q is there twice", name))
		case err == nil && (addr.Zone() != "" || addr.String() != name):
			problems = append(problems, fmt.Errorf("--name: %q is an address and has to be written as %q", name, addr.WithZone("")))
		case err == nil, config.HostName(name), !t.ssh && config.HostName(strings.TrimPrefix(name, "*.")):
		case config.HostName(strings.TrimPrefix(name, "*.")):
			problems = append(problems, fmt.Errorf("--name: %q is for TLS only: leave --ssh out", name))
		default:
			problems = append(problems, fmt.Errorf("--name: %q is neither a host name in lower case nor an address; a good value: web.lan", name))
		}
	}
	if t.lifetime < minTokenLifetime || t.lifetime > maxTokenLifetime {
		problems = append(problems, fmt.Errorf("--lifetime: %s is not from %s to 24h; a good value: 15m", t.lifetime, minTokenLifetime))
	}
	if t.publicURL == "" {
		t.publicURL = t.url
		if domain := os.Getenv("DOMAIN_CA"); domain != "" {
			port := os.Getenv("CA_PORT")
			if port == "" {
				port = "9000"
			}
			t.publicURL = "https://" + domain + ":" + port
		}
	}
	t.publicURL = strings.TrimRight(t.publicURL, "/")
	if _, err := stepca.New(t.publicURL); err != nil {
		problems = append(problems, fmt.Errorf("--public-url: %w", err))
	}
	if _, err := os.Lstat(t.envFile); t.envFile != "" && t.envFile != "-" && !errors.Is(err, fs.ErrNotExist) {
		problems = append(problems, fmt.Errorf("--env-file: %q is there already, and is not overwritten", t.envFile))
	}
	return errors.Join(problems...)
}

func (t *tokenMaker) make(ctx context.Context, client *stepca.Client, host stepca.Host) ([]string, error) {
	var tokens []string
	if t.ssh {
		jwk, err := client.JWK(ctx, provisioner.SSHHost, t.sshPassword.Reveal())
		if errors.Is(err, stepca.ErrPassword) {
			return nil, oneshot.WithHint(err, "SSH_HOST_PROVISIONER_PASSWORD must be the password that the provisioner's key was made with")
		}
		if errors.Is(err, stepca.ErrNoProvisioner) {
			return nil, oneshot.WithHint(err, "ENABLE_SSH_PROVISIONER=true brings it")
		}
		if err != nil {
			return nil, err
		}
		token, err := jwk.SSHHostToken(host)
		if err != nil {
			return nil, err
		}
		tokens = append(tokens, token)
	}
	if t.tls {
		jwk, err := client.JWK(ctx, provisioner.Admin, t.tlsPassword.Reveal())
		if err != nil {
			return nil, err
		}
		token, err := jwk.TLSToken(host)
		if err != nil {
			return nil, err
		}
		tokens = append(tokens, token)
	}
	return tokens, nil
}

// hand gives the tokens to whoever asked.
func (t *tokenMaker) hand(host stepca.Host, tokens []string) error {
	if t.envFile == "" {
		// printf is the shell's own, so the token is in no process's arguments.
		fmt.Printf("printf '%%s\\n' '%s' | sudo pkictl join --ca-url %s --fingerprint %s --token -\n",
			strings.Join(tokens, "' '"), host.CAURL, host.Fingerprint)
		return nil
	}
	content := fmt.Sprintf("CA_URL=%s\nFINGERPRINT=%s\nTOKEN='%s'\n", host.CAURL, host.Fingerprint, strings.Join(tokens, " "))
	if t.envFile == "-" {
		fmt.Print(content)
		return nil
	}
	if err := durable.CreateExclusive(t.envFile, []byte(content), 0o600); err != nil {
		return fmt.Errorf("writing the tokens: %w", err)
	}
	fmt.Printf("sudo pkictl join --env-file %s\n", t.envFile)
	return nil
}
