// Package config turns the environment into checked settings.
//
// Every program asks a Reader for the parts that it needs and then for Err, which
// tells all problems at once: one line each, with the setting's name and an
// example of a good value. Empty counts as missing, as Compose passes an unset
// variable as an empty one. Values of secrets are never part of a message.
package config

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/kelseyhightower/envconfig"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// RuntimeRole is the database role that step-ca logs in as. It owns nothing.
const RuntimeRole = "stepca"

// ReportsRole is the database role that may read, and not the keys of ACME accounts to be.
const ReportsRole = "reports"

// environment holds the plain settings as they were written. They are all
// strings: envconfig stops at the first value that it cannot parse and prints it
// (kelseyhightower/envconfig v1.4.0), so parsing is done here.
type environment struct {
	PKIName              string `envconfig:"PKI_NAME" default:"Internal CA"`
	Domain               string `envconfig:"DOMAIN_CA"`
	DNSNames             string `envconfig:"PKI_DNS_NAMES"`
	Port                 string `envconfig:"CA_PORT" default:"9000"`
	AllowedIPs           string `envconfig:"ALLOWED_IPS"`
	BalancerIPs          string `envconfig:"PROXY_PROTOCOL_FROM"`
	EdgeMaxConnections   string `envconfig:"EDGE_MAX_CONNECTIONS" default:"7000"`
	EdgeMaxPerAddress    string `envconfig:"EDGE_MAX_PER_ADDRESS" default:"5000"`
	EdgeRatePerAddress   string `envconfig:"EDGE_RATE_PER_ADDRESS" default:"2000"`
	EdgeSubnet           string `envconfig:"EDGE_SUBNET" default:"172.28.100.0/24"`
	EdgeSubnet6          string `envconfig:"EDGE_SUBNET6"`
	EnableACME           string `envconfig:"ENABLE_ACME" default:"true"`
	ACMEChallenges       string `envconfig:"ACME_CHALLENGES" default:"http-01,dns-01,tls-alpn-01"`
	ACMERequireEAB       string `envconfig:"ACME_REQUIRE_EAB" default:"false"`
	EnableSSH            string `envconfig:"ENABLE_SSH_PROVISIONER" default:"true"`
	SSHUserMin           string `envconfig:"SSH_USER_MIN_LIFETIME" default:"5m"`
	SSHUserDefault       string `envconfig:"SSH_USER_DEFAULT_LIFETIME" default:"16h"`
	SSHUserMax           string `envconfig:"SSH_USER_MAX_LIFETIME" default:"24h"`
	SSHHostMin           string `envconfig:"SSH_HOST_MIN_LIFETIME" default:"5m"`
	SSHHostDefault       string `envconfig:"SSH_HOST_DEFAULT_LIFETIME" default:"720h"`
	SSHHostMax           string `envconfig:"SSH_HOST_MAX_LIFETIME" default:"720h"`
	EnableK8s            string `envconfig:"ENABLE_K8S_PROVISIONER" default:"false"`
	OIDCName             string `envconfig:"OIDC_NAME" default:"sso"`
	OIDCClientID         string `envconfig:"OIDC_CLIENT_ID"`
	OIDCEndpoint         string `envconfig:"OIDC_ENDPOINT"`
	OIDCDomain           string `envconfig:"OIDC_DOMAIN"`
	OIDCGroups           string `envconfig:"OIDC_GROUPS"`
	OIDCAdmins           string `envconfig:"OIDC_ADMINS"`
	OIDCScopes           string `envconfig:"OIDC_SCOPES"`
	OIDCListenAddress    string `envconfig:"OIDC_LISTEN_ADDRESS"`
	OIDCTenantID         string `envconfig:"OIDC_TENANT_ID"`
	PolicyDNS            string `envconfig:"POLICY_DNS"`
	PolicyIPs            string `envconfig:"POLICY_IPS"`
	PolicyEmails         string `envconfig:"POLICY_EMAILS"`
	PolicyWildcards      string `envconfig:"POLICY_WILDCARDS" default:"false"`
	Organization         string `envconfig:"TLS_ORGANIZATION"`
	RevocationPort       string `envconfig:"REVOCATION_PORT"`
	RootLifetime         string `envconfig:"ROOT_LIFETIME" default:"87600h"`
	IntermediateLifetime string `envconfig:"INTERMEDIATE_LIFETIME" default:"26280h"`
	TLSMin               string `envconfig:"TLS_MIN_LIFETIME" default:"5m"`
	TLSDefault           string `envconfig:"TLS_DEFAULT_LIFETIME" default:"24h"`
	TLSMax               string `envconfig:"TLS_MAX_LIFETIME" default:"720h"`
	PostgresHost         string `envconfig:"POSTGRES_HOST" default:"postgres"`
	PostgresPort         string `envconfig:"POSTGRES_PORT" default:"5432"`
	PoolerHost           string `envconfig:"PGBOUNCER_HOST" default:"pgbouncer"`
	PoolerPort           string `envconfig:"PGBOUNCER_PORT" default:"6432"`
	PoolSize             string `envconfig:"DB_POOL_SIZE" default:"40"`
	MaxClients           string `envconfig:"DB_MAX_CLIENTS" default:"4000"`
	Replicas             string `envconfig:"STEP_CA_REPLICAS" default:"2"`
	Profiles             string `envconfig:"COMPOSE_PROFILES"`
	PostgresSSLMode      string `envconfig:"POSTGRES_SSLMODE" default:"disable"`
	PostgresDB           string `envconfig:"POSTGRES_DB"`
	PostgresUser         string `envconfig:"POSTGRES_USER"`
	BackupRecipients     string `envconfig:"BACKUP_RECIPIENTS"`
	JournalDir           string `envconfig:"JOURNAL_DIR"`
	JournalInterval      string `envconfig:"JOURNAL_INTERVAL" default:"1m"`
	LogFormat            string `envconfig:"LOG_FORMAT" default:"text"`
}

