package provisioner

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"go.step.sm/crypto/pemutil"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// strict returns what encoding/json would let pass when it reads data into a value
// of type t: unknown fields, names in another case, fields given twice, at any
// depth of the types of step-ca. Data must be valid JSON. check is asked about every
// value that is bytes in t.
func strict(data []byte, t reflect.Type, check func(field string, value []byte) error) []error {
	w := &walker{dec: json.NewDecoder(bytes.NewReader(data)), check: check}
	w.dec.UseNumber()
	w.value("", t)
	return w.problems
}

// strictResult does the same for what a template gave, where null is what a mistyped
// value turns into.
func strictResult(data []byte, t reflect.Type) []error {
	w := &walker{dec: json.NewDecoder(bytes.NewReader(data)), noNull: true}
	w.value("", t)
	return w.problems
}

type walker struct {
	dec      *json.Decoder
	check    func(field string, value []byte) error
	noNull   bool
	problems []error
}

func (w *walker) problem(format string, args ...any) {
	w.problems = append(w.problems, fmt.Errorf(format, args...))
}

// value reads one value. t is nil where anything goes.
func (w *walker) value(path string, t reflect.Type) {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	token, err := w.dec.Token()
	if err != nil {
		w.problem("is not JSON: %w", err)
		return
	}
	switch token {
	case json.Delim('{'):
		w.object(path, t)
	case json.Delim('['):
		var elem reflect.Type
		if t != nil && t.Kind() == reflect.Slice && t != reflect.TypeFor[json.RawMessage]() {
			elem = t.Elem()
		}
		for i := 0; w.dec.More(); i++ {
			w.value(fmt.Sprintf("%s[%d]", path, i), elem)
		}
		_, _ = w.dec.Token() // the bracket: data is valid
	case nil:
		// The two that step-ca's own templates leave null.
		if w.noNull && path != "criticalOptions" && path != "extensions" {
			w.problem("has null as %q: a value that does not exist was used", path)
		}
	default:
		if text, ok := token.(string); ok && t == reflect.TypeFor[[]byte]() && w.check != nil {
			w.bytes(path, text)
		}
	}
}

func (w *walker) object(path string, t reflect.Type) {
	known := fields(t)
	seen := map[string]bool{}
	for w.dec.More() {
		token, _ := w.dec.Token() // a name: data is valid
		name, _ := token.(string)
		full := strings.TrimPrefix(path+"."+name, ".")
		if seen[name] {
			w.problem("has the field %q twice", full)
		}
		seen[name] = true
		var child reflect.Type
		if known != nil {
			var ok bool
			if child, ok = known[name]; !ok {
				names := make([]string, 0, len(known))
				for k := range known {
					names = append(names, k)
				}
				w.problem("has the unknown field %q%s", full, suggestion(name, names))
			}
		}
		w.value(full, child)
	}
	_, _ = w.dec.Token()
}

// fields returns the types of a struct's JSON fields by name, nil if any name goes.
// A type with its own decoder, such as a JWK, knows itself what it takes; those of
// x509util take an object like any struct.
func fields(t reflect.Type) map[string]reflect.Type {
	if t == nil || t.Kind() != reflect.Struct ||
		(reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]()) && !strings.HasSuffix(t.PkgPath(), "/x509util")) {
		return nil
	}
	known := map[string]reflect.Type{}
	for f := range t.Fields() {
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); f.IsExported() && name != "" && name != "-" {
			known[name] = f.Type
		}
	}
	return known
}

func (w *walker) bytes(path, text string) {
	if strings.Contains(text, "-----BEGIN ") {
		w.problems = append(w.problems, oneshot.WithHint(fmt.Errorf("has PEM in %q, where step-ca wants the base64 of PEM", path),
			"base64 -w0 FILE prints what belongs there"))
		return
	}
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		w.problems = append(w.problems, oneshot.WithHint(fmt.Errorf("has something in %q that is not base64", path),
			"base64 -w0 FILE prints what belongs there"))
		return
	}
	if err := w.check(path, data); err != nil {
		w.problem("has something in %q that %w", path, err)
	}
}

// suggestion finds the one that was meant.
func suggestion(name string, known []string) string {
	slices.Sort(known)
	for _, k := range known {
		if strings.EqualFold(k, name) {
			return fmt.Sprintf("; did you mean %q?", k)
		}
	}
	for _, k := range known {
		if distance(strings.ToLower(k), strings.ToLower(name)) <= 2 && len(name) > 2 {
			return fmt.Sprintf("; did you mean %q?", k)
		}
	}
	return ""
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// publicKeys demands PEM with public keys and nothing else: a private key would
// be told to everybody who asks for the provisioners.
func publicKeys(data []byte) error {
	all, err := blocks(data)
	if err != nil {
		return err
	}
	for i, b := range all {
		if strings.Contains(b.Type, "PRIVATE") {
			return fmt.Errorf("has a private key as block %d: only public keys belong there", i+1)
		}
		var key any
		if strings.HasSuffix(b.Type, "PUBLIC KEY") {
			key, _ = pemutil.ParseKey(pem.EncodeToMemory(b))
		}
		switch key.(type) {
		case *rsa.PublicKey, *ecdsa.PublicKey, ed25519.PublicKey:
		default:
			return fmt.Errorf("has a block %d that is not a public key (%s)", i+1, b.Type)
		}
	}
	return nil
}

// certificates demands PEM with X.509 certificates and nothing else.
func certificates(data []byte) error {
	all, err := blocks(data)
	if err != nil {
		return err
	}
	for i, b := range all {
		if b.Type != "CERTIFICATE" {
			return fmt.Errorf("has a block %d that is not a certificate (%s)", i+1, b.Type)
		}
		if _, err := x509.ParseCertificate(b.Bytes); err != nil {
			return fmt.Errorf("has a block %d that is not a certificate: %w", i+1, err)
		}
	}
	return nil
}

// syntax tells where data is not JSON.
func syntax(data []byte) error {
	var any json.RawMessage
	err := json.Unmarshal(data, &any)
	var at *json.SyntaxError
	if errors.As(err, &at) {
		return fmt.Errorf("is not JSON: line %d: %w", 1+bytes.Count(data[:min(int(at.Offset), len(data))], []byte("\n")), err)
	}
	return err
}

// mismatch tells in which field a value is of the wrong type.
func mismatch(err error) error {
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) && wrong.Field != "" {
		return fmt.Errorf("has a %s in %q, where step-ca wants %s", wrong.Value, wrong.Field, wrong.Type)
	}
	return fmt.Errorf("is not as step-ca wants it: %w", err)
}
