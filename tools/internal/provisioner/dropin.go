package provisioner

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	authority "github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

// The types that step-ca v0.30.2 knows, by their name in lower case, as it compares
// them (authority/provisioner/provisioner.go).
var types = map[string]func() provisioner.Interface{
	"acme":   func() provisioner.Interface { return &provisioner.ACME{} },
	"aws":    func() provisioner.Interface { return &provisioner.AWS{} },
	"azure":  func() provisioner.Interface { return &provisioner.Azure{} },
	"gcp":    func() provisioner.Interface { return &provisioner.GCP{} },
	"jwk":    func() provisioner.Interface { return &provisioner.JWK{} },
	"k8ssa":  func() provisioner.Interface { return &provisioner.K8sSA{} },
	"nebula": func() provisioner.Interface { return &provisioner.Nebula{} },
	"oidc":   func() provisioner.Interface { return &provisioner.OIDC{} },
	"scep":   func() provisioner.Interface { return &provisioner.SCEP{} },
	"sshpop": func() provisioner.Interface { return &provisioner.SSHPOP{} },
	"x5c":    func() provisioner.Interface { return &provisioner.X5C{} },
}

func typeNames() []string {
	var names []string
	for _, make := range types {
		names = append(names, make().GetType().String())
	}
	slices.Sort(names)
	return names
}

// readDropIns reads the *.json files in the order of their names.
func (r *reader) readDropIns() {
	entries, err := os.ReadDir(r.dropins)
	if err != nil {
		r.problem(filepath.Base(r.dropins), "cannot be read: %w", cause(err))
		return
	}
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".json" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		path := filepath.Join(r.dropins, e.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			r.problem(short(path), "cannot be read: %w", cause(err))
			continue
		}
		r.dropIn(short(path), data)
	}
}

