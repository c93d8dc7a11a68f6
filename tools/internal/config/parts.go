package config

import (
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Database is where step-ca's state lies.
type Database struct {
	Host       string // of the server
	Port       uint16
	PoolerHost string // of the connection pooler in front of it
	PoolerPort uint16
	SSLMode    string
	Name       string
	Owner      string
}

// Pooler is the database as step-ca reaches it. A connection there is one of the
// server's for the length of a transaction only, so nothing that belongs to a
// session (a lock, say) holds.
func (d Database) Pooler() Database {
	d.Host, d.Port = d.PoolerHost, d.PoolerPort
	return d
}

// A name that needs no quoting in SQL, in a DSN or in a passfile.
var identifier = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,62}$`)

// Database reads POSTGRES_*.
func (r *Reader) Database() Database {
	db := Database{
		Host: r.env.PostgresHost, Port: r.port("POSTGRES_PORT", r.env.PostgresPort, "5432"),
		PoolerHost: r.env.PoolerHost, PoolerPort: r.port("PGBOUNCER_PORT", r.env.PoolerPort, "6432"),
		SSLMode: r.env.PostgresSSLMode, Name: r.env.PostgresDB, Owner: r.env.PostgresUser,
	}
	if !slices.Contains([]string{"disable", "require", "verify-ca", "verify-full"}, db.SSLMode) {
		r.problem("POSTGRES_SSLMODE", "disable", "is none of disable, require, verify-ca and verify-full: %q", db.SSLMode)
	}
	r.identifier("POSTGRES_DB", db.Name, "step_ca_db")
	r.identifier("POSTGRES_USER", db.Owner, "step_ca_owner")
	switch db.Owner {
	case RuntimeRole:
		r.problem("POSTGRES_USER", "step_ca_owner", "is %q, the name of the role that step-ca itself runs as and that must own nothing", RuntimeRole)
	case ReportsRole:
		r.problem("POSTGRES_USER", "step_ca_owner", "is %q, the name of the role that may only read", ReportsRole)
	}
	return db
}

// Sizes is how much there may be of what.
type Sizes struct {
	Replicas int // of step-ca
	Pool     int // connections of the pooler to the server
	Clients  int // and of step-ca, all replicas together, to the pooler
}

// Sizes reads them.
func (r *Reader) Sizes() Sizes {
	sizes := Sizes{
		Replicas: r.number("STEP_CA_REPLICAS", r.env.Replicas, "2", 1, 16),
		// The server has 100 connections (postgres/postgresql.conf); the rest is for
		// backup, migration, reports and an operator.
		Pool:    r.number("DB_POOL_SIZE", r.env.PoolSize, "40", 1, 80),
		Clients: r.number("DB_MAX_CLIENTS", r.env.MaxClients, "4000", 10, 15000),
	}
	if sizes.Clients > 0 && sizes.Pool > sizes.Clients {
		r.problem("DB_POOL_SIZE", "40", "is more than DB_MAX_CLIENTS (%d > %d)", sizes.Pool, sizes.Clients)
	}
	return sizes
}

// Journal checks what a journal needs, if there is to be one, and returns how old a change
// may get before it is written.
func (r *Reader) Journal() time.Duration {
	interval := r.duration("JOURNAL_INTERVAL", r.env.JournalInterval, "1m")
	if interval != 0 && (interval < time.Second || interval > time.Hour) {
		r.problem("JOURNAL_INTERVAL", "1m", "is not from 1s to 1h: %s", interval)
	}
	if r.env.JournalDir != "" && strings.TrimSpace(r.env.BackupRecipients) == "" {
		r.problem("BACKUP_RECIPIENTS", `the public key that "make backup-key" prints`, "is missing, and JOURNAL_DIR asks for a journal, which is encrypted to them")
	}
	return interval
}

func (r *Reader) identifier(setting, value, example string) {
	switch {
	case value == "":
		r.problem(setting, example, "is missing")
	case !identifier.MatchString(value):
		r.problem(setting, example, "is not a lower-case name of letters, digits and underscores: %q", value)
	}
}

// CA is what the certificate authority is called and how long things live.
type CA struct {
	Name                 string   // of the PKI, in the subjects of root and intermediate
	Domain               string   // the public name
	Names                []string // every name of step-ca's own certificate, Domain first
	Port                 uint16   // published
	RootLifetime         time.Duration
	IntermediateLifetime time.Duration
	TLS                  Lifetimes
	Organization         string // in the subjects of leaf TLS certificates, none if empty
	RevocationPort       uint16 // published, for CRL and KRL; zero if there are none
	Metrics              bool   // step-ca counts what it does, for Prometheus
}

// URL is the address of the CA for its clients.
func (c CA) URL() string {
	return "https://" + net.JoinHostPort(c.Domain, strconv.Itoa(int(c.Port)))
}

// RevocationURL is where relying parties find what, "crl" or "krl", empty if nowhere.
// It is plain HTTP, as is usual for CRLs: RFC 5280 section 8 warns of the
// circle that TLS would make.
func (c CA) RevocationURL(what string) string {
	if c.RevocationPort == 0 {
		return ""
	}
	return "http://" + net.JoinHostPort(c.Domain, strconv.Itoa(int(c.RevocationPort))) + "/" + what
}

// CRLPrefix begins the name under which the edge leads to the service that writes the CRL.
const CRLPrefix = "crl."

// The longer of the two common names is "NAME Intermediate CA", and one has at most
// 64 characters (RFC 5280, ub-common-name).
const maxPKIName = 64 - len(" Intermediate CA")

// CA reads the names and lifetimes.
func (r *Reader) CA() CA {
	ca := CA{
		Name:                 r.env.PKIName,
		Domain:               strings.ToLower(r.env.Domain),
		Port:                 r.port("CA_PORT", r.env.Port, "9000"),
		RootLifetime:         r.duration("ROOT_LIFETIME", r.env.RootLifetime, "87600h"),
		IntermediateLifetime: r.duration("INTERMEDIATE_LIFETIME", r.env.IntermediateLifetime, "26280h"),
		TLS:                  r.lifetimes("TLS", r.env.TLSMin, r.env.TLSDefault, r.env.TLSMax, "5m", "24h", "720h"),
		Organization:         r.env.Organization,
		Metrics:              slices.Contains(items(r.env.Profiles), "metrics"),
	}
	if r.env.RevocationPort != "" {
		ca.RevocationPort = r.port("REVOCATION_PORT", r.env.RevocationPort, "9080")
		if ca.RevocationPort == ca.Port {
			r.problem("REVOCATION_PORT", "9080", "is CA_PORT, too")
		}
	}
	switch {
	case !text(ca.Name):
		r.problem("PKI_NAME", "Internal CA", "has a control character, or white space around it")
	case utf8.RuneCountInString(ca.Name) > maxPKIName:
		r.problem("PKI_NAME", "Internal CA", "is longer than %d characters, so that the intermediate's common name would pass 64 (RFC 5280)", maxPKIName)
	}
	switch {
	case !text(ca.Organization):
		r.problem("TLS_ORGANIZATION", "Example Ltd", "has a control character, or white space around it")
	case utf8.RuneCountInString(ca.Organization) > 64:
		r.problem("TLS_ORGANIZATION", "Example Ltd", "is longer than 64 characters (RFC 5280, ub-organization-name)")
	}
	switch {
	case ca.Domain == "":
		r.problem("DOMAIN_CA", "ca.internal", "is missing")
	case ca.Domain == "example.com" || strings.HasSuffix(ca.Domain, ".example.com"):
		r.problem("DOMAIN_CA", "ca.internal", "is still a placeholder: %q", ca.Domain)
	case !HostName(ca.Domain):
		r.problem("DOMAIN_CA", "ca.internal", "is not a host name: %q", ca.Domain)
	}
	// localhost serves the health checks inside the containers, step-ca the other
	// containers, 127.0.0.1 the operator on this machine.
	names := append([]string{ca.Domain, "localhost", "127.0.0.1", "step-ca"}, items(r.env.DNSNames)...)
	for _, name := range names {
		name = strings.ToLower(name)
		if strings.HasPrefix(name, CRLPrefix) {
			r.problem("PKI_DNS_NAMES", "ca.lan,192.0.2.10", "or DOMAIN_CA has a name that begins with %s, which the edge keeps for the CRL: %q", CRLPrefix, name)
		}
		if _, err := netip.ParseAddr(name); err != nil && !HostName(name) && name != ca.Domain {
			r.problem("PKI_DNS_NAMES", "ca.lan,192.0.2.10", "has an item that is neither a host name nor an address: %q", name)
		}
		if !slices.Contains(ca.Names, name) {
			ca.Names = append(ca.Names, name)
		}
	}
	r.order(
		lifetime{"TLS_MAX_LIFETIME", ca.TLS.Max, "720h"}, lifetime{"INTERMEDIATE_LIFETIME", ca.IntermediateLifetime, "26280h"},
		lifetime{"ROOT_LIFETIME", ca.RootLifetime, "87600h"})
	return ca
}

// text can stand in the subject of a certificate.
func text(s string) bool {
	return strings.TrimSpace(s) == s && !strings.ContainsFunc(s, unicode.IsControl) && utf8.ValidString(s)
}

type lifetime struct {
	setting string
	value   time.Duration
	example string
}

// order demands that no lifetime is longer than the next one. step-ca checks the
// first three at its start, and nothing keeps a leaf from outliving its issuer
// (smallstep/certificates#381).
func (r *Reader) order(ls ...lifetime) {
	for i := 1; i < len(ls); i++ {
		shorter, longer := ls[i-1], ls[i]
		if shorter.value > 0 && longer.value > 0 && shorter.value > longer.value {
			r.problem(shorter.setting, shorter.example, "is longer than %s (%s > %s)", longer.setting, shorter.value, longer.value)
		}
	}
}

// Labels as in RFC 1123 section 2.1, with the underscore that Docker allows.
var label = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$`)

// HostName says whether s is one, in lower case.
func HostName(s string) bool {
	if len(s) > 253 || s == "" {
		return false
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		if !label.MatchString(part) {
			return false
		}
	}
	return true
}

// items splits a list at commas and white space.
func items(s string) []string {
	return slices.Collect(strings.FieldsFuncSeq(s, func(c rune) bool { return c == ',' || unicode.IsSpace(c) }))
}
