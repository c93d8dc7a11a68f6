package stack

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Settings are lines of .env.
type Settings map[string]string

// Secrets are the settings that nobody may learn.
var Secrets = []string{
	"CA_PASSWORD", "ROOT_CA_PASSWORD", "PROVISIONER_PASSWORD", "SSH_HOST_PROVISIONER_PASSWORD", "POSTGRES_PASSWORD", "STEP_CA_DB_PASSWORD",
	"REPORTS_DB_PASSWORD",
}

// Every character that a shell, Compose, JSON, a URL, SQL or a passfile might take
// for its own, and white space inside.
const troublesome = "\"$`'\\ #@%:/?&=*{}<>|;!~ ${HOME} $$ %41 é"

func passwords() Settings {
	s := Settings{}
	for i, name := range Secrets {
		s[name] = fmt.Sprintf("e2e %d %s ✓ pass", i, troublesome)
		if i%2 == 1 {
			s[name] = strings.Replace(s[name], `'\`, `\'`, 1)
		}
		if strings.HasSuffix(name, "_DB_PASSWORD") || name == "POSTGRES_PASSWORD" {
			// Beyond printable ASCII is refused: SCRAM may normalise it.
			s[name] = strings.NewReplacer("é", "", "✓ ", "").Replace(s[name])
		}
	}
	return s
}

// env is a .env file and what it says.
type env struct {
	dir, file string
	values    Settings
	ever      map[string]bool // every value that a secret has had
	names     []string        // of .env.example
}

// newEnv begins with .env.example.
func newEnv(dir string, more ...Settings) (*env, error) {
	values, err := Example()
	if err != nil {
		return nil, err
	}
	e := &env{dir: dir, file: filepath.Join(dir, ".env"), values: values, ever: map[string]bool{}}
	e.names = slices.Sorted(maps.Keys(values))
	for _, s := range append([]Settings{passwords()}, more...) {
		maps.Copy(e.values, s)
	}
	return e, e.set(nil)
}

// Example reads .env.example, with the settings that are commented out in it as
// empty ones.
func Example() (Settings, error) {
	data, err := os.ReadFile(filepath.Join(Repository(), ".env.example"))
	if err != nil {
		return nil, err
	}
	s := Settings{}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		line, commented := strings.CutPrefix(lines.Text(), "#")
		name, value, ok := strings.Cut(line, "=")
		if !ok || name == "" || strings.ContainsFunc(name, func(c rune) bool { return (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' }) {
			continue
		}
		if commented {
			value = ""
		}
		s[name] = strings.Trim(value, "'")
	}
	return s, nil
}

// Unset is the value of a setting that has no line.
const Unset = "\x00"

func (e *env) set(s Settings) error {
	maps.Copy(e.values, s)
	for _, name := range Secrets {
		if v := e.values[name]; len(v) >= 8 && v != Unset {
			e.ever[v] = true
		}
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(e.values)) {
		if e.values[name] != Unset {
			fmt.Fprintf(&b, "%s=%s\n", name, quote(e.values[name]))
		}
	}
	return os.WriteFile(e.file, []byte(b.String()), 0o600)
}

var oddBackslashes = regexp.MustCompile(`(^|[^\\])(\\\\)*\\('|$)`)

// quote writes a value so that Compose reads it back: in single quotes as
// .env.example does, but for what cannot be written in them.
func quote(value string) string {
	if oddBackslashes.MatchString(value) {
		return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`).Replace(value) + `"`
	}
	return "'" + strings.ReplaceAll(value, "'", `\'`) + "'"
}

// process is the environment of a command: this process's own without anything
// that would win over the file.
func (e *env) process() []string {
	return slices.DeleteFunc(os.Environ(), func(pair string) bool {
		name, _, _ := strings.Cut(pair, "=")
		return slices.Contains(e.names, name) || strings.HasPrefix(name, "COMPOSE_") || strings.HasPrefix(name, "MAKE")
	})
}

// Redact replaces every secret in a text.
func (s *Stack) Redact(text string) string {
	for _, form := range s.secretForms() {
		text = strings.ReplaceAll(text, form, "[redacted]")
	}
	return text
}

// Find tells which secrets are in a text, by name or as "a former one", whatever
// way they are written.
func (s *Stack) Find(text string) []string {
	var found []string
	for secret := range s.env.ever {
		for how, form := range forms(secret) {
			if strings.Contains(text, form) {
				found = append(found, s.nameOf(secret)+" ("+how+")")
			}
		}
	}
	slices.Sort(found)
	return found
}

func (s *Stack) nameOf(secret string) string {
	for _, name := range Secrets {
		if s.env.values[name] == secret {
			return name
		}
	}
	return "a former secret"
}

func (s *Stack) secretForms() []string {
	var all []string
	for secret := range s.env.ever {
		all = slices.AppendSeq(all, maps.Values(forms(secret)))
	}
	// The longest first, so that none leaves a part of another behind.
	slices.SortFunc(all, func(a, b string) int { return len(b) - len(a) })
	return all
}

// forms are the ways in which a secret can stand in a file or a log.
func forms(secret string) map[string]string {
	var plain bytes.Buffer
	encoder := json.NewEncoder(&plain)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(secret) // a string always encodes
	escaped, _ := json.Marshal(secret)
	return map[string]string{
		"as it is":          secret,
		"as JSON":           strings.Trim(strings.TrimSpace(plain.String()), `"`),
		"as HTML-safe JSON": string(escaped[1 : len(escaped)-1]),
		"as Go":             strings.Trim(strconv.Quote(secret), `"`),
		"as a query":        url.QueryEscape(secret),
		"as a path":         url.PathEscape(secret),
		"as user info":      strings.TrimPrefix(url.UserPassword("", secret).String(), ":"),
		"as Base64":         base64.StdEncoding.EncodeToString([]byte(secret)),
		"in a passfile":     strings.NewReplacer(`\`, `\\`, ":", `\:`).Replace(secret),
		"in SQL":            strings.ReplaceAll(secret, "'", "''"),
	}
}
