package e2e_test

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/stretchr/testify/require"
	"golang.org/x/mod/modfile"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

// What the compose file promises, without Docker. Services that stay are told
// from one-shots by their restart policy.

func load(t *testing.T, files ...string) *types.Project {
	t.Helper()
	var env []string
	for name, value := range example(t) {
		env = append(env, name+"="+value)
	}
	env = append(env, "JOURNAL_DIR="+stack.Repository()) // postgres/journal.yml insists on one
	options, err := cli.NewProjectOptions(files,
		cli.WithWorkingDirectory(stack.Repository()), cli.WithEnv(env), cli.WithProfiles([]string{"*"}))
	require.NoError(t, err)
	project, err := options.LoadProject(t.Context())
	require.NoError(t, err)
	return project
}

func example(t *testing.T) stack.Settings {
	t.Helper()
	settings, err := stack.Example()
	require.NoError(t, err)
	return settings
}

func contentOf(t *testing.T, elements ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(elements...))
	require.NoError(t, err)
	return string(data)
}

// checkedIn is a file of the repository.
func checkedIn(t *testing.T, elements ...string) string {
	t.Helper()
	return contentOf(t, append([]string{stack.Repository()}, elements...)...)
}

func compose(t *testing.T) *types.Project {
	t.Helper()
	return load(t, filepath.Join(stack.Repository(), "docker-compose.yml"))
}

func withIPv6(t *testing.T) *types.Project {
	t.Helper()
	return load(t, filepath.Join(stack.Repository(), "docker-compose.yml"), filepath.Join(stack.Repository(), "caddy", "ipv6.yml"))
}

func stays(s types.ServiceConfig) bool { return s.Restart != types.RestartPolicyNo }

// Service -> the secrets that it cannot do without.
var leastSecrets = map[string][]string{
	"config-check": {
		"ca_password", "oidc_client_secret", "postgres_password", "provisioner_password", "reports_db_password", "root_ca_password",
		"ssh_host_provisioner_password", "step_ca_db_password",
	},
	"postgres":   {"postgres_db", "postgres_password", "postgres_user"},
	"db-migrate": {"postgres_password", "reports_db_password", "step_ca_db_password"},
	"pgbouncer":  nil,
	"db-wait":    {"step_ca_db_password"},
	"provisioner-init": {
		"ca_password", "oidc_client_secret", "provisioner_password", "root_ca_password",
		"ssh_host_provisioner_password", "step_ca_db_password",
	},
	"step-ca":      {"ca_password"},
	"trust-export": nil,
	"caddy":        nil,
	"pkictl":       {"provisioner_password", "ssh_host_provisioner_password", "step_ca_db_password"},
	"status":       {"reports_db_password"},
	"probe":        {"provisioner_password"},
	"backup":       {"postgres_password"},
	"restore":      {"postgres_password"},

	"metrics-export": {"reports_db_password"},
	"prometheus":     nil,
}