// dropIn checks one file and adds its provisioner.
func (r *reader) dropIn(file string, data []byte) {
	if err := syntax(data); err != nil {
		r.problem(file, "%w", err)
		return
	}
	var head struct {
		Type string `json:"type"`
		Name string `json:"name"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		r.problem(file, "is not one provisioner: a JSON object with the strings type and name")
		return
	}
	before := len(r.problems)
	switch {
	case head.Name == "":
		r.problem(file, `has no name; a good value: "name": "partner"`)
	case !config.ProvisionerName(head.Name):
		r.problem(file, `has the name %q, which is not of letters, digits, dots, dashes and underscores; a good value: "partner"`, head.Name)
	}
	make, ok := types[strings.ToLower(head.Type)]
	if !ok {
		r.problem(file, "has the type %q, which step-ca does not know%s; it knows %s", head.Type, suggestion(head.Type, typeNames()), joined(typeNames()))
		return
	}
	p := make()
	for _, err := range strict(data, reflect.TypeOf(p), func(field string, value []byte) error { return checkBytes(p, field, value) }) {
		r.problem(file, "%w", err)
	}
	if len(r.problems) > before {
		return
	}
	if err := json.Unmarshal(data, p); err != nil {
		r.problem(file, "%w", mismatch(err))
		return
	}
	r.checkDropIn(file, p)
	if len(r.problems) > before {
		return
	}
	r.add(p, file)
}

// checkBytes looks into PEM that was in base64.
func checkBytes(p provisioner.Interface, field string, value []byte) error {
	switch field {
	case "publicKeys":
		return publicKeys(value)
	case "roots", "attestationRoots", "decrypterCertificate":
		if _, nebula := p.(*provisioner.Nebula); !nebula { // its own format, which its Init reads
			return certificates(value)
		}
	}
	_, err := blocks(value)
	return err
}

// parts are the fields that most types have.
func parts(p provisioner.Interface) (*provisioner.Claims, *provisioner.Options) {
	switch p := p.(type) {
	case *provisioner.ACME:
		return p.Claims, p.Options
	case *provisioner.AWS:
		return p.Claims, p.Options
	case *provisioner.Azure:
		return p.Claims, p.Options
	case *provisioner.GCP:
		return p.Claims, p.Options
	case *provisioner.JWK:
		return p.Claims, p.Options
	case *provisioner.K8sSA:
		return p.Claims, p.Options
	case *provisioner.Nebula:
		return p.Claims, p.Options
	case *provisioner.OIDC:
		return p.Claims, p.Options
	case *provisioner.SCEP:
		return p.Claims, p.Options
	case *provisioner.SSHPOP:
		return p.Claims, nil
	case *provisioner.X5C:
		return p.Claims, p.Options
	}
	return nil, nil
}

func (r *reader) checkDropIn(file string, p provisioner.Interface) {
	claims, options := parts(p)
	ok := r.checkClaims(file, claims)
	for i, wh := range options.GetWebhooks() {
		ok = r.checkWebhook(file, i, wh, p) && ok
	}
	if err := demands(p); err != nil {
		r.problem(file, "%w", err)
		ok = false
	}
	if ok {
		if err := r.initialise(p, claims, options); err != nil {
			r.problem(file, "would be refused by step-ca: %w", err)
		}
	}
	if options == nil {
		return
	}
	u := useOf(p)
	enriched := slices.ContainsFunc(options.GetWebhooks(), func(wh *provisioner.Webhook) bool {
		return wh != nil && strings.EqualFold(wh.Kind, "ENRICHING")
	})
	if enriched {
		u = forEnriched
	}
	values := map[string]any{}
	if oidc, ok := p.(*provisioner.OIDC); ok {
		values = peopleValues(oidc)
	}
	if o := options.X509; o != nil && r.inline(file, "x509", &o.Template, &o.TemplateFile, &o.TemplateData, r.values(values)) {
		r.checkX509(templateSource(file, "x509"), o, u)
	}
	if o := options.SSH; o != nil && r.inline(file, "ssh", &o.Template, &o.TemplateFile, &o.TemplateData, values) {
		r.checkSSH(templateSource(file, "ssh"), o, u)
	}
}

func templateSource(file, kind string) string { return fmt.Sprintf("%s (options.%s)", file, kind) }

// What step-ca itself puts into a template's values; templateData would replace what
// it has authenticated (authority/provisioner/options.go).
var reserved = []string{
	"Subject", "SANs", "Token", "Insecure", "AuthorizationCrt", "AuthorizationChain", "Webhooks",
	"Type", "KeyID", "Principals", "Extensions", "CriticalOptions",
}

// inline puts the text of templateFile into template and the values that are not
// given into templateData. It says whether there is a template to check.
func (r *reader) inline(file, kind string, text, name *string, data *json.RawMessage, values map[string]any) bool {
	var given map[string]any
	if len(*data) > 0 {
		if err := json.Unmarshal(*data, &given); err != nil {
			r.problem(file, "has something in %q that is not an object", "options."+kind+".templateData")
			return false
		}
		for _, key := range reserved {
			if _, ok := given[key]; ok {
				r.problem(file, "sets %q, which step-ca fills with what it has authenticated", "options."+kind+".templateData."+key)
				return false
			}
		}
	}
	switch {
	case *text != "" && *name != "":
		r.problem(file, "has both template and templateFile in %q, of which step-ca would take the first", "options."+kind)
		return false
	case *name != "":
		if *name != filepath.Base(*name) {
			r.problem(file, `has %q as %q, which is not the name of a file in %s; a good value: "tls-leaf.tpl"`,
				*name, "options."+kind+".templateFile", filepath.Base(r.templates))
			return false
		}
		content, ok := r.template(*name)
		if !ok {
			return false
		}
		*text, *name = content, ""
	case *text == "":
		return false
	}
	maps.Copy(values, given)
	*data = templateData(values)
	return true
}

// checkClaims compares lifetimes after they are merged with those of the settings, as
// step-ca does for TLS alone (authority/provisioner/claims.go).
func (r *reader) checkClaims(file string, claims *provisioner.Claims) bool {
	if claims == nil {
		return true
	}
	claimer, _ := provisioner.NewClaimer(claims, r.claims()) // its verdict is on TLS alone, and of one problem
	all := claimer.Claims()
	ok := true
	for _, c := range []struct {
		kind                    string
		minimum, byDefault, max *provisioner.Duration
	}{
		{"TLS", all.MinTLSDur, all.DefaultTLSDur, all.MaxTLSDur},
		{"UserSSH", all.MinUserSSHDur, all.DefaultUserSSHDur, all.MaxUserSSHDur},
		{"HostSSH", all.MinHostSSHDur, all.DefaultHostSSHDur, all.MaxHostSSHDur},
	} {
		if lo, d, hi := c.minimum.Duration, c.byDefault.Duration, c.max.Duration; lo <= 0 || lo > d || d > hi {
			r.problem(file, "has claims by which min%[1]sCertDuration <= default%[1]sCertDuration <= max%[1]sCertDuration is not true: %[2]s, %[3]s, %[4]s (what is not given comes from the settings)",
				c.kind, lo, d, hi)
			ok = false
		}
	}
	if life := r.settings.CA.IntermediateLifetime; life > 0 && all.MaxTLSDur.Duration > life {
		r.problem(file, "has a maxTLSCertDuration longer than INTERMEDIATE_LIFETIME (%s > %s)", all.MaxTLSDur.Duration, life)
		ok = false
	}
	return ok
}

// claims are those of the settings over step-ca's own.
func (r *reader) claims() provisioner.Claims {
	c := authority.GlobalProvisionerClaims
	set := func(l config.Lifetimes, minimum, byDefault, maximum **provisioner.Duration) {
		if l.Min <= 0 || l.Min > l.Default || l.Default > l.Max {
			return // a problem of the settings, which they tell themselves
		}
		duration := func(d time.Duration) *provisioner.Duration { return &provisioner.Duration{Duration: d} }
		*minimum, *byDefault, *maximum = duration(l.Min), duration(l.Default), duration(l.Max)
	}
	set(r.settings.CA.TLS, &c.MinTLSDur, &c.DefaultTLSDur, &c.MaxTLSDur)
	set(r.settings.SSH.User, &c.MinUserSSHDur, &c.DefaultUserSSHDur, &c.MaxUserSSHDur)
	set(r.settings.SSH.Host, &c.MinHostSSHDur, &c.DefaultHostSSHDur, &c.MaxHostSSHDur)
	return c
}

// checkWebhook finds too what step-ca would let pass and then never call: an
// authorizing webhook that is not called authorizes everything.
func (r *reader) checkWebhook(file string, i int, wh *provisioner.Webhook, p provisioner.Interface) bool {
	field := fmt.Sprintf("options.webhooks[%d]", i)
	if wh == nil {
		r.problem(file, "has nothing in %q", field)
		return false
	}
	checked := *wh // Validate changes it
	if err := checked.Validate(); err != nil {
		r.problem(file, `has in %q what step-ca refuses: %w; a good value: {"name": "hosts", "url": "https://hosts.internal/check", "kind": "AUTHORIZING"}`, field, err)
		return false
	}
	if !slices.Contains([]string{"", "ALL", "X509", "SSH"}, wh.CertType) {
		r.problem(file, "has the certType %q in %q, which is none of ALL, X509 and SSH: step-ca would never call it", wh.CertType, field)
		return false
	}
	if _, scep := p.(*provisioner.SCEP); !scep && checked.Kind != "AUTHORIZING" && checked.Kind != "ENRICHING" {
		r.problem(file, "has the kind %q in %q, which step-ca calls for SCEP alone", wh.Kind, field)
		return false
	}
	return true
}

// initialise lets step-ca's own code judge p, or a copy of it where that would change it
// or need the network or files of step-ca's container.
func (r *reader) initialise(p provisioner.Interface, claims *provisioner.Claims, options *provisioner.Options) error {
	cfg := provisioner.Config{Claims: r.claims(), SSHKeys: &provisioner.SSHKeys{}}
	switch p := p.(type) {
	case *provisioner.OIDC, *provisioner.GCP, *provisioner.Azure: // their Init asks the provider for its keys
		_, err := provisioner.NewController(p, claims, cfg, options)
		return err
	case *provisioner.JWK:
		return again(p).Init(cfg)
	case *provisioner.ACME:
		return again(p).Init(cfg)
	case *provisioner.AWS:
		c := again(p)
		c.IIDRoots = "" // a file in step-ca's container
		return c.Init(cfg)
	case *provisioner.SCEP:
		c := again(p)
		c.DecrypterKeyURI = "" // of a key management system that step-ca reaches
		return c.Init(cfg)
	case *provisioner.X5C:
		return again(p).Init(cfg)
	case *provisioner.Nebula:
		return again(p).Init(cfg)
	case *provisioner.K8sSA:
		return again(p).Init(cfg)
	case *provisioner.SSHPOP:
		return again(p).Init(cfg)
	}
	return nil
}

// again is a copy that Init may change. Exported fields are all that a drop-in sets.
func again[T any](p *T) *T {
	c := *p
	return &c
}

// demands is what this stack asks for beyond step-ca: above all that a provisioner
// is not for everybody in the world.
func demands(p provisioner.Interface) error {
	switch p := p.(type) {
	case *provisioner.AWS:
		if len(p.Accounts) == 0 {
			return errors.New("has no accounts: every instance of every customer of AWS could get certificates")
		}
	case *provisioner.GCP:
		switch {
		case len(p.ProjectIDs) == 0 && p.OrganizationID == "" && len(p.ServiceAccounts) == 0:
			return errors.New("has neither projectIDs nor organizationID nor serviceAccounts: every instance of every customer of GCP could get certificates")
		case len(p.ProjectIDs) > 0 && p.OrganizationID != "":
			return errors.New("has both projectIDs and organizationID, which exclude each other")
		}
	case *provisioner.Azure:
		if p.TenantID == "" {
			return errors.New("has no tenantID")
		}
	case *provisioner.OIDC:
		u, err := url.Parse(p.ConfigurationEndpoint)
		switch {
		case p.ClientID == "":
			return errors.New("has no clientID")
		case err != nil || u.Scheme != "https" || u.Host == "":
			return errors.New(`has no https address as configurationEndpoint; a good value: "https://sso.internal/.well-known/openid-configuration"`)
		case len(p.Domains) == 0 && len(p.Groups) == 0:
			return errors.New("has neither domains nor groups: everybody with an account at the provider could get certificates")
		// step-ca's own templates take an address that nobody has verified, and its "domains"
		// let in whoever leaves out the scope email (authority/provisioner/oidc.go, ValidatePayload).
		case !p.Options.GetX509Options().HasTemplate():
			return errors.New(`has no options.x509 template: step-ca's own takes addresses that nobody has verified; a good value: {"templateFile": "tls-oidc.tpl"}`)
		case p.Claims != nil && p.Claims.EnableSSHCA != nil && *p.Claims.EnableSSHCA && !p.Options.GetSSHOptions().HasTemplate():
			return errors.New(`has no options.ssh template: step-ca's own takes addresses that nobody has verified; a good value: {"templateFile": "ssh-user.tpl"}`)
		}
	case *provisioner.JWK:
		switch {
		case p.Key == nil:
			return errors.New("has no key")
		case !p.Key.Valid() || !p.Key.IsPublic():
			return errors.New("has a key that is not a public JWK: step-ca shows it to everybody")
		case p.Key.KeyID == "":
			return errors.New("has a key without kid, by which tokens name it")
		}
	case *provisioner.SCEP:
		webhook := slices.ContainsFunc(p.Options.GetWebhooks(), func(wh *provisioner.Webhook) bool {
			return wh != nil && strings.EqualFold(wh.Kind, "SCEPCHALLENGE")
		})
		switch {
		case p.ChallengePassword == "" && !webhook:
			return errors.New("has neither a challenge nor a webhook of the kind SCEPCHALLENGE: everybody could get certificates")
		case p.DecrypterKeyPEM == nil && p.DecrypterKeyURI == "":
			return errors.New("has no decrypterKeyPEM: SCEP needs an RSA key, with its decrypterCertificate, and the intermediate's is ECDSA")
		}
	}
	return nil
}

func useOf(p provisioner.Interface) use {
	switch p.(type) {
	case *provisioner.ACME:
		return forACME
	case *provisioner.X5C, *provisioner.Nebula:
		return forCertified
	case *provisioner.OIDC:
		return forPerson
	case *provisioner.K8sSA:
		return forRequest
	case *provisioner.AWS, *provisioner.GCP, *provisioner.Azure:
		return forInstance
	}
	return forLeaf
}
