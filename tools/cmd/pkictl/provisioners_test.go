package main

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"maps"
	"math/big"
	"slices"
	"testing"
	"time"

	authorityconfig "github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	"github.com/stretchr/testify/require"
	"go.step.sm/crypto/minica"

	"github.com/infra-pki/infra-pki/tools/internal/stepca"
	"github.com/infra-pki/infra-pki/tools/internal/stepca/stepcatest"
)

// A real CA, with a provisioner of every type that initialises without a network, and
// one that does not: what it answers equals what was declared, whatever it fills in
// and hides; and a difference in any field is found.
func TestLiveProvisionersEqualTheDeclaredOnes(t *testing.T) {
	pki, err := minica.New()
	require.NoError(t, err)
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pki.Root.Raw})
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pki.Root.RawSubjectPublicKeyInfo})
	decrypter, decrypterKey := decrypterPair(t)
	yes := true
	hour := &provisioner.Duration{Duration: time.Hour}
	claims := func() *provisioner.Claims { return &provisioner.Claims{MaxTLSDur: hour, DefaultTLSDur: hour} }
	options := func() *provisioner.Options {
		return &provisioner.Options{
			X509:     &provisioner.X509Options{Template: `{"subject": {{ toJson .Subject }}}`, TemplateData: json.RawMessage(`{"b": 1, "a": [1.50]}`)},
			Webhooks: []*provisioner.Webhook{{ID: "w", Name: "w", URL: "https://hook.internal", Kind: "AUTHORIZING", CertType: "ALL"}},
		}
	}
	list := provisioner.List{
		&provisioner.ACME{
			Type: "ACME", Name: "acme", ForceCN: true, RequireEAB: true, Challenges: []provisioner.ACMEChallenge{"dns-01"},
			Claims: claims(), Options: options(), AttestationRoots: root, CaaIdentities: []string{"ca.internal"},
		},
		&provisioner.X5C{Type: "X5C", Name: "x5c", Roots: root, Claims: claims(), Options: options()},
		&provisioner.K8sSA{Type: "K8sSA", Name: "k8s-sa", PubKeys: public},
		&provisioner.SSHPOP{Type: "SSHPOP", Name: "ssh-pop", Claims: &provisioner.Claims{EnableSSHCA: &yes}},
		&provisioner.AWS{Type: "AWS", Name: "aws", Accounts: []string{"1"}},
		&provisioner.OIDC{
			Type: "OIDC", Name: "sso", ClientID: "step-ca", ClientSecret: "hunter2", Domains: []string{"internal"}, Scopes: []string{"openid", "email"},
			ConfigurationEndpoint: "https://127.0.0.1:1/.well-known/openid-configuration",
		},
		&provisioner.SCEP{Type: "SCEP", Name: "scep", ChallengePassword: "hunter2", DecrypterCertificate: decrypter, DecrypterKeyPEM: decrypterKey},
		&provisioner.SCEP{
			Type: "SCEP", Name: "scep2", ForceCN: true, MinimumPublicKeyLength: 3072, EncryptionAlgorithmIdentifier: 2,
			DecrypterCertificate: decrypter, DecrypterKeyPEM: decrypterKey,
		},
	}
	var file []byte
	ca, err := stepcatest.New(t.TempDir(), stepcatest.Options{SSH: true, Provisioners: list, Adjust: func(c *authorityconfig.Config) {
		file, err = json.Marshal(c.AuthorityConfig.Provisioners) // before step-ca fills anything in
		require.NoError(t, err)
	}})
	require.NoError(t, err)
	require.NoError(t, ca.Start())
	t.Cleanup(func() { require.NoError(t, ca.Stop()) })
	client, err := stepca.New(ca.URL, ca.Root)
	require.NoError(t, err)
	answer, err := client.Provisioners(t.Context())
	require.NoError(t, err)
	var declared []object
	require.NoError(t, decode(file, &declared))
	live := make([]object, len(answer))
	for i, data := range answer {
		require.NoError(t, decode(data, &live[i]))
	}

	verdicts := compare(declared, live, true)
	require.Len(t, verdicts, len(list)+1)
	for _, v := range verdicts {
		require.Equal(t, same, v.Declared, "%s: %v", v.Name, v.Fields)
		require.Empty(t, v.Fields)
		if v.Name == "sso" {
			require.Equal(t, uninitialized, v.State)
			require.Contains(t, v.Reason, "connection refused")
		} else {
			require.Equal(t, ready, v.State, "%s: %s", v.Name, v.Reason)
		}
	}
	for i, d := range declared {
		actual := live[slices.IndexFunc(live, func(o object) bool { return o["name"] == d["name"] })]
		for field := range d {
			if field == "name" || field == "type" || slices.Contains(hidden["SCEP"], field) {
				continue
			}
			t.Run(d.text("name")+" with another "+field, func(t *testing.T) {
				edited := maps.Clone(declared[i])
				edited[field] = "another"
				require.Equal(t, []string{field}, difference(edited, actual))
			})
		}
	}
}

