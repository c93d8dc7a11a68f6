// Package caconfig renders step-ca's configuration through step-ca's own types,
// of the same version as the image.
package caconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"time"

	authority "github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/policy"
	"github.com/smallstep/certificates/authority/provisioner"
	_ "github.com/smallstep/certificates/cas/softcas" // what Validate looks for; keys in files are the default
	"github.com/smallstep/certificates/db"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/pki"
)

// Settings are what ca.json follows from, beside the keys.
type Settings struct {
	config.Issuance
	Provisioners provisioner.List
}

// Render returns ca.json: bytes that are the same for the same arguments.
func Render(s Settings, store pki.Store, dsn string) ([]byte, error) {
	return finish(configuration(s, store, dsn))
}

// CRLAddress is where the CRL service answers in clear, within the network of the CA.
const CRLAddress = ":9001"

// RenderCRL returns crl.json, the configuration of the one step-ca that writes the
// CRL. It differs in that alone: several writers would overwrite each other's CRL
// (smallstep/certificates v0.30.2, authority/tls.go, GenerateCertificateRevocationList).
func RenderCRL(s Settings, store pki.Store, dsn string) ([]byte, error) {
	c := configuration(s, store, dsn)
	c.DNSNames = append(slices.Clone(c.DNSNames), "crl", config.CRLPrefix+s.CA.Domain)
	c.InsecureAddress = CRLAddress
	c.CRL = &authority.CRLConfig{
		Enabled: true, GenerateOnRevoke: true,
		// What is revoked through another replica is on the list at the next renewal;
		// a relying party may go on with a list for a day if this service is away.
		RenewPeriod: duration(time.Minute), CacheDuration: duration(24 * time.Hour),
		IDPurl: s.CA.RevocationURL("crl"),
	}
	return finish(c)
}

// MetricsAddress is where step-ca answers Prometheus, within the network of the CA.
const MetricsAddress = ":9090"

func finish(c *authority.Config) ([]byte, error) {
	data, err := encode(c)
	if err != nil {
		return nil, err
	}
	return data, verify(data)
}

func configuration(s Settings, store pki.Store, dsn string) *authority.Config {
	var metrics string
	if s.CA.Metrics {
		metrics = MetricsAddress
	}
	return &authority.Config{
		MetricsAddress:   metrics,
		Root:             []string{store.RootPath()},
		IntermediateCert: store.IntermediatePath(),
		IntermediateKey:  store.IntermediateKeyPath(),
		Address:          ":9000",
		DNSNames:         s.CA.Names,
		CommonName:       s.CA.Name + " step-ca",
		SSH:              &authority.SSHConfig{HostKey: store.SSHHostKeyPath(), UserKey: store.SSHUserKeyPath()},
		Logger:           json.RawMessage(`{"format":"json"}`),
		DB:               &db.Config{Type: "postgresql", DataSource: dsn},
		TLS:              &authority.DefaultTLSOptions,
		AuthorityConfig: &authority.AuthConfig{
			Provisioners: s.Provisioners,
			Claims: &provisioner.Claims{
				MinTLSDur: duration(s.CA.TLS.Min), DefaultTLSDur: duration(s.CA.TLS.Default), MaxTLSDur: duration(s.CA.TLS.Max),
				MinUserSSHDur: duration(s.SSH.User.Min), DefaultUserSSHDur: duration(s.SSH.User.Default), MaxUserSSHDur: duration(s.SSH.User.Max),
				MinHostSSHDur: duration(s.SSH.Host.Min), DefaultHostSSHDur: duration(s.SSH.Host.Default), MaxHostSSHDur: duration(s.SSH.Host.Max),
			},
			Policy: namePolicy(s),
			// A token that was made before this replica started is as good as any
			// other: the database, not the start time, keeps it from being used twice
			// (smallstep/certificates v0.30.2, authority/authorize.go).
			DisableIssuedAtCheck: true,
			// The list of SSH hosts is nobody's business but the CA's.
			DisableGetSSHHosts: true,
		},
	}
}

func duration(d time.Duration) *provisioner.Duration { return &provisioner.Duration{Duration: d} }

// nobody is a name that no request can have (RFC 6761 section 6.4).
const nobody = "nobody.invalid"

