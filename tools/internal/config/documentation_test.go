package config

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// set in docker-compose.yml, the same for everybody
var constants = []string{"POSTGRES_HOST", "POSTGRES_PORT", "POSTGRES_SSLMODE", "PGBOUNCER_HOST", "PGBOUNCER_PORT"}

// read by Compose alone
var composeOnly = []string{"COMPOSE_FILE", "IMPORT_DIR", "PROVISIONERS_DIR", "TEMPLATES_DIR"}

var assignment = regexp.MustCompile(`(?m)^#?([A-Z][A-Z0-9_]*)=(.*)$`)

// .env.example, this package and the table in README.md name the same settings
// with the same defaults.
func TestEverySettingIsDocumented(t *testing.T) {
	example, err := os.ReadFile("../../../.env.example")
	require.NoError(t, err)
	readme, err := os.ReadFile("../../../README.md")
	require.NoError(t, err)

	values := map[string]string{}
	for _, m := range assignment.FindAllStringSubmatch(string(example), -1) {
		values[m[1]] = strings.Trim(m[2], "'")
	}
	want := slices.Concat(Names(), SecretNames(), composeOnly)
	want = slices.DeleteFunc(want, func(name string) bool { return slices.Contains(constants, name) })
	got := make([]string, 0, len(values))
	for name := range values {
		got = append(got, name)
	}
	require.ElementsMatch(t, want, got, ".env.example")

	table := map[string]bool{}
	for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(string(readme), -1) {
		table[m[1]] = true
	}
	for _, name := range want {
		require.True(t, table[name], "%s is not in the table in README.md", name)
	}
	fields := reflect.TypeFor[environment]()
	for i := range fields.NumField() {
		tag := fields.Field(i).Tag
		name, byDefault := tag.Get("envconfig"), tag.Get("default")
		if byDefault != "" && !slices.Contains(constants, name) {
			require.Equal(t, byDefault, values[name], "default of %s in .env.example", name)
			require.True(t, table[byDefault], "README.md does not give %q, the default of %s", byDefault, name)
		}
	}
}

// What make up writes for a newcomer is good, but for the placeholders.
func TestTheExampleIsGoodButForItsPlaceholders(t *testing.T) {
	example, err := os.ReadFile("../../../.env.example")
	require.NoError(t, err)
	env := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^([A-Z][A-Z0-9_]*)=(.*)$`).FindAllStringSubmatch(string(example), -1) {
		env[m[1]] = strings.Trim(m[2], "'")
	}
	var want []string
	for _, name := range []string{"CA_PASSWORD", "ROOT_CA_PASSWORD", "PROVISIONER_PASSWORD", "SSH_HOST_PROVISIONER_PASSWORD", "POSTGRES_PASSWORD", "STEP_CA_DB_PASSWORD", "REPORTS_DB_PASSWORD"} {
		want = append(want, name+" is still the placeholder from .env.example; "+goodSecret)
	}
	r := read(t, env)
	require.EqualError(t, r.Err(), strings.Join(want, "\n"))
	require.Empty(t, r.Warnings())
}