func TestContractOfServices(t *testing.T) {
	project := compose(t)
	require.ElementsMatch(t, slices.Collect(maps.Keys(leastSecrets)), project.ServiceNames(),
		"a new service states its secrets in leastSecrets")
	exactTag := regexp.MustCompile(`^([a-z0-9./-]+:v?\d+\.\d+[a-z0-9.-]*|infra-pki/[a-z0-9-]+:local)$`)

	rules := map[string]func(must *require.Assertions, s types.ServiceConfig){
		"its image has an exact tag or is our own": func(must *require.Assertions, s types.ServiceConfig) {
			must.Regexp(exactTag, s.Image)
		},
		"it has no name of its own, so that a second project can run beside": func(must *require.Assertions, s types.ServiceConfig) {
			must.Empty(s.ContainerName)
		},
		"it runs as somebody other than root, by number": func(must *require.Assertions, s types.ServiceConfig) {
			must.Regexp(`^[1-9]\d*:[1-9]\d*$`, s.User)
		},
		"it has no capability but step-ca's": func(must *require.Assertions, s types.ServiceConfig) {
			must.Equal([]string{"ALL"}, s.CapDrop)
			var want []string
			if s.Name == "step-ca" {
				want = []string{"NET_BIND_SERVICE"}
			}
			must.Equal(want, s.CapAdd)
			must.False(s.Privileged)
		},
		"it gains no privileges": func(must *require.Assertions, s types.ServiceConfig) {
			must.Contains(s.SecurityOpt, "no-new-privileges:true")
		},
		"its memory, processes and logs are bounded": func(must *require.Assertions, s types.ServiceConfig) {
			must.Positive(s.MemLimit)
			must.Positive(s.PidsLimit)
			must.NotNil(s.Logging)
			if s.Name == "backup" {
				must.Equal("none", s.Logging.Driver) // what it prints is the archive
				return
			}
			must.Equal("json-file", s.Logging.Driver)
			must.NotEmpty(s.Logging.Options["max-size"])
			must.NotEmpty(s.Logging.Options["max-file"])
		},
		"it gets no more secrets than it needs": func(must *require.Assertions, s types.ServiceConfig) {
			var got []string
			for _, secret := range s.Secrets {
				got = append(got, secret.Source)
				must.Equal("/run/secrets/"+secret.Source, secret.Target)
				must.Nil(secret.Mode, "Compose writes root-owned files: any other mode than 0444 hides them from the service")
			}
			slices.Sort(got)
			must.Equal(leastSecrets[s.Name], got)
		},
		"its file system is read-only unless it gets a secret, which Compose could not write then": func(must *require.Assertions, s types.ServiceConfig) {
			must.Equal(len(s.Secrets) == 0, s.ReadOnly)
		},
		"its environment names secrets by file only": func(must *require.Assertions, s types.ServiceConfig) {
			for name, value := range s.Environment {
				if regexp.MustCompile(`PASSWORD|SECRET|TOKEN|KEY`).MatchString(name) {
					must.True(strings.HasSuffix(name, "_FILE"), name)
					must.NotNil(value, name)
					secret, ok := strings.CutPrefix(*value, "/run/secrets/")
					must.True(ok, name)
					must.Equal(strings.TrimSuffix(strings.ToLower(name), "_file"), secret)
					must.Contains(leastSecrets[s.Name], secret, "%s is promised a secret that it does not get", name)
				}
			}
		},
		"it publishes nothing unless it is caddy": func(must *require.Assertions, s types.ServiceConfig) {
			if s.Name != "caddy" {
				must.Empty(s.Ports)
				return
			}
			must.Len(s.Ports, 1)
			must.Equal("0.0.0.0", s.Ports[0].HostIP, "without an address Docker hands over IPv6 clients as the gateway")
			must.EqualValues(9000, s.Ports[0].Target)
			must.Equal("9000", s.Ports[0].Published)
		},
		"if it stays, it comes back, says how it is and how it is stopped": func(must *require.Assertions, s types.ServiceConfig) {
			if !stays(s) {
				return
			}
			must.Equal(types.RestartPolicyAlways, s.Restart)
			must.NotNil(s.HealthCheck)
			must.False(s.HealthCheck.Disable)
			must.NotEmpty(s.HealthCheck.Test)
			must.Zero(s.HealthCheck.StartInterval, "Engine 20.10 does not know it")
			must.NotEmpty(s.StopSignal)
			must.NotNil(s.StopGracePeriod)
		},
		"if it is a one-shot, a service that stays waits for it to succeed": func(must *require.Assertions, s types.ServiceConfig) {
			if stays(s) || slices.Contains(s.Profiles, "ops") {
				return
			}
			must.True(adopted(project, s.Name), "up --wait would fail when it ends")
		},
		"it is not stopped because a service that it depends on is": func(must *require.Assertions, s types.ServiceConfig) {
			for on, dependency := range s.DependsOn {
				must.False(dependency.Restart, on)
				switch {
				case !stays(project.Services[on]):
					must.Equal(types.ServiceConditionCompletedSuccessfully, dependency.Condition, on)
				case stays(s):
					must.Equal(types.ServiceConditionHealthy, dependency.Condition, on)
				} // a one-shot may wait by itself
			}
		},
		"its anonymous data is none: volumes are named, what is bound is read-only and part of the checkout": func(must *require.Assertions, s types.ServiceConfig) {
			for _, v := range s.Volumes {
				switch v.Type {
				case types.VolumeTypeVolume:
					must.Contains(project.Volumes, v.Source)
				case types.VolumeTypeBind:
					must.True(v.ReadOnly, v.Source)
					_, err := os.Stat(v.Source)
					must.NoError(err)
				default:
					must.Equal(types.VolumeTypeTmpfs, v.Type)
				}
			}
		},
	}
	for rule, check := range rules {
		t.Run(rule, func(t *testing.T) {
			var name string
			defer func() {
				if t.Failed() {
					t.Logf("the service is %q", name)
				}
			}()
			for _, name = range project.ServiceNames() {
				check(require.New(t), project.Services[name])
			}
		})
	}
}

