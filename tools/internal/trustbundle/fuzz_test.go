package trustbundle

import (
	"bytes"
	"encoding/pem"
	"slices"
	"testing"
)

// Whatever a file holds, what is taken from it as a root stands in it, is good on its own,
// and nothing else was in there that somebody might have meant to hide.
func FuzzParse(f *testing.F) {
	good := block(f, nil)
	for _, seed := range [][]byte{
		good, join(good, good), join([]byte("#\n"), good), good[:len(good)/2], typed("CERTIFICATE", nil), typed("PRIVATE KEY", nil),
		join(good, []byte("-----BEGIN PRIVATE KEY-----\nMIG")), join(good, []byte("<!doctype html>")),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := Parse(data, now)
		if err != nil {
			if len(b.Roots()) > 0 {
				t.Fatalf("refused, and roots taken all the same: %v", err)
			}
			return
		}
		if bytes.Contains(data, []byte("PRIVATE")) || bytes.Count(data, []byte(begin)) < len(b.Roots()) {
			t.Fatalf("accepted: %q", data)
		}
		var blocks [][]byte
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			blocks = append(blocks, block.Bytes)
		}
		for _, root := range b.Roots() {
			if !root.IsCA || now.After(root.NotAfter) {
				t.Fatalf("taken as a root: %q", root.Subject)
			}
			if !slices.ContainsFunc(blocks, func(der []byte) bool { return bytes.Equal(der, root.Raw) }) {
				t.Fatalf("%q is not in %q", root.Subject, data)
			}
		}
		again, err := Parse(b.PEM(), now)
		if err != nil || !bytes.Equal(again.PEM(), b.PEM()) {
			t.Fatalf("what was published reads differently: %v", err)
		}
	})
}