func decrypterPair(t *testing.T) (cert, key []byte) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)})
}

// Cloud provisioners ask the cloud when they are initialised, so that only the
// values can be held against step-ca's.
func TestFilledInIsWhatStepCAFillsIn(t *testing.T) {
	require.Equal(t, provisioner.DefaultDisableSSHCAUser, filled["GCP"]["disableSSHCAUser"])
	require.Equal(t, provisioner.DefaultDisableSSHCAHost, filled["GCP"]["disableSSHCAHost"])
}

func TestDifference(t *testing.T) {
	tests := map[string]struct {
		declared, live string
		want           []string
	}{
		"the order of members is no difference":             {`{"type":"ACME","name":"a","forceCN":true}`, `{"forceCN":true,"name":"a","type":"ACME"}`, nil},
		"the order of items is one":                         {`{"type":"OIDC","domains":["a","b"]}`, `{"type":"OIDC","domains":["b","a"]}`, []string{"domains"}},
		"a field more in the CA is one":                     {`{"type":"ACME"}`, `{"type":"ACME","requireEAB":true}`, []string{"requireEAB"}},
		"a field less in the CA is one":                     {`{"type":"ACME","requireEAB":true}`, `{"type":"ACME"}`, []string{"requireEAB"}},
		"a number too large for a float is compared":        {`{"type":"X","n":9007199254740993}`, `{"type":"X","n":9007199254740992}`, []string{"n"}},
		"what step-ca fills in is none":                     {`{"type":"Azure"}`, `{"type":"Azure","audience":"https://management.azure.com/"}`, nil},
		"anything else in its place is one":                 {`{"type":"Azure"}`, `{"type":"Azure","audience":"https://elsewhere/"}`, []string{"audience"}},
		"what another type has filled in is one":            {`{"type":"OIDC"}`, `{"type":"OIDC","audience":"https://management.azure.com/"}`, []string{"audience"}},
		"a state is none if the CA could not initialise it": {`{"type":"GCP"}`, `{"type":"GCP","state":"Uninitialized","stateReason":"x"}`, nil},
		"a difference is found in such a one too":           {`{"type":"OIDC","clientID":"a"}`, `{"type":"OIDC","clientID":"b","state":"Uninitialized","stateReason":"x"}`, []string{"clientID"}},
		"a type in other letters is a difference":           {`{"type":"acme"}`, `{"type":"ACME"}`, []string{"type"}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			var declared, live object
			require.NoError(t, decode([]byte(tc.declared), &declared))
			require.NoError(t, decode([]byte(tc.live), &live))
			require.Equal(t, tc.want, difference(declared, live))
		})
	}
}

func TestReplicasThatDiffer(t *testing.T) {
	acme := verdict{Name: "acme", Type: "ACME", State: ready, Declared: same}
	gone := verdict{Name: "acme", Type: "ACME", State: "-", Declared: missing}
	jwk := verdict{Name: "admin", Type: "JWK", State: ready, Declared: same}

	var all []verdict
	all = merge(all, []verdict{jwk, acme}, "192.0.2.1")
	all = merge(all, []verdict{jwk, gone}, "192.0.2.2")
	everywhere(all, 2)

	require.Empty(t, all[0].Replicas, "what is the same on all of them says no address")
	require.Equal(t, []string{"192.0.2.1"}, all[1].Replicas)
	require.Equal(t, []string{"192.0.2.2"}, all[2].Replicas)
	err := judge(t.Context(), all, slog.New(slog.DiscardHandler))
	require.EqualError(t, err, `provisioner "acme" is declared and the CA does not have it (on 192.0.2.2)`)
}
