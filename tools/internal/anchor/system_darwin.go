package anchor

import (
	"context"
	"crypto/x509"
	"os/exec"
)

const keychain = "/Library/Keychains/System.keychain"

// system is the system keychain. truststore asks for the administrator's password by
// way of sudo.
type system struct{}

func systemStore() store { return system{} }

func (system) where() string { return keychain }

func (system) absent() error { return nil }

func (system) find(ctx context.Context, fingerprint string) (*x509.Certificate, bool, error) {
	cmd := exec.CommandContext(ctx, "security", "find-certificate", "-a", "-p", keychain)
	out, err := cmd.Output()
	if err != nil {
		return nil, false, said(cmd, err, out)
	}
	cert, err := find(out, fingerprint)
	return cert, cert != nil, err
}

func (system) install(ctx context.Context, cert *x509.Certificate) error {
	return systemInstall(ctx, cert)
}

func (system) uninstall(ctx context.Context, cert *x509.Certificate) error {
	return systemUninstall(ctx, cert)
}
