package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// A CA made by the step CLI whose root key stays offline.
func TestAnExistingCAIsTakenOver(t *testing.T) {
	dir := t.TempDir()
	s := stack.New(t, stack.Settings{"IMPORT_DIR": dir})
	require.NoError(t, os.WriteFile(filepath.Join(dir, "password"), []byte(s.Get("CA_PASSWORD")), 0o600))
	s.WithDirectory(dir, `mkdir certs secrets
step certificate create "Old Root CA" certs/root_ca.crt root_ca_key --profile root-ca \
	--no-password --insecure --not-after 43800h
step certificate create "Old Intermediate CA" certs/intermediate_ca.crt secrets/intermediate_ca_key \
	--profile intermediate-ca --ca certs/root_ca.crt --ca-key root_ca_key --password-file password --not-after 26280h
rm root_ca_key password
chown -R 1000:1000 certs secrets
chmod 755 .`)

	s.Up()
	imported := certificates(t, contentOf(t, dir, "certs", "root_ca.crt"))[0]
	require.Equal(t, imported.Raw, certificates(t, contentOf(t, s.Trust(), "root_ca.crt"))[0].Raw)
	require.Equal(t, "Old Intermediate CA", newCA(t, s).issue(t, "taken-over.e2e.test").Issuer.CommonName)
	require.Empty(t, s.Files("root-ca"), "the root key stays where it is")
	require.NotContains(t, strings.Join(s.Files("step-ca-secrets"), " "), "root")

	// What was imported may stay there, or go.
	files := s.Snapshot(stack.Rendered...)
	s.Up()
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "secrets")))
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "certs")))
	s.Up()
	require.Equal(t, files, s.Snapshot(stack.Rendered...))
}
