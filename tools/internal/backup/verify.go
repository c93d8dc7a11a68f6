package backup

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"io"
	"reflect"
	"slices"
	"strings"

	"filippo.io/age"
	"go.step.sm/crypto/pemutil"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/dotenv"
)

// Contents is an archive that was read to its end and found in order.
type Contents struct {
	Manifest
	data map[string][]byte // of the files
}

// Env is the content of .env.
func (c *Contents) Env() []byte { return c.data[Env] }

// Verify reads an archive to its end and demands that it is whole, that everything in
// it has its digest, and that the parts belong together: root and intermediate, the
// root that the database knows, the keys, and the passwords in .env that open them.
func Verify(r io.Reader, identities []age.Identity) (*Contents, error) {
	var roots bytes.Buffer
	c, err := read(r, identities, func(name string, rows io.Reader) error {
		if name != "infra_pki.root" {
			_, err := io.Copy(io.Discard, rows)
			return err
		}
		_, err := io.Copy(&roots, io.LimitReader(rows, maxList))
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := c.coherent(roots.String()); err != nil {
		return nil, refuse("nothing was changed; this backup would not make a CA that works: look for another one", "%w", err)
	}
	return c, nil
}

// read goes through an archive once. each gets the rows of one table after the other,
// before their digest is known to be right.
func read(r io.Reader, identities []age.Identity, each func(name string, rows io.Reader) error) (*Contents, error) {
	opened, err := decrypt(r, identities)
	if err != nil {
		return nil, err
	}
	unpacked, err := gzip.NewReader(opened)
	if errors.Is(err, gzip.ErrHeader) {
		return nil, refuse(hintForeign, "it is not a backup: something else is encrypted in it")
	}
	if err != nil {
		return nil, damaged(err)
	}
	u := &unarchiver{tar: tar.NewReader(unpacked), seen: map[string]bool{}}
	c, err := u.read(each)
	if err != nil {
		return nil, damaged(err)
	}
	// To the end: age tells a cut at its last 64 KiB there, gzip by its checksum.
	for _, r := range []io.Reader{unpacked, opened} {
		if err := ended(r); err != nil {
			return nil, damaged(err)
		}
	}
	return c, nil
}

// decrypt opens what is encrypted with age, or says why it does not.
func decrypt(r io.Reader, identities []age.Identity) (io.Reader, error) {
	buffered := bufio.NewReader(r)
	switch start, err := buffered.Peek(len(ageIntro)); {
	case len(start) == 0 && errors.Is(err, io.EOF):
		return nil, refuse(hintForeign, "it is empty")
	case err != nil && !errors.Is(err, io.EOF):
		return nil, &refusal{err}
	case string(start) != ageIntro:
		return nil, refuse(hintForeign, "it is not encrypted with age")
	}
	opened, err := age.Decrypt(buffered, identities...)
	var mismatch *age.NoIdentityMatchError
	switch {
	case errors.As(err, &mismatch):
		return nil, refuse("nothing was changed; the identity must be the one whose public half was in BACKUP_RECIPIENTS when it was written",
			"the identity does not open it")
	case err != nil:
		return nil, damaged(err)
	}
	return opened, nil
}

func ended(r io.Reader) error {
	switch _, err := io.ReadFull(r, make([]byte, 1)); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	}
	return errors.New("something follows its end")
}

// unarchiver reads entries.
type unarchiver struct {
	tar  *tar.Reader
	next *tar.Header // nil after the last one
	seen map[string]bool
}

// advance goes to the next entry and refuses what no backup has in it: whoever knows
// the recipient can make an archive that the identity opens.
func (u *unarchiver) advance() error {
	header, err := u.tar.Next()
	if errors.Is(err, io.EOF) {
		u.next = nil
		return nil
	}
	if err != nil {
		return err
	}
	name := header.Name
	file, isFile := strings.CutPrefix(name, "files/")
	limit := int64(maxList)
	known := name == marker || name == manifest
	switch {
	case isFile:
		limit, known = maxFile, partOf(file) != ""
	case strings.HasPrefix(name, "tables/"):
		limit, known = pieceSize, knownTable.MatchString(tableOf(name))
	}
	if !known || header.Typeflag != tar.TypeReg || u.seen[name] {
		return refuse("nothing was changed; no backup of this project has such an entry, so somebody else made this archive: do not use it",
			"it has an entry that does not belong there: %q", name)
	}
	if header.Size < 0 || header.Size > limit {
		return fmt.Errorf("%q has %d bytes", name, header.Size)
	}
	u.seen[name], u.next = true, header
	return nil
}

// tableOf is SCHEMA.TABLE of an entry with a piece of it.
func tableOf(entry string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(entry, "tables/"), "/")
	return name
}

