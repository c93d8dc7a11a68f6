package anchor

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"unsafe"

	"go.step.sm/crypto/x509util"
)

// system is the store "ROOT" of the user. Windows asks the user before it takes a
// root in. truststore takes out every root with the same serial number.
type system struct{}

func systemStore() store { return system{} }

func (system) where() string { return "ROOT" }

func (system) absent() error { return nil }

func (system) find(_ context.Context, fingerprint string) (*x509.Certificate, bool, error) {
	name, err := syscall.UTF16PtrFromString("ROOT")
	if err != nil {
		return nil, false, err
	}
	root, err := syscall.CertOpenSystemStore(0, name)
	if err != nil {
		return nil, false, fmt.Errorf("opening the root store: %w", err)
	}
	defer syscall.CertCloseStore(root, 0) //nolint:errcheck // read only
	const notFound = syscall.Errno(0x80092004)
	var entry *syscall.CertContext
	for {
		// It frees the entry before.
		if entry, err = syscall.CertEnumCertificatesInStore(root, entry); entry == nil {
			if errors.Is(err, notFound) {
				return nil, false, nil
			}
			return nil, false, fmt.Errorf("reading the root store: %w", err)
		}
		cert, err := x509.ParseCertificate(slices.Clone(unsafe.Slice(entry.EncodedCert, entry.Length)))
		if err == nil && x509util.Fingerprint(cert) == fingerprint {
			return cert, true, nil
		}
	}
}

func (system) install(ctx context.Context, cert *x509.Certificate) error {
	return systemInstall(ctx, cert)
}

func (system) uninstall(ctx context.Context, cert *x509.Certificate) error {
	return systemUninstall(ctx, cert)
}
