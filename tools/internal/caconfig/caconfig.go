// Package caconfig renders step-ca's configuration through step-ca's own types,
// of the same version as the image.
package caconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	authority "github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/authority/provisioner"
	_ "github.com/smallstep/certificates/cas/softcas" // what Validate looks for; keys in files are the default
	"github.com/smallstep/certificates/db"

	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/pki"
)

// Names of the provisioners, on which clients rely.
const (
	AdminProvisioner = "admin"
	ACMEProvisioner  = "acme"
)

// Render returns ca.json: bytes that are the same for the same arguments.
func Render(ca config.CA, store pki.Store, admin *pki.AdminKey, dsn string) ([]byte, error) {
	c := &authority.Config{
		Root:             []string{store.RootPath()},
		IntermediateCert: store.IntermediatePath(),
		IntermediateKey:  store.IntermediateKeyPath(),
		Address:          ":9000",
		DNSNames:         ca.Names,
		CommonName:       ca.Name + " step-ca",
		SSH:              &authority.SSHConfig{HostKey: store.SSHHostKeyPath(), UserKey: store.SSHUserKeyPath()},
		Logger:           json.RawMessage(`{"format":"json"}`),
		DB:               &db.Config{Type: "postgresql", DataSource: dsn},
		TLS:              &authority.DefaultTLSOptions,
		AuthorityConfig: &authority.AuthConfig{
			Provisioners: provisioners(ca, admin),
			Claims: &provisioner.Claims{
				MinTLSDur:     &provisioner.Duration{Duration: ca.TLSMin},
				DefaultTLSDur: &provisioner.Duration{Duration: ca.TLSDefault},
				MaxTLSDur:     &provisioner.Duration{Duration: ca.TLSMax},
			},
			// A token that was made before this replica started is as good as any
			// other: the database, not the start time, keeps it from being used twice
			// (smallstep/certificates v0.30.2, authority/authorize.go).
			DisableIssuedAtCheck: true,
			// The list of SSH hosts is nobody's business but the CA's.
			DisableGetSSHHosts: true,
		},
	}
	data, err := encode(c)
	if err != nil {
		return nil, err
	}
	return data, verify(data)
}

func provisioners(ca config.CA, admin *pki.AdminKey) provisioner.List {
	list := provisioner.List{&provisioner.JWK{
		Type: "JWK", Name: AdminProvisioner, Key: admin.Public, EncryptedKey: admin.Encrypted,
	}}
	if ca.ACME {
		list = append(list, &provisioner.ACME{Type: "ACME", Name: ACMEProvisioner})
	}
	return list
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
