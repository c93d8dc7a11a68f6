package provisioner

import (
	"encoding/json"
	"strings"
	"testing"
)

// Whatever is in a drop-in: there is a provisioner that step-ca reads back, or an error
// that names the file, and no panic.
func FuzzDropIn(f *testing.F) {
	for _, seed := range []string{
		anOIDC, `{"type": "ACME", "name": "x"}`, `{"type": "x5c", "name": "x", "roots": "AAAA"}`, `{"type": "JWK", "name": "x", "key": {"kty": "EC"}}`,
		`{"type": "K8sSA", "name": "x", "publicKeys": "-----BEGIN "}`, `{"type": "SCEP", "name": "x", "claims": {"minTLSCertDuration": "1h"}}`,
		`{"type": "Nebula", "name": "x", "options": {"webhooks": [null]}}`, `[[[[{}]]]]`, `{"type": "AWS", "name": "x", "iidRoots": "/etc/passwd"}`,
		`{"type": "ACME", "name": "x", "options": {"x509": {"template": "{{ range .SANs }}{{ . }}{{ end }}", "templateData": {"a": null}}}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := &reader{settings: everything(), templates: shipped, names: map[string]string{}, tokenIDs: map[string]string{}}
		r.dropIn("provisioners.d/a.json", data)
		if (len(r.declared.list) == 1) == (len(r.problems) > 0) {
			t.Fatalf("%v with the problems %v", r.declared.list, r.problems)
		}
		for _, err := range r.problems {
			if !strings.HasPrefix(err.Error(), "provisioners.d/a.json ") && !strings.HasPrefix(err.Error(), "templates/") {
				t.Fatalf("%q does not say where", err)
			}
		}
		if len(r.declared.list) == 1 {
			if _, err := json.Marshal(r.declared.list); err != nil {
				t.Fatal(err)
			}
		}
	})
}
