package backup

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// Position is the moment that an archive is of, in the numbers of the database that it
// was made from: what a journal has to begin with.
type Position struct {
	// Database is of one server's one database: SYSTEM/OID. A database that was restored
	// is another one, and counts anew.
	Database string `json:"database"`
	// Snapshot is pg_current_snapshot(): which transactions the archive has.
	Snapshot string `json:"snapshot"`
}

const databaseQuery = `(select system_identifier::text from pg_catalog.pg_control_system()) || '/' ||
	(select oid::text from pg_catalog.pg_database where datname = pg_catalog.current_database())`

// snapshot is which transactions are over (PostgreSQL 15, section 9.27.9, pg_snapshot).
type snapshot struct {
	min, max uint64
	running  []uint64
}

func parseSnapshot(text string) (s snapshot, err error) {
	parts := strings.Split(text, ":")
	if len(parts) != 3 {
		return s, fmt.Errorf("%q is not a snapshot", text)
	}
	numbers := parts[:2]
	if parts[2] != "" {
		numbers = append(numbers, strings.Split(parts[2], ",")...)
	}
	for i, n := range numbers {
		number, err := strconv.ParseUint(n, 10, 64)
		switch {
		case err != nil:
			return s, fmt.Errorf("%q is not a snapshot", text)
		case i == 0:
			s.min = number
		case i == 1:
			s.max = number
		default:
			s.running = append(s.running, number)
		}
	}
	return s, nil
}

// has tells whether what a transaction did is in the snapshot.
func (s snapshot) has(number uint64) bool {
	return number < s.min || number < s.max && !slices.Contains(s.running, number)
}

// Journal is what was committed after an archive, found to be whole.
type Journal struct {
	Segments     int
	Transactions int       // that the archive does not have
	Through      time.Time // the last one was committed

	dir        string
	identities []age.Identity
	base       snapshot
	files      []*segment
	schemas    map[lsn]int32       // by the commit of the transaction that makes it
	tables     map[string][]string // columns that rows were inserted with, by table
}

const (
	hintSegment = "nothing was changed; take another copy of this segment. Without it, move it and the segments after it away, " +
		"and the restore reaches to where it begins"
	hintForeignSegment = "nothing was changed; a segment is what \"pkictl backup journal\" wrote, journal-….age: move other files away"
	hintLater          = "nothing was changed; take a later backup, or put the missing segments there. Without either, move the segments from %q on away, " +
		"and the restore reaches to where they begin"
)

// OpenJournal reads every segment in dir to its end, and finds those that continue the
// archive: all that were written after it, without a gap.
func OpenJournal(dir string, identities []age.Identity, c *Contents) (*Journal, error) {
	if c.Position == nil {
		return nil, oneshot.WithHint(errors.New("reading the journal: the backup does not say where it would have to begin"),
			"nothing was changed; an earlier release made this backup: take a later one, or restore it without the journal")
	}
	base, err := parseSnapshot(c.Position.Snapshot)
	if err != nil {
		return nil, refuse(hintDamaged, "its manifest: %w", err)
	}
	j := &Journal{dir: dir, identities: identities, base: base, schemas: map[lsn]int32{}, tables: map[string][]string{}}
	names, err := segmentNames(dir)
	if err != nil {
		return nil, err
	}
	runs, err := j.runs(names, c.Root)
	if err != nil {
		return nil, err
	}
	if err := j.choose(runs, c); err != nil {
		return nil, err
	}
	return j, j.survey(c)
}

// segmentNames lists the segments in dir, in their order.
func segmentNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, fmt.Errorf("reading the journal: %w", err)
	}
	var names []string
	for _, e := range entries {
		switch name := e.Name(); {
		case segmentName.MatchString(name):
			names = append(names, name)
		case strings.HasPrefix(name, "journal-"):
			return nil, oneshot.WithHint(fmt.Errorf("reading the journal: %q is not the name of a segment", filepath.Join(dir, name)), "%s", hintForeignSegment)
		}
	}
	if len(names) == 0 {
		return nil, oneshot.WithHint(fmt.Errorf("reading the journal: %q holds no segment", dir), "nothing was changed; segments are files journal-….age, JOURNAL_DIR of the machine that is lost")
	}
	return names, nil
}

// runs reads the segments and divides them where one does not continue the one before.
func (j *Journal) runs(names []string, root string) ([][]*segment, error) {
	var runs [][]*segment
	var reached lsn
	for _, name := range names {
		s, err := j.read(name, func(segmentBegin, *record) error { return nil })
		if err != nil {
			return nil, err
		}
		if s.begin.Root != root {
			return nil, oneshot.WithHint(fmt.Errorf("reading the journal: %q is of the CA with root %s, the backup of root %s", name, s.begin.Root, root),
				"nothing was changed; take the journal of this CA")
		}
		last := len(runs) - 1
		continues := last >= 0 && s.begin.From <= reached && runs[last][0].begin.Chain == s.begin.Chain
		if continues && runs[last][0].begin.Database != s.begin.Database {
			return nil, oneshot.WithHint(fmt.Errorf("reading the journal: %q is of another database than the segment before it", name), "%s", hintForeignSegment)
		}
		if continues {
			runs[last], reached = append(runs[last], s), max(reached, s.end.End)
		} else {
			runs, reached = append(runs, []*segment{s}), s.end.End
		}
	}
	return runs, nil
}

