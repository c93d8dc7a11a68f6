package edge

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"
)

// The module is tested with the versions in go.mod and shipped with those in
// the Dockerfile.
func TestDockerfileBuildsTheTestedVersions(t *testing.T) {
	gomod, err := os.ReadFile("go.mod")
	require.NoError(t, err)
	dockerfile, err := os.ReadFile(filepath.Join("..", "Dockerfile"))
	require.NoError(t, err)

	for name, tc := range map[string]struct{ tested, shipped string }{
		"Caddy":                   {`caddyserver/caddy/v2 v(\S+)`, `xcaddy build v(\S+)`},
		"Caddy of the base image": {`caddyserver/caddy/v2 v(\S+)`, `FROM caddy:(\S+)-builder`},
		"caddy-l4":                {`mholt/caddy-l4 v(\S+)`, `mholt/caddy-l4@v(\S+)`},
	} {
		t.Run(name, func(t *testing.T) {
			tested := regexp.MustCompile(tc.tested).FindSubmatch(gomod)
			require.NotNil(t, tested)
			shipped := regexp.MustCompile(tc.shipped).FindAllSubmatch(dockerfile, -1)
			require.NotEmpty(t, shipped)
			for _, s := range shipped {
				require.Equal(t, string(tested[1]), string(s[1]))
			}
		})
	}
}