func (u *unarchiver) read(each func(string, io.Reader) error) (*Contents, error) {
	if err := u.begin(); err != nil {
		return nil, err
	}
	c := &Contents{data: map[string][]byte{}}
	var found Manifest
	total := 0
	for u.next != nil && strings.HasPrefix(u.next.Name, "files/") {
		data, err := io.ReadAll(u.tar)
		if err != nil {
			return nil, err
		}
		if total += len(data); total > maxFiles {
			return nil, fmt.Errorf("its files have more than %d bytes", maxFiles)
		}
		name, sum := strings.TrimPrefix(u.next.Name, "files/"), sha256.Sum256(data)
		c.data[name] = data
		found.Files = append(found.Files, File{Name: name, Mode: u.next.FileInfo().Mode(), Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:])})
		if err := u.advance(); err != nil {
			return nil, err
		}
	}
	for u.next != nil && strings.HasPrefix(u.next.Name, "tables/") {
		rows := &tableReader{unarchiver: u, name: tableOf(u.next.Name), sum: sha256.New()}
		if err := each(rows.name, rows); err != nil {
			if rows.err != nil {
				return nil, rows.err
			}
			return nil, &notOurs{err}
		}
		if _, err := io.Copy(io.Discard, rows); err != nil {
			return nil, err
		}
		found.Tables = append(found.Tables, Table{Name: rows.name, Rows: rows.rows, Size: rows.size, SHA256: hex.EncodeToString(rows.sum.Sum(nil))})
	}
	if u.next == nil || u.next.Name != manifest {
		return nil, errors.New("it has no manifest")
	}
	decoder := json.NewDecoder(u.tar)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&c.Manifest); err != nil {
		return nil, fmt.Errorf("its manifest cannot be read: %w", err)
	}
	if err := u.advance(); err != nil {
		return nil, err
	}
	if u.next != nil {
		return nil, errors.New("something follows its manifest")
	}
	return c, c.match(found)
}

// begin reads the marker. A later format may look different from there on.
func (u *unarchiver) begin() error {
	header, err := u.tar.Next()
	if err != nil || header.Name != marker {
		if err == nil || errors.Is(err, tar.ErrHeader) || errors.Is(err, io.EOF) {
			return refuse(hintForeign, "it is not a backup: something else is encrypted in it")
		}
		return err
	}
	var is struct {
		Format int `json:"format"`
	}
	if err := json.NewDecoder(io.LimitReader(u.tar, maxList)).Decode(&is); err != nil {
		return fmt.Errorf("its first entry cannot be read: %w", err)
	}
	if is.Format != format {
		return refuse("nothing was changed; take the release that made it, or a later one", "its format is %d, this release knows %d", is.Format, format)
	}
	return u.advance()
}

// match compares what was found with what the manifest says.
func (m *Manifest) match(found Manifest) error {
	if m.Format != format {
		return errors.New("its manifest is of another format")
	}
	if !reflect.DeepEqual(m.Files, found.Files) {
		return errors.New("its files are not those of its manifest")
	}
	if len(m.Tables) != len(found.Tables) {
		return errors.New("its tables are not those of its manifest")
	}
	for i, t := range m.Tables {
		if t.Columns = nil; !reflect.DeepEqual(t, found.Tables[i]) {
			return fmt.Errorf("table %s is not as its manifest says", found.Tables[i].Name)
		}
	}
	return nil
}

// tableReader is the pieces of a table as one stream.
type tableReader struct {
	*unarchiver
	name   string
	number int
	sum    hash.Hash
	rows   int64
	size   int64
	done   bool
	err    error // of the archive
}