// Reader reads settings and remembers every problem that it meets.
type Reader struct {
	env      environment
	problems []error
	warnings []string
	secrets  map[string]Secret
}

// NewReader reads the process environment.
func NewReader() *Reader {
	r := &Reader{secrets: map[string]Secret{}}
	for _, name := range Names() {
		if os.Getenv(name) == "" {
			// envconfig applies a default to an unset variable only.
			_ = os.Unsetenv(name) // fails on an invalid name alone
		}
	}
	if err := envconfig.Process("", &r.env); err != nil {
		r.problems = append(r.problems, fmt.Errorf("reading the environment: %w", err))
	}
	if r.env.LogFormat != "text" && r.env.LogFormat != "json" {
		r.problem("LOG_FORMAT", "text", "is neither text nor json: %q", r.env.LogFormat)
	}
	return r
}

// Names lists the plain settings, in the order of their declaration.
func Names() []string {
	t := reflect.TypeFor[environment]()
	names := make([]string, 0, t.NumField())
	for i := range t.NumField() {
		names = append(names, t.Field(i).Tag.Get("envconfig"))
	}
	return names
}

// Err returns all problems met so far, with exit code 2, or nil.
func (r *Reader) Err() error {
	if len(r.problems) == 0 {
		return nil
	}
	return oneshot.WithHint(oneshot.WithExitCode(errors.Join(r.problems...), oneshot.ExitMisconfigured),
		"correct .env, or the file that is named; nothing was changed, and \"make check\" tests it without starting anything")
}

// Warnings are settings that are allowed and probably not meant.
func (r *Reader) Warnings() []string { return r.warnings }

// problem records what is wrong with a setting. example is a good value.
func (r *Reader) problem(setting, example, format string, args ...any) {
	r.problems = append(r.problems,
		fmt.Errorf("%s %s; a good value: %s", setting, fmt.Sprintf(format, args...), example))
}

// Join records problems that were found elsewhere, in files that belong to the settings.
func (r *Reader) Join(problems ...error) { r.problems = append(r.problems, problems...) }

func (r *Reader) warn(format string, args ...any) {
	r.warnings = append(r.warnings, fmt.Sprintf(format, args...))
}

func (r *Reader) duration(setting, value, example string) time.Duration {
	d, err := time.ParseDuration(value)
	if err != nil || d <= 0 {
		r.problem(setting, example, "is not a length of time: %q (units are h, m and s)", value)
		return 0
	}
	return d
}

func (r *Reader) boolean(setting, value string) bool {
	switch strings.ToLower(value) {
	case "true":
		return true
	case "false":
		return false
	}
	r.problem(setting, "true", "is neither true nor false: %q", value)
	return false
}

// number reads a whole number between least and most.
func (r *Reader) number(setting, value, example string, least, most int) int {
	n, err := strconv.Atoi(value)
	if err != nil || n < least || n > most {
		r.problem(setting, example, "is not a whole number from %d to %d: %q", least, most, value)
		return 0
	}
	return n
}

func (r *Reader) port(setting, value, example string) uint16 {
	n, err := strconv.ParseUint(value, 10, 16)
	if err != nil || n == 0 {
		r.problem(setting, example, "is not a TCP port: %q", value)
	}
	return uint16(n)
}