// adopted tells whether a service that stays waits for the one-shot, directly or
// through other one-shots.
func adopted(project *types.Project, oneShot string) bool {
	for _, s := range project.Services {
		if _, depends := s.DependsOn[oneShot]; depends && (stays(s) || adopted(project, s.Name)) {
			return true
		}
	}
	return false
}

func TestContractOfNetworks(t *testing.T) {
	project := compose(t)
	members := map[string][]string{}
	for _, s := range project.Services {
		for network := range s.Networks {
			members[network] = append(members[network], s.Name)
		}
	}
	for _, names := range members {
		slices.Sort(names)
	}
	require.Equal(t, map[string][]string{
		"db":     {"backup", "db-migrate", "db-wait", "metrics-export", "pgbouncer", "pkictl", "postgres", "provisioner-init", "restore", "status", "step-ca"},
		"ca":     {"caddy", "metrics-export", "pkictl", "prometheus", "status", "step-ca", "trust-export"},
		"egress": {"provisioner-init", "step-ca"},
		"edge":   {"caddy"},
	}, members)
	require.True(t, project.Networks["db"].Internal)
	require.True(t, project.Networks["ca"].Internal)
	require.Equal(t, example(t)["EDGE_SUBNET"], project.Networks["edge"].Ipam.Config[0].Subnet)
	require.Equal(t, "none", project.Services["config-check"].NetworkMode)
}

func TestContractOfTheRootKey(t *testing.T) {
	for _, s := range compose(t).Services {
		for _, v := range s.Volumes {
			if v.Source != "root-ca" && v.Source != "step-ca-secrets" {
				continue
			}
			switch s.Name {
			case "provisioner-init", "restore":
			case "backup":
				require.True(t, v.ReadOnly)
			default:
				require.Equal(t, "step-ca", s.Name)
				require.Equal(t, "step-ca-secrets", v.Source, "the online CA never sees the root key")
				require.True(t, v.ReadOnly)
			}
		}
	}
}

func TestContractOfIPv6(t *testing.T) {
	without, with := compose(t), withIPv6(t)
	require.NotNil(t, with.Networks["edge"].EnableIPv6)
	require.True(t, *with.Networks["edge"].EnableIPv6)
	for name, s := range with.Services {
		if name != "caddy" {
			require.Equal(t, without.Services[name].Ports, s.Ports)
			require.Equal(t, without.Services[name].Networks, s.Networks)
		}
	}
	var ips []string
	for _, p := range with.Services["caddy"].Ports {
		ips = append(ips, p.HostIP)
		require.EqualValues(t, 9000, p.Target)
	}
	require.ElementsMatch(t, []string{"0.0.0.0", "::"}, ips)
	for _, name := range []string{"config-check", "provisioner-init"} {
		require.Contains(t, with.Services[name].Environment, "EDGE_SUBNET6", "%s warns about the gateway", name)
	}
}