// namePolicy turns POLICY_* into step-ca's own. There, as soon as one kind of name is
// allowed, those of every other kind are refused; what OIDC puts into a person's
// certificate is therefore allowed along with it.
func namePolicy(s Settings) *policy.Options {
	if !s.Policy.Restricts() {
		return nil // wildcards are refused by the templates then: without a name, step-ca has no policy at all
	}
	allow := &policy.X509NameOptions{DNSDomains: s.Policy.DNS, EmailAddresses: s.Policy.Emails}
	host := &policy.SSHNameOptions{DNSDomains: s.Policy.DNS}
	for _, prefix := range s.Policy.IPs {
		allow.IPRanges = append(allow.IPRanges, prefix.String())
		host.IPRanges = append(host.IPRanges, prefix.String())
	}
	if !host.HasNames() {
		host.DNSDomains = []string{nobody}
	}
	if s.OIDC.Enabled() {
		for _, domain := range s.OIDC.Domains {
			allow.EmailAddresses = append(allow.EmailAddresses, "@"+domain)
		}
	}
	for _, p := range s.Provisioners {
		if o, ok := p.(*provisioner.OIDC); ok {
			// The issuer with the person's id stands in their certificate as a URI; it is
			// what the discovery document is found under (OpenID Connect Discovery 1.0, section 4).
			if u, err := url.Parse(o.ConfigurationEndpoint); err == nil && !slices.Contains(allow.URIDomains, u.Hostname()) {
				allow.URIDomains = append(allow.URIDomains, u.Hostname())
			}
		}
	}
	return &policy.Options{
		X509: &policy.X509PolicyOptions{AllowedNames: allow, AllowWildcardNames: s.Policy.Wildcards},
		SSH: &policy.SSHPolicyOptions{
			Host: &policy.SSHHostCertificateOptions{AllowedNames: host},
			// A policy for hosts alone would refuse every person.
			User: &policy.SSHUserCertificateOptions{DeniedNames: &policy.SSHNameOptions{Principals: []string{nobody}}},
		},
	}
}

// Provisioner is one of ca.json, as it stands there.
type Provisioner struct {
	Name string
	JSON string // compact
}

// Provisioners returns those of the ca.json at path; there are none if there is no such file.
func Provisioners(path string) ([]Provisioner, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading ca.json: %w", err)
	}
	return ReadProvisioners(data)
}

// ReadProvisioners returns those of a ca.json.
func ReadProvisioners(data []byte) ([]Provisioner, error) {
	var c struct {
		Authority struct {
			Provisioners []json.RawMessage `json:"provisioners"`
		} `json:"authority"`
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("reading ca.json: %w", err)
	}
	var list []Provisioner
	for _, raw := range c.Authority.Provisioners {
		var p Provisioner
		var compact bytes.Buffer
		if err := errors.Join(json.Unmarshal(raw, &p), json.Compact(&compact, raw)); err != nil {
			return nil, fmt.Errorf("reading ca.json: %w", err)
		}
		p.JSON = compact.String()
		list = append(list, p)
	}
	return list, nil
}

// verify reads data as step-ca will. step-ca drops in silence a provisioner of a
// type that it does not know and every key that it does not know, so what it
// understood is written out again and has to be the same.
func verify(data []byte) error {
	var c authority.Config
	if err := json.Unmarshal(data, &c); err != nil {
		return fmt.Errorf("reading ca.json back: %w", err)
	}
	again, err := encode(&c)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, data) {
		return errors.New("reading ca.json back: step-ca would not understand all of it")
	}
	c.Init()
	if err := c.Validate(); err != nil {
		return fmt.Errorf("reading ca.json back: %w", err)
	}
	if _, err := policy.New(c.AuthorityConfig.Policy); err != nil { // at its start step-ca ends with it
		return fmt.Errorf("reading the policy of ca.json back: %w", err)
	}
	return nil
}

func encode(c *authority.Config) ([]byte, error) {
	data, err := json.MarshalIndent(c, "", "  ") //nolint:gosec // G117: step-ca's type has a field for a password, which stays empty
	if err != nil {
		return nil, fmt.Errorf("encoding ca.json: %w", err)
	}
	return append(data, '\n'), nil
}

// Defaults returns defaults.json, which the step CLI inside the CA's container
// reads, its health check among others.
func Defaults(store pki.Store, fingerprint string) ([]byte, error) {
	data, err := json.MarshalIndent(struct {
		CAURL       string `json:"ca-url"`
		Fingerprint string `json:"fingerprint"`
		Root        string `json:"root"`
	}{"https://localhost:9000", fingerprint, store.RootPath()}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encoding defaults.json: %w", err)
	}
	return append(data, '\n'), nil
}
