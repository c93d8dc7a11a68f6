package anchor

import (
	"context"
	"crypto/x509"

	"github.com/smallstep/truststore"
)

func systemInstall(_ context.Context, cert *x509.Certificate) error {
	return explainCommand(truststore.Install(cert, truststore.WithPrefix(prefix)))
}

func systemUninstall(_ context.Context, cert *x509.Certificate) error {
	return explainCommand(truststore.Uninstall(cert, truststore.WithPrefix(prefix)))
}
