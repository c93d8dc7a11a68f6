package backup

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"time"

	"filippo.io/age"
	"github.com/jackc/pglogrepl"

	"github.com/infra-pki/infra-pki/tools/internal/durable"
)

const (
	journalFormat = 1
	// chainLayout is how a chain is named: by when it began.
	chainLayout = "20060102T150405Z"
	// A row is one line, and a list of all ACME orders or certificates one row.
	maxRecord = 64 << 20
)

// lsn is a place in the server's write-ahead log.
type lsn uint64

func (l lsn) String() string               { return pglogrepl.LSN(l).String() }
func (l lsn) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

func (l *lsn) UnmarshalText(text []byte) error {
	parsed, err := pglogrepl.ParseLSN(string(text))
	if err != nil || parsed.String() != string(text) {
		return fmt.Errorf("%q is not a place in the write-ahead log", text)
	}
	*l = lsn(parsed)
	return nil
}

// A segment is one file of a journal: what was committed between two places of the
// write-ahead log, as lines of JSON, compressed with gzip and encrypted with age.
type segment struct {
	name  string // of the file
	begin segmentBegin
	end   segmentEnd
}

// segmentBegin is the first line.
type segmentBegin struct {
	Journal int `json:"journal"` // the format's number
	// Chain is of the segments that follow one another without a gap: when it began.
	Chain    string `json:"chain"`
	Database string `json:"database"` // see Position
	Root     string `json:"root"`
	From     lsn    `json:"from"` // where the segment before it ends
	// Above is the number of a transaction: no earlier segment has this one or a higher one.
	Above uint64 `json:"above"`
}

// segmentEnd is the last line. Without it nothing is believed.
type segmentEnd struct {
	End          lsn       `json:"end"`
	Transactions int       `json:"transactions"`
	Through      time.Time `json:"through"` // the last one was committed, or the chain began
}

// What a line between them says.
const (
	opBegin    = "begin"
	opInsert   = "insert"
	opUpdate   = "update"
	opDelete   = "delete"
	opTruncate = "truncate"
	opCommit   = "commit"
)

// record is a line between them. Values are PostgreSQL's text, null is null.
type record struct {
	Op     string             `json:"op"`
	LSN    lsn                `json:"lsn,omitempty"`   // begin: where the commit is; commit: where it ends
	Number uint64             `json:"xid,omitempty"`   // begin
	Time   *time.Time         `json:"time,omitempty"`  // begin: of the commit
	Table  string             `json:"table,omitempty"` // insert, update, delete
	Tables []string           `json:"tables,omitempty"`
	Key    map[string]*string `json:"key,omitempty"` // update, delete: which row
	Row    map[string]*string `json:"row,omitempty"` // insert; update: without what stays as it is
}

var segmentName = regexp.MustCompile(`^journal-(\d{8}T\d{6}Z)-([0-9A-F]{16})-([0-9A-F]{16})\.age$`)

// nameOf orders segments as they follow one another.
func nameOf(chain string, from, end lsn) string {
	return fmt.Sprintf("journal-%s-%016X-%016X.age", chain, uint64(from), uint64(end))
}

// segmentWriter writes a segment. Where its file begins is known when the first change
// comes, where it ends when it is cut.
type segmentWriter struct {
	begin  segmentBegin
	end    segmentEnd
	dir    string
	file   *durable.Stream
	sealed io.WriteCloser
	packed *gzip.Writer
	since  time.Time // the first change in it is this old
}

// temporary is the name of what has no name yet.
const temporary = "journal"

func newSegment(dir string, recipients []age.Recipient, begin segmentBegin) (*segmentWriter, error) {
	file, err := durable.Begin(dir, temporary)
	if err != nil {
		return nil, err
	}
	w := &segmentWriter{begin: begin, dir: dir, file: file, since: time.Now()}
	if w.sealed, err = age.Encrypt(file, recipients...); err != nil {
		return nil, errors.Join(fmt.Errorf("encrypting: %w", err), file.Discard())
	}
	w.packed = gzip.NewWriter(w.sealed)
	if err := w.line(begin); err != nil {
		return nil, errors.Join(err, w.discard())
	}
	w.end.End = begin.From
	return w, nil
}

func (w *segmentWriter) line(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(text) >= maxRecord {
		return fmt.Errorf("writing the journal: a row has more than %d bytes", maxRecord)
	}
	if _, err := w.packed.Write(append(text, '\n')); err != nil {
		return fmt.Errorf("writing the journal: %w", err)
	}
	return nil
}

// publish ends the segment and returns when it is on disk, under its name.
func (w *segmentWriter) publish() error {
	if err := w.line(w.end); err != nil {
		return err
	}
	if err := errors.Join(w.packed.Close(), w.sealed.Close()); err != nil {
		return fmt.Errorf("writing the journal: %w", err)
	}
	// Readable for whoever carries it away, who is not the user of the container. The
	// directory has a mode of its own, and nothing in it can be read without an identity.
	if err := w.file.Publish(filepath.Join(w.dir, nameOf(w.begin.Chain, w.begin.From, w.end.End)), 0o644); err != nil {
		return err
	}
	return w.discard()
}

