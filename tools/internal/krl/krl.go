// Package krl encodes OpenSSH key revocation lists, as far as an SSH CA needs them:
// serial numbers of certificates under the keys that sign them.
//
// The format is OpenSSH's PROTOCOL.krl:
// https://github.com/openssh/openssh-portable/blob/master/PROTOCOL.krl
package krl

import (
	"encoding/binary"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	magic             = 0x5353484b524c0a00 // "SSHKRL\n\0"
	format            = 1
	sectionCerts      = 1
	sectionSerialList = 0x20
)

// List is what a KRL says. The same List always gives the same bytes.
type List struct {
	Version   uint64    // "ssh-keygen -Q -l" shows it; sshd does not look at it
	Generated time.Time // the same; the zero Time stands for 1970
	CAs       []ssh.PublicKey
	Serials   []uint64 // revoked under each of CAs
}

// Marshal encodes the list. Serial 0 is left out: OpenSSH reads nothing from a KRL
// that has one (krl.c, ssh_krl_revoke_cert_by_serial_range), and an sshd that
// cannot read its KRL admits nobody.
func (l List) Marshal() []byte {
	serials := slices.Clone(l.Serials)
	slices.Sort(serials)
	serials = slices.Compact(serials)
	if len(serials) > 0 && serials[0] == 0 {
		serials = serials[1:]
	}
	var generated uint64
	if !l.Generated.IsZero() {
		generated = uint64(l.Generated.Unix()) //nolint:gosec // G115: after 1970
	}
	var sections []byte
	if len(serials) > 0 {
		for _, ca := range l.CAs {
			sections = append(sections, section(sectionCerts, certs(ca, serials))...)
		}
	}
	return ssh.Marshal(struct {
		Magic     uint64
		Format    uint32
		Version   uint64
		Generated uint64
		Flags     uint64
		Reserved  string
		Comment   string
		Sections  []byte `ssh:"rest"`
	}{Magic: magic, Format: format, Version: l.Version, Generated: generated, Sections: sections})
}

func certs(ca ssh.PublicKey, serials []uint64) []byte {
	list := make([]byte, 0, 8*len(serials))
	for _, s := range serials {
		list = binary.BigEndian.AppendUint64(list, s)
	}
	return ssh.Marshal(struct {
		CA       []byte
		Reserved string
		Lists    []byte `ssh:"rest"`
	}{CA: ca.Marshal(), Lists: section(sectionSerialList, list)})
}

func section(kind uint8, data []byte) []byte {
	return ssh.Marshal(struct {
		Kind uint8
		Data []byte
	}{kind, data})
}
