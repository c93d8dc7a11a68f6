package revocation

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseSerial(t *testing.T) {
	good := map[string]struct{ text, want string }{
		"decimal":                       {"4711", "4711"},
		"decimal, as long as step-ca's": {"166563712678073860327396740110898411385", "166563712678073860327396740110898411385"},
		"hex":                           {"0x4f1A9c", "5184156"},
		"hex with a capital X":          {"0X4F1A9C", "5184156"},
		"hex with colons":               {"4F:1a:9c", "5184156"},
		"hex with colons, all digits":   {"10:00", "4096"},
		"20 bytes":                      {"0xffffffffffffffffffffffffffffffffffffffff", "1461501637330902918203684832716283019655932542975"},
		"a leading zero byte":           {"00:ff", "255"},
	}
	for name, tc := range good {
		t.Run(name, func(t *testing.T) {
			got, err := ParseSerial(tc.text)
			require.NoError(t, err)
			require.Equal(t, tc.want, got)
		})
	}
	bad := map[string]struct{ text, problem string }{
		"nothing":             {"", `"" is neither decimal nor hex`},
		"hex without a sign":  {"4f1a9c", `"4f1a9c" is neither decimal nor hex`},
		"negative":            {"-1", `"-1" is neither decimal nor hex`},
		"negative hex":        {"0x-1", `"0x-1" is neither decimal nor hex`},
		"plus":                {"+1", `"+1" is neither decimal nor hex`},
		"spaces":              {" 1", `" 1" is neither decimal nor hex`},
		"underscores":         {"1_000", `"1_000" is neither decimal nor hex`},
		"an empty 0x":         {"0x", `"0x" is neither decimal nor hex`},
		"zero":                {"00:00", `"00:00" is zero, which no certificate has`},
		"21 bytes":            {"0x01ffffffffffffffffffffffffffffffffffffffff", `"0x01ffffffffffffffffffffffffffffffffffffffff" is longer than 20 bytes (RFC 5280 section 4.1.2.2)`},
		"colons out of place": {"4f1:a9c", `"4f1:a9c" is not hex with a colon after every two digits`},
		"a colon at the end":  {"4f:", `"4f:" is not hex with a colon after every two digits`},
		"colons, no hex":      {"4g:1a", `"4g:1a" is neither decimal nor hex`},
		"signs and colons":    {"-1:1a", `"-1:1a" is neither decimal nor hex`},
	}
	for name, tc := range bad {
		t.Run(name, func(t *testing.T) {
			_, err := ParseSerial(tc.text)
			require.EqualError(t, err, tc.problem)
		})
	}
}

// The codes are those of the CRLReason enumeration.
func TestReasons(t *testing.T) {
	require.Equal(t, []string{"unspecified", "keyCompromise", "affiliationChanged", "superseded", "cessationOfOperation", "privilegeWithdrawn"}, Reasons())
	for name, want := range map[string]int{"unspecified": 0, "keyCompromise": 1, "affiliationChanged": 3, "superseded": 4, "cessationOfOperation": 5, "privilegeWithdrawn": 9} {
		code, err := ParseReason(name)
		require.NoError(t, err)
		require.Equal(t, want, code)
		require.Equal(t, name, ReasonName(code))
	}
	for _, name := range []string{"", "certificateHold", "removeFromCRL", "cACompromise", "keycompromise", "1"} {
		_, err := ParseReason(name)
		require.Error(t, err, name)
	}
	require.Equal(t, "reason code 2", ReasonName(2))
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	for name, tc := range map[string]struct{ content, problem string }{
		"an SSH key that is no certificate": {
			"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE5LnwmN7ZrYtOPzEUzFjAvL4X0qjR5xgS4NrEeVt9vU x\n",
			"it is an SSH key and not a certificate",
		},
		"a damaged certificate": {"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "x509: malformed certificate"},
		"nothing":               {"", "is neither PEM nor an OpenSSH certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, "file")
			require.NoError(t, os.WriteFile(path, []byte(tc.content), 0o600))
			_, err := ReadFile(path)
			require.ErrorContains(t, err, tc.problem)
		})
	}
	_, err := ReadFile(filepath.Join(dir, "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
}