func (w *segmentWriter) discard() error { return w.file.Discard() }

// readSegment reads a segment to its end, and demands that it is whole. each gets its
// records before the end is known to be there.
func readSegment(r io.Reader, identities []age.Identity, each func(segmentBegin, *record) error) (*segment, error) {
	opened, err := decrypt(r, identities)
	if err != nil {
		return nil, err
	}
	unpacked, err := gzip.NewReader(opened)
	if errors.Is(err, gzip.ErrHeader) {
		return nil, refuse(hintForeign, "it is not a segment of a journal: something else is encrypted in it")
	}
	if err != nil {
		return nil, damaged(err)
	}
	s, err := parseSegment(unpacked, each)
	if err != nil {
		return nil, damaged(err)
	}
	for _, r := range []io.Reader{unpacked, opened} {
		if err := ended(r); err != nil {
			return nil, damaged(err)
		}
	}
	return s, nil
}

// parseSegment reads the lines of a segment.
func parseSegment(r io.Reader, each func(segmentBegin, *record) error) (*segment, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxRecord)
	next := func() ([]byte, error) {
		if !lines.Scan() {
			if err := lines.Err(); err != nil {
				return nil, err
			}
			return nil, errors.New("it has no end")
		}
		return lines.Bytes(), nil
	}
	line, err := next()
	if err != nil {
		return nil, err
	}
	s := &segment{}
	if err := s.readBegin(line); err != nil {
		return nil, err
	}
	p := place{last: s.begin.From}
	for {
		if line, err = next(); err != nil {
			return nil, err
		}
		if bytes.HasPrefix(line, []byte(`{"end"`)) {
			break
		}
		rec := &record{}
		if err := strictly(line, rec); err != nil {
			return nil, err
		}
		if err := p.step(rec); err != nil {
			return nil, err
		}
		if err := each(s.begin, rec); err != nil {
			return nil, &notOurs{err}
		}
	}
	if err := strictly(line, &s.end); err != nil {
		return nil, err
	}
	if p.inside || s.end.End != p.last || s.end.Transactions != p.transactions {
		return nil, errors.New("its end does not fit what comes before it")
	}
	if lines.Scan() {
		return nil, errors.New("something follows its end")
	}
	return s, lines.Err()
}

func (s *segment) readBegin(line []byte) error {
	// A later format may have other fields.
	var is struct {
		Journal int `json:"journal"`
	}
	if err := json.Unmarshal(line, &is); err != nil || is.Journal == 0 {
		return refuse(hintForeign, "it is not a segment of a journal: something else is encrypted in it")
	}
	if is.Journal != journalFormat {
		return refuse("nothing was changed; take the release that made it, or a later one", "its format is %d, this release knows %d", is.Journal, journalFormat)
	}
	if err := strictly(line, &s.begin); err != nil {
		return err
	}
	if _, err := time.Parse(chainLayout, s.begin.Chain); err != nil {
		return fmt.Errorf("its chain is %q", s.begin.Chain)
	}
	return nil
}

// strictly decodes one line of JSON.
func strictly(line []byte, into any) error {
	decoder := json.NewDecoder(bytes.NewReader(line))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return fmt.Errorf("a line cannot be read: %w", err)
	}
	if decoder.InputOffset() != int64(len(line)) {
		return errors.New("a line has something behind it")
	}
	return nil
}

// place is how far a segment has been read.
type place struct {
	last         lsn // where the last transaction ends
	inside       bool
	transactions int
}

// step demands that a record is one that belongs there.
func (p *place) step(r *record) error {
	problem := fmt.Errorf("a line does not belong there: %q", r.Op)
	if p.inside == (r.Op == opBegin) {
		return problem
	}
	change := r.LSN == 0 && r.Number == 0 && r.Time == nil && knownTable.MatchString(r.Table) && len(r.Tables) == 0 && columnsOf(r.Key) && columnsOf(r.Row)
	var good bool
	switch r.Op {
	case opBegin:
		good = r.LSN >= p.last && r.Number > 0 && r.Time != nil && r.Table == "" && len(r.Tables)+len(r.Key)+len(r.Row) == 0
		p.inside, p.last = true, r.LSN
	case opCommit:
		good = r.LSN > p.last && r.Number == 0 && r.Time == nil && r.Table == "" && len(r.Tables)+len(r.Key)+len(r.Row) == 0
		p.inside, p.last = false, r.LSN
		p.transactions++
	case opInsert:
		good = change && len(r.Row) > 0 && len(r.Key) == 0
	case opUpdate:
		good = change && len(r.Row) > 0 && len(r.Key) > 0
	case opDelete:
		good = change && len(r.Row) == 0 && len(r.Key) > 0
	case opTruncate:
		good = r.LSN == 0 && r.Number == 0 && r.Time == nil && r.Table == "" && len(r.Tables) > 0 && len(r.Key)+len(r.Row) == 0
		for _, t := range r.Tables {
			good = good && knownTable.MatchString(t)
		}
	}
	if !good {
		return problem
	}
	return nil
}

var knownColumn = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func columnsOf(values map[string]*string) bool {
	for name := range values {
		if !knownColumn.MatchString(name) {
			return false
		}
	}
	return true
}