func (t *tableReader) Read(p []byte) (n int, err error) {
	n, err = t.piece(p)
	if err != nil && !errors.Is(err, io.EOF) {
		t.err = err
	}
	return n, err
}

func (t *tableReader) piece(p []byte) (int, error) {
	for !t.done {
		if t.next.Name != fmt.Sprintf("tables/%s/%06d", t.name, t.number) {
			return 0, fmt.Errorf("table %s is not whole", t.name)
		}
		n, err := t.tar.Read(p)
		if n > 0 {
			t.sum.Write(p[:n])
			t.size += int64(n)
			t.rows += int64(bytes.Count(p[:n], []byte("\n")))
			return n, nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if errors.Is(err, io.EOF) {
			t.number++
			if err := t.advance(); err != nil {
				return 0, err
			}
			t.done = t.next == nil || !strings.HasPrefix(t.next.Name, "tables/"+t.name+"/")
		}
	}
	return 0, io.EOF
}

// coherent demands that the parts belong together. roots is table infra_pki.root.
func (c *Contents) coherent(roots string) error {
	root, err := c.certificate(rootCertificate)
	if err != nil {
		return err
	}
	if is := x509util.Fingerprint(root); is != c.Root {
		return fmt.Errorf("the root certificate is %s, the manifest says %s", is, c.Root)
	}
	var certificates int64
	for _, t := range c.Tables {
		if t.Name == "public.x509_certs" || t.Name == "public.ssh_certs" {
			certificates += t.Rows
		}
	}
	if certificates != c.Certificates {
		return fmt.Errorf("the manifest counts %d certificates, the tables have %d", c.Certificates, certificates)
	}
	recorded := ""
	if i := slices.IndexFunc(c.Tables, func(t Table) bool { return t.Name == "infra_pki.root" }); i >= 0 {
		column := slices.Index(c.Tables[i].Columns, "fingerprint")
		if values := strings.Split(strings.TrimSuffix(roots, "\n"), "\t"); column >= 0 && column < len(values) {
			recorded = values[column]
		}
	}
	if recorded != c.Root {
		return fmt.Errorf("the root certificate is %s, the database belongs to %q", c.Root, recorded)
	}
	intermediate, err := c.certificate(Certs + "/intermediate_ca.crt")
	if err != nil {
		return err
	}
	if err := intermediate.CheckSignatureFrom(root); err != nil {
		return fmt.Errorf("the intermediate certificate is not signed by the root: %w", err)
	}
	return c.keysOpen()
}

func (c *Contents) certificate(name string) (*x509.Certificate, error) {
	block, _ := pem.Decode(c.data[name])
	if block == nil {
		return nil, fmt.Errorf("%s is missing, or is not PEM", name)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return cert, nil
}

// keysOpen demands that each key is one and opens with its password, where that
// stands in .env, and that keys of provisioners are JSON.
func (c *Contents) keysOpen() error {
	const online = Secrets + "/intermediate_ca_key"
	if c.data[online] == nil {
		return fmt.Errorf("%s is missing", online)
	}
	settings, err := dotenv.Values(c.Env())
	if err != nil {
		return fmt.Errorf(".env: %w", err)
	}
	for _, f := range c.Files {
		switch part := partOf(f.Name); {
		case strings.HasSuffix(f.Name, "_jwk.json") && part == Secrets:
			if !json.Valid(c.data[f.Name]) {
				return fmt.Errorf("%s is not JSON", f.Name)
			}
		case strings.HasSuffix(f.Name, "_key") && (part == Secrets || part == RootCA):
			setting := map[string]string{Secrets: "CA_PASSWORD", RootCA: "ROOT_CA_PASSWORD"}[part]
			if block, _ := pem.Decode(c.data[f.Name]); block == nil || !strings.HasSuffix(block.Type, "PRIVATE KEY") {
				return fmt.Errorf("%s is not a private key in PEM", f.Name)
			}
			password, ok := settings[setting]
			if !ok {
				continue // kept somewhere else
			}
			if _, err := pemutil.Parse(c.data[f.Name], pemutil.WithPassword([]byte(password))); err != nil {
				return fmt.Errorf("%s in .env does not open %s", setting, f.Name)
			}
		}
	}
	return nil
}
