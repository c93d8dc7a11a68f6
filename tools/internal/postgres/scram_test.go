package postgres

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/infra-pki/infra-pki/tools/internal/config"
)

// Made by PostgreSQL 15 itself: create role x password 'correct horse'.
const byServer = "SCRAM-SHA-256$4096:jYhgykClyA893ElAGxdRsQ==$zdW5xym4nwBsxQjT7hQOjMIjmob59JEA8wXmmWsa9+4=:yZAsicWQlFDOY7LoBJRxyZzklJ4fffizQn3hRdTlUVs="

func TestMatches(t *testing.T) {
	fresh, err := newVerifier("correct horse")
	require.NoError(t, err)
	again, err := newVerifier("correct horse")
	require.NoError(t, err)
	require.NotEqual(t, fresh, again, "the salt is random")
	const long = "correct horse battery staple"
	fast, err := newVerifier(long)
	require.NoError(t, err)
	require.Regexp(t, `^SCRAM-SHA-256\$32:`, fast)
	slow, err := verifier(long, []byte("salt"), 4096)
	require.NoError(t, err)
	tests := map[string]struct {
		stored   string
		password config.Secret
		want     bool
	}{
		"its own":                       {fresh, "correct horse", true},
		"the server's":                  {byServer, "correct horse", true},
		"a long one, its own":           {fast, long, true},
		"a long one, many iterations":   {slow, long, false},
		"another password":              {fresh, "correct horsf", false},
		"an MD5 hash":                   {"md5d41d8cd98f00b204e9800998ecf8427e", "correct horse", false},
		"nothing":                       {"", "correct horse", false},
		"plain text":                    {"correct horse", "correct horse", false},
		"without keys":                  {fresh[:strings.LastIndex(fresh, "$")], "correct horse", false},
		"with a salt that is no salt":   {"SCRAM-SHA-256$4096:?$a:b", "correct horse", false},
		"with a count that is no count": {"SCRAM-SHA-256$many:AAAA$a:b", "correct horse", false},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) { require.Equal(t, tc.want, matches(tc.stored, tc.password)) })
	}
}
