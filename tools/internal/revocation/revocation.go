// Package revocation finds certificates in step-ca's database, and what is recorded
// about their revocation.
package revocation

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/crypto/ssh"
)

// Kind is what sort of certificate it is. A serial belongs to one kind.
type Kind string

// The kinds that step-ca issues.
const (
	TLS     Kind = "TLS"
	SSHUser Kind = "SSH user"
	SSHHost Kind = "SSH host"
)

// Certificate is one as the database has it.
type Certificate struct {
	Kind        Kind
	Serial      string   // decimal
	Subject     string   // distinguished name, or key id of an SSH certificate
	Names       []string // subject alternative names, or principals
	Provisioner string   // that it was issued by, empty if step-ca keeps no record of it
	NotBefore   time.Time
	NotAfter    time.Time // zero: it never ends
	Revoked     *Record   // nil if it is not
	raw         []byte
}

// SSH says whether it is an SSH certificate.
func (c *Certificate) SSH() bool { return c.Kind != TLS }

// Record is step-ca's note of a revocation.
type Record struct {
	At   time.Time `json:"RevokedAt"`
	Code int       `json:"ReasonCode"`
	Note string    `json:"Reason"`
	By   string    `json:"ProvisionerID"`
}

// Reasons for which there is no certificate.
var (
	ErrUnknown   = errors.New("this CA has issued no certificate of that serial")
	ErrAmbiguous = errors.New("a TLS and an SSH certificate have this serial")
)

// reasons are those of RFC 5280 section 5.3.1 that can be asked for. step-ca takes
// every code from 0 to 10. Left out: certificateHold and removeFromCRL, since step-ca
// cannot take a revocation back, and those about CAs and attribute certificates,
// which are not what it issues.
var reasons = map[string]int{
	"unspecified": 0, "keyCompromise": 1, "affiliationChanged": 3, "superseded": 4,
	"cessationOfOperation": 5, "privilegeWithdrawn": 9,
}

// Reasons lists the names that ParseReason knows, in the order of their codes.
func Reasons() []string {
	var names []string
	for name := range reasons {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return reasons[a] - reasons[b] })
	return names
}

// ParseReason returns the code of a reason.
func ParseReason(name string) (int, error) {
	code, ok := reasons[name]
	switch {
	case ok:
		return code, nil
	case name == "certificateHold" || name == "removeFromCRL":
		return 0, fmt.Errorf("%q: step-ca cannot take a revocation back", name)
	}
	return 0, fmt.Errorf("%q is none of %s", name, strings.Join(Reasons(), ", "))
}

// ReasonName is the name of a code, or the code where it has none here.
func ReasonName(code int) string {
	for name, c := range reasons {
		if c == code {
			return name
		}
	}
	return "reason code " + strconv.Itoa(code)
}

// RFC 5280 section 4.1.2.2: at most 20 octets.
const maxSerialBits = 160

// ParseSerial returns the decimal form of a serial that is written in decimal, in hex
// after 0x, or in hex with colons.
func ParseSerial(s string) (string, error) {
	digits, base := s, 10
	if rest, ok := strings.CutPrefix(strings.ToLower(s), "0x"); ok {
		digits, base = rest, 16
	} else if strings.Contains(s, ":") {
		for pair := range strings.SplitSeq(s, ":") {
			if len(pair) != 2 {
				return "", fmt.Errorf("%q is not hex with a colon after every two digits", s)
			}
		}
		digits, base = strings.ReplaceAll(s, ":", ""), 16
	}
	n, ok := new(big.Int).SetString(digits, base)
	switch {
	case !ok || strings.ContainsAny(digits, "+-_"):
		return "", fmt.Errorf("%q is neither decimal nor hex", s)
	case n.Sign() == 0:
		return "", fmt.Errorf("%q is zero, which no certificate has", s)
	case n.BitLen() > maxSerialBits:
		return "", fmt.Errorf("%q is longer than 20 bytes (RFC 5280 section 4.1.2.2)", s)
	}
	return n.String(), nil
}

// ReadFile returns the certificate in a file: PEM, the leaf first, or one of OpenSSH.
// "-" is standard input.
func ReadFile(path string) (*Certificate, error) {
	var data []byte
	var err error
	if path == "-" {
		data, err = io.ReadAll(os.Stdin)
	} else {
		data, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the certificate: %w", err)
	}
	if block, _ := pem.Decode(data); block != nil {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("reading the certificate: %q begins with a %s", path, block.Type)
		}
		c, err := parseTLS(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading the certificate: %q: %w", path, err)
		}
		return c, nil
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(data)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate: %q is neither PEM nor an OpenSSH certificate", path)
	}
	c, err := parseSSH(key.Marshal())
	if err != nil {
		return nil, fmt.Errorf("reading the certificate: %q: %w", path, err)
	}
	return c, nil
}