// Invariant 10.
func TestContractOfSettings(t *testing.T) {
	declared := slices.Sorted(maps.Keys(example(t)))
	text := checkedIn(t, "docker-compose.yml") + checkedIn(t, "caddy", "ipv6.yml") + checkedIn(t, "step-ca", "revocation.yml") + checkedIn(t, "postgres", "tls.yml") +
		checkedIn(t, "postgres", "journal.yml")
	text = regexp.MustCompile(`(?m)(^|\s)#.*$`).ReplaceAllString(text, "")
	used := map[string]bool{}
	for _, m := range regexp.MustCompile(`[^$]\$\{?([A-Z][A-Z0-9_]*)`).FindAllStringSubmatch(text, -1) {
		used[m[1]] = true
	}
	for _, secret := range compose(t).Secrets {
		used[secret.Environment] = true
	}
	for _, name := range declared {
		if !strings.HasPrefix(name, "COMPOSE_") { // Compose reads these by itself
			require.True(t, used[name], "%s stands in .env.example and nothing reads it", name)
		}
	}
	for name := range used {
		require.Contains(t, declared, name, "%s is read and not in .env.example", name)
	}
}

func TestContractOfSecrets(t *testing.T) {
	settings := example(t)
	project := compose(t)
	var passwords []string
	for name, secret := range project.Secrets {
		require.Equal(t, strings.ToUpper(name), secret.Environment)
		if name == "postgres_db" || name == "postgres_user" {
			continue // handed over in this way and no secrets
		}
		if name == "oidc_client_secret" {
			continue // of the provider, so there is nothing to generate
		}
		passwords = append(passwords, secret.Environment)
		require.Contains(t, settings[secret.Environment], "change_me", "a placeholder that config-check refuses")
	}
	require.ElementsMatch(t, stack.Secrets, passwords, "the end-to-end tests search for them")
	for name, s := range project.Services {
		text := fmt.Sprint(s.Environment, s.Command, s.Entrypoint, s.Labels, s.HealthCheck)
		require.NotContains(t, text, "change_me", "%s gets a secret in its definition", name)
	}
}