// choose finds the last run that has everything since the archive, and refuses if there is a later one.
func (j *Journal) choose(runs [][]*segment, c *Contents) error {
	chosen := -1
	for i, run := range runs {
		// Each transaction that the archive lacks has a higher number than those of earlier segments.
		if run[0].begin.Database == c.Position.Database && j.base.min >= run[0].begin.Above {
			chosen = i
		}
	}
	taken := c.Taken.Format(time.RFC3339)
	if chosen < 0 {
		first := runs[len(runs)-1][0]
		if first.begin.Database != c.Position.Database {
			return oneshot.WithHint(fmt.Errorf("reading the journal: it is of another database than the backup of %s", taken),
				"nothing was changed; a database that was restored or made anew begins another journal, which goes with the backups since")
		}
		return oneshot.WithHint(fmt.Errorf("reading the journal: what was committed between the backup of %s and %q is missing", taken, first.name),
			hintLater, first.name)
	}
	if chosen < len(runs)-1 {
		run, next := runs[chosen], runs[chosen+1][0]
		last := run[len(run)-1]
		if next.begin.Chain == last.begin.Chain {
			return oneshot.WithHint(fmt.Errorf("reading the journal: a segment is missing between %q and %q", last.name, next.name), hintLater, next.name)
		}
		return oneshot.WithHint(fmt.Errorf("reading the journal: it began anew with %q, and lacks what was committed since %s", next.name, last.end.Through.Format(time.RFC3339)),
			hintLater, next.name)
	}
	j.files = runs[chosen]
	j.Segments, j.Through = len(j.files), j.files[len(j.files)-1].end.Through
	return nil
}

// read reads one segment and says which one when it is not in order.
func (j *Journal) read(name string, each func(segmentBegin, *record) error) (*segment, error) {
	file, err := os.Open(filepath.Join(j.dir, name))
	if err != nil {
		return nil, oneshot.WithHint(fmt.Errorf("reading the journal: %w", err), "the user of the container has to be able to read it: chmod a+r")
	}
	defer file.Close() //nolint:errcheck // read only
	s, err := readSegment(file, j.identities, each)
	if err == nil && nameOf(s.begin.Chain, s.begin.From, s.end.End) != name {
		err = refuse(hintForeignSegment, "it is another segment than its name says")
	}
	var known *refusal
	if errors.As(err, &known) {
		hint := oneshot.Hints(err)
		why := map[string]string{hintDamaged: hintSegment, hintForeign: hintForeignSegment}
		err = fmt.Errorf("reading the journal: %q: %w", name, known.err)
		if len(hint) > 0 {
			err = oneshot.WithHint(err, "%s", cmp.Or(why[hint[0]], hint[0]))
		}
	}
	if err != nil {
		return nil, err
	}
	s.name = name
	return s, nil
}

// each goes through the transactions that the archive does not have, each once, in the
// order in which they were committed.
func (j *Journal) each(do func(*record) error) error {
	var reached lsn
	for _, want := range j.files {
		skip := false
		s, err := j.read(want.name, func(_ segmentBegin, r *record) error {
			if r.Op == opBegin {
				// A journal that was killed may have written what the segment before has.
				if skip = r.LSN < reached || j.base.has(r.Number); !skip {
					reached = r.LSN
				}
			}
			if skip {
				return nil
			}
			if r.Op == opCommit {
				reached = r.LSN
			}
			return do(r)
		})
		if err != nil {
			return err
		}
		if !reflect.DeepEqual(s, want) {
			return fmt.Errorf("reading the journal: %q changed while it was read", want.name)
		}
	}
	return nil
}

const versionTable = "infra_pki.version"

// survey notes what a restore has to prepare for.
func (j *Journal) survey(c *Contents) error {
	var at lsn
	known := c.Schema
	return j.each(func(r *record) error {
		switch {
		case r.Op == opBegin:
			at, j.Transactions = r.LSN, j.Transactions+1
		case r.Table == versionTable && r.Row != nil:
			version, err := versionOf(r)
			if err != nil || version < known {
				return fmt.Errorf("reading the journal: the transaction at %s makes no schema that follows %d", at, known)
			}
			j.schemas[at], known = version, version
		case r.Op == opInsert:
			if _, ok := j.tables[r.Table]; !ok {
				j.tables[r.Table] = columns(r.Row)
			}
		}
		return nil
	})
}

func versionOf(r *record) (int32, error) {
	value := r.Row["version"]
	if value == nil {
		return 0, errors.New("it has no version")
	}
	version, err := strconv.ParseInt(*value, 10, 32)
	return int32(version), err
}

// Schema is the last one that the journal makes, or the archive's.
func (j *Journal) schema(archive int32) int32 {
	for _, version := range j.schemas {
		archive = max(archive, version)
	}
	return archive
}

func columns(row map[string]*string) []string {
	names := make([]string, 0, len(row))
	for name := range row {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