func parseTLS(der []byte) (*Certificate, error) {
	x, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	c := &Certificate{
		Kind: TLS, Serial: x.SerialNumber.String(), Subject: x.Subject.String(), Names: slices.Concat(x.DNSNames, x.EmailAddresses),
		NotBefore: x.NotBefore, NotAfter: x.NotAfter, raw: der,
	}
	for _, ip := range x.IPAddresses {
		c.Names = append(c.Names, ip.String())
	}
	for _, u := range x.URIs {
		c.Names = append(c.Names, u.String())
	}
	return c, nil
}

func parseSSH(wire []byte) (*Certificate, error) {
	key, err := ssh.ParsePublicKey(wire)
	if err != nil {
		return nil, err
	}
	s, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, errors.New("it is an SSH key and not a certificate")
	}
	c := &Certificate{
		Kind: SSHUser, Serial: strconv.FormatUint(s.Serial, 10), Subject: s.KeyId, Names: s.ValidPrincipals,
		NotBefore: time.Unix(int64(s.ValidAfter), 0), raw: wire, //nolint:gosec // a certificate's times are far below 2^63
	}
	if s.CertType == ssh.HostCert {
		c.Kind = SSHHost
	}
	if s.ValidBefore != ssh.CertTimeInfinity {
		c.NotAfter = time.Unix(int64(s.ValidBefore), 0) //nolint:gosec // as above
	}
	return c, nil
}

// Find looks for the certificate of a serial, TLS and SSH.
func Find(ctx context.Context, conn *pgx.Conn, serial string) (*Certificate, error) {
	tls, err := find(ctx, conn, serial, false)
	if err != nil && !errors.Is(err, ErrUnknown) {
		return nil, err
	}
	sshCert, errSSH := find(ctx, conn, serial, true)
	switch {
	case errSSH != nil && !errors.Is(errSSH, ErrUnknown):
		return nil, errSSH
	case err == nil && errSSH == nil:
		return nil, fmt.Errorf("looking for serial %s: %w", serial, ErrAmbiguous)
	case err == nil:
		return tls, nil
	}
	return sshCert, errSSH
}

// Same looks for the very certificate that was read from a file.
func Same(ctx context.Context, conn *pgx.Conn, file *Certificate) (*Certificate, error) {
	found, err := find(ctx, conn, file.Serial, file.SSH())
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(found.raw, file.raw) {
		return nil, fmt.Errorf("looking for serial %s: this CA has issued another certificate of that serial", file.Serial)
	}
	return found, nil
}

func find(ctx context.Context, conn *pgx.Conn, serial string, isSSH bool) (*Certificate, error) {
	// step-ca records no provisioner of an SSH certificate.
	query, parse := `select c.nvalue, d.nvalue, r.nvalue from public.x509_certs c
		left join public.x509_certs_data d on d.nkey = c.nkey
		left join public.revoked_x509_certs r on r.nkey = c.nkey where c.nkey = $1`, parseTLS
	if isSSH {
		query, parse = `select c.nvalue, null::bytea, r.nvalue from public.ssh_certs c
			left join public.revoked_ssh_certs r on r.nkey = c.nkey where c.nkey = $1`, parseSSH
	}
	var raw, data, revoked []byte
	err := conn.QueryRow(ctx, query, []byte(serial)).Scan(&raw, &data, &revoked)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrUnknown
	}
	if err != nil {
		return nil, fmt.Errorf("looking for serial %s: %w", serial, err)
	}
	c, err := parse(raw)
	if err != nil {
		return nil, fmt.Errorf("reading certificate %s from the database: %w", serial, err)
	}
	if data != nil {
		var issued struct {
			Provisioner struct {
				Name string `json:"name"`
				Type string `json:"type"`
			} `json:"provisioner"`
		}
		if err := json.Unmarshal(data, &issued); err != nil {
			return nil, fmt.Errorf("reading the provisioner of certificate %s: %w", serial, err)
		}
		if issued.Provisioner.Name != "" {
			c.Provisioner = fmt.Sprintf("%s (%s)", issued.Provisioner.Name, issued.Provisioner.Type)
		}
	}
	if revoked != nil {
		c.Revoked = &Record{}
		if err := json.Unmarshal(revoked, c.Revoked); err != nil {
			return nil, fmt.Errorf("reading the revocation of certificate %s: %w", serial, err)
		}
	}
	return c, nil
}