func TestContractOfVersions(t *testing.T) {
	versions := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^([A-Z_]+)=(\S+)$`).FindAllStringSubmatch(checkedIn(t, "tools", "airgap", "versions"), -1) {
		versions[m[1]] = m[2]
	}
	project := compose(t)
	tools, edge := gomod(t, "tools"), gomod(t, "caddy", "edge")
	caddyfile, toolsfile := checkedIn(t, "caddy", "Dockerfile"), checkedIn(t, "tools", "Dockerfile")

	tests := map[string]struct{ got, want string }{
		"step-ca's packages are of the version of its image": {tools["github.com/smallstep/certificates"], "v" + versions["STEP_CA"]},
		"step-ca's image is the one that airgap builds":      {project.Services["step-ca"].Image, "smallstep/step-ca:" + versions["STEP_CA"]},
		"postgres is the one that airgap builds":             {project.Services["postgres"].Image, "postgres:" + versions["POSTGRES"] + "-" + versions["DEBIAN"]},
		"prometheus is the one that airgap builds":           {project.Services["prometheus"].Image, "prom/prometheus:v" + versions["PROMETHEUS"]},
		"tools are built on the Go that airgap builds":       {base(toolsfile), "golang:" + versions["GO"] + "-" + versions["DEBIAN"]},
		"caddy is built on the builder that airgap builds":   {base(caddyfile), "caddy:" + versions["CADDY"] + "-builder"},
		"caddy is the version that its module is tested on":  {submatch(t, caddyfile, `xcaddy build (\S+)`), edge["github.com/caddyserver/caddy/v2"]},
		"caddy is the version of its builder":                {edge["github.com/caddyserver/caddy/v2"], "v" + versions["CADDY"]},
		"caddy-l4 is the version that our module is tested on": {
			submatch(t, caddyfile, `caddy-l4@(\S+)`), edge["github.com/mholt/caddy-l4"],
		},
		"the clients of the tests have the step of the stack": {base(checkedIn(t, "tools", "e2e", "client", "Dockerfile")), project.Services["step-ca"].Image},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			require.NotEmpty(t, tc.got)
			require.Equal(t, tc.want, tc.got)
		})
	}
}

func gomod(t *testing.T, elements ...string) map[string]string {
	t.Helper()
	file, err := modfile.Parse("go.mod", []byte(checkedIn(t, append(elements, "go.mod")...)), nil)
	require.NoError(t, err)
	found := map[string]string{}
	for _, r := range file.Require {
		found[r.Mod.Path] = r.Mod.Version
	}
	return found
}

func base(dockerfile string) string {
	_, rest, _ := strings.Cut(dockerfile, "FROM ")
	image, _, _ := strings.Cut(rest, " ")
	return strings.TrimSpace(image)
}

func submatch(t *testing.T, text, pattern string) string {
	t.Helper()
	m := regexp.MustCompile(pattern).FindStringSubmatch(text)
	require.NotNil(t, m, pattern)
	return m[1]
}

// Options that are broken in caddy-l4 v0.1.2, and what is not to be done with it.
func TestContractOfTheCaddyfile(t *testing.T) {
	text := regexp.MustCompile(`(?m)(^|\s)#.*$`).ReplaceAllString(checkedIn(t, "caddy", "Caddyfile"), "")
	tests := map[string]string{
		"counts connections for a lifetime and then serves nobody":   `\bunhealthy_connection_count\b|\bmax_connections\b`,
		"balances lifetime totals":                                   `\bleast_conn\b`,
		"panics, and with it the whole process":                      `\brandom_choose\b`,
		"sends clients to the port of the health check":              `\bhealth_port\b`,
		"hangs every reload and shutdown":                            `\bremote_ip_list\b`,
		"believes anybody who says to be somebody else":              `\bproxy_protocol\b`,
		"sends each client's bytes to two upstreams":                 `(?m)^\s*(upstream|dial)[ \t]+\S+:\d+[ \t]+\S`,
		"takes text from the environment as directives":              `\{\$|\{env\.`,
		"listens on TCP with an API that can replace the allow-list": `(?m)^\s*admin\s+(?:[^u\s]|u[^n])`,
	}
	for harm, pattern := range tests {
		t.Run("nothing "+harm, func(t *testing.T) { require.NotRegexp(t, pattern, text) })
	}
	deny, proxy := strings.Index(text, "route @outside"), strings.Index(text, "route @tls")
	require.Positive(t, deny)
	require.Less(t, deny, proxy, "refusal stands before anything that reads from the client")
}

// Each test that the table of defects names is there, and each defect is in it.
func TestContractOfTheDefects(t *testing.T) {
	_, table, found := strings.Cut(checkedIn(t, "tools/e2e/README.md"), "\n## The defects of the original\n")
	require.True(t, found)
	var tests strings.Builder
	for _, module := range []string{"tools", "caddy/edge"} {
		require.NoError(t, filepath.WalkDir(filepath.Join(stack.Repository(), module), func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case strings.HasSuffix(path, "_test.go"):
				data, err := os.ReadFile(path) //nolint:gosec // G122: this checkout
				tests.Write(data)
				return err
			case strings.HasSuffix(path, ".txtar"):
				tests.WriteString("\nfunc " + d.Name() + "(")
			}
			return nil
		}))
	}
	for _, name := range regexp.MustCompile("`(Test[A-Za-z]+|[a-z-]+\\.txtar)`").FindAllStringSubmatch(table, -1) {
		require.True(t, strings.Contains(tests.String(), "\nfunc "+name[1]+"("), "there is no %s", name[1]) //nolint:testifylint // it would print all tests
	}
	for d := 1; d <= 73; d++ {
		require.Regexp(t, fmt.Sprintf(`\bD%d\b`, d), table)
	}
}
