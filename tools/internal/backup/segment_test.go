package backup

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	testBegin  = `{"journal":1,"chain":"20260131T030000Z","database":"7/5","root":"r","from":"0/10","above":7}`
	testInsert = `{"op":"insert","table":"public.used_ott","row":{"nkey":"\\x61","nvalue":null}}`
	testUpdate = `{"op":"update","table":"public.used_ott","key":{"nkey":"\\x61"},"row":{"nkey":"\\x62"}}`
	testDelete = `{"op":"delete","table":"public.used_ott","key":{"nkey":"\\x62"}}`
	testEmpty  = `{"op":"truncate","tables":["public.used_ott","infra_pki.backups"]}`
	testEnd    = `{"end":"0/30","transactions":1,"through":"2026-01-31T03:00:01Z"}`

	beginAt  = `{"op":"begin","lsn":"0/20","xid":7,"time":"2026-01-31T03:00:01Z"}`
	commitAt = `{"op":"commit","lsn":"0/30"}`
)

func segmentOf(lines ...string) string { return strings.Join(lines, "\n") + "\n" }

func parse(text string) (*segment, []record, error) {
	var records []record
	s, err := parseSegment(strings.NewReader(text), func(_ segmentBegin, r *record) error {
		records = append(records, *r)
		return nil
	})
	return s, records, err
}

func TestParseSegment(t *testing.T) {
	s, records, err := parse(segmentOf(testBegin, beginAt, testInsert, testUpdate, testDelete, testEmpty, commitAt, testEnd))
	require.NoError(t, err)
	require.Equal(t, segmentBegin{Journal: 1, Chain: "20260131T030000Z", Database: "7/5", Root: "r", From: 0x10, Above: 7}, s.begin)
	require.EqualValues(t, 0x30, s.end.End)
	require.Len(t, records, 6)

	notTheEnd := strings.Replace(testEnd, `"transactions":1`, `"transactions":0`, 1)
	tests := map[string]struct {
		text    string
		problem string
	}{
		"nothing":                                 {"", "it has no end"},
		"what is no journal":                      {segmentOf(`{"format":1}`), "it is not a segment of a journal"},
		"of a later format":                       {segmentOf(`{"journal":2}`), "its format is 2, this release knows 1"},
		"a field that nobody knows":               {segmentOf(strings.Replace(testBegin, `"from"`, `"more":1,"from"`, 1), testEnd), `unknown field "more"`},
		"a chain that is no time":                 {segmentOf(strings.Replace(testBegin, "20260131", "20261331", 1), testEnd), "its chain is"},
		"a place that is none":                    {segmentOf(strings.Replace(testBegin, "0/10", "10", 1), testEnd), `"10" is not a place in the write-ahead log`},
		"without its end":                         {segmentOf(testBegin, beginAt, testInsert, commitAt), "it has no end"},
		"a transaction without its end":           {segmentOf(testBegin, beginAt, testInsert, testEnd), "its end does not fit"},
		"another number of transactions":          {segmentOf(testBegin, beginAt, testInsert, commitAt, notTheEnd), "its end does not fit"},
		"an end before the last transaction":      {segmentOf(testBegin, beginAt, testInsert, commitAt, strings.Replace(testEnd, "0/30", "0/2F", 1)), "its end does not fit"},
		"something after its end":                 {segmentOf(testBegin, beginAt, testInsert, commitAt, testEnd, testEnd), "something follows its end"},
		"two values in a line":                    {segmentOf(testBegin, beginAt, testInsert+testInsert, commitAt, testEnd), "a line has something behind it"},
		"a change of no transaction":              {segmentOf(testBegin, testInsert, testEnd), `a line does not belong there: "insert"`},
		"a transaction in a transaction":          {segmentOf(testBegin, beginAt, beginAt, commitAt, testEnd), `does not belong there: "begin"`},
		"a commit of nothing":                     {segmentOf(testBegin, commitAt, testEnd), `does not belong there: "commit"`},
		"a transaction from before it":            {segmentOf(testBegin, strings.Replace(beginAt, "0/20", "0/F", 1), commitAt, testEnd), `does not belong there: "begin"`},
		"a commit that ends before it is":         {segmentOf(testBegin, beginAt, strings.Replace(commitAt, "0/30", "0/20", 1), testEnd), `does not belong there: "commit"`},
		"a table that no backup has":              {segmentOf(testBegin, beginAt, strings.Replace(testInsert, "public.", "pg_catalog.", 1), commitAt, testEnd), `"insert"`},
		"a name that would have to be quoted":     {segmentOf(testBegin, beginAt, strings.Replace(testInsert, "nkey", `a\"b`, 1), commitAt, testEnd), `"insert"`},
		"a row without columns":                   {segmentOf(testBegin, beginAt, `{"op":"insert","table":"public.used_ott"}`, commitAt, testEnd), `"insert"`},
		"an update of no row":                     {segmentOf(testBegin, beginAt, `{"op":"update","table":"public.used_ott","row":{"nkey":"a"}}`, commitAt, testEnd), `"update"`},
		"a deletion of no row":                    {segmentOf(testBegin, beginAt, `{"op":"delete","table":"public.used_ott"}`, commitAt, testEnd), `"delete"`},
		"an unknown deed":                         {segmentOf(testBegin, beginAt, `{"op":"drop","table":"public.used_ott"}`, commitAt, testEnd), `does not belong there: "drop"`},
		"a table of nobody that is to be empty":   {segmentOf(testBegin, beginAt, `{"op":"truncate","tables":["pg_catalog.pg_class"]}`, commitAt, testEnd), `"truncate"`},
		"a line that is no JSON":                  {segmentOf(testBegin, "{", testEnd), "a line cannot be read"},
		"a line that is longer than any can be":   {segmentOf(testBegin, strings.Repeat("a", maxRecord+1), testEnd), "token too long"},
		"an empty one that goes somewhere":        {segmentOf(testBegin, notTheEnd), "its end does not fit"},
		"an empty one, by which a journal begins": {segmentOf(testBegin, strings.Replace(notTheEnd, "0/30", "0/10", 1)), ""},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			_, _, err := parse(tc.text)
			if tc.problem == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, tc.problem)
		})
	}
}

// What is taken says the same when it is written again.
func FuzzSegment(f *testing.F) {
	f.Add(segmentOf(testBegin, beginAt, testInsert, testUpdate, testDelete, testEmpty, commitAt, testEnd))
	f.Add(segmentOf(testBegin, `{"end":"0/10","transactions":0,"through":"2026-01-31T03:00:01Z"}`))
	f.Fuzz(func(t *testing.T, text string) {
		s, records, err := parse(text)
		if err != nil {
			return
		}
		var again bytes.Buffer
		line := func(v any) {
			text, err := json.Marshal(v)
			require.NoError(t, err)
			again.Write(append(text, '\n'))
		}
		line(s.begin)
		for _, r := range records {
			line(r)
		}
		line(s.end)
		s2, records2, err := parse(again.String())
		require.NoError(t, err)
		require.Equal(t, s.begin, s2.begin)
		require.True(t, s.end.Through.Equal(s2.end.Through))
		require.Len(t, records2, len(records))
		for i := range records {
			for _, r := range []*record{&records[i], &records2[i]} {
				if r.Time != nil {
					at := r.Time.UTC().Round(0)
					r.Time = &at
				}
			}
			require.True(t, reflect.DeepEqual(records[i], records2[i]), "%v, %v", records[i], records2[i])
		}
	})
}

func TestSnapshot(t *testing.T) {
	s, err := parseSnapshot("10:20:12,15")
	require.NoError(t, err)
	for number, has := range map[uint64]bool{1: true, 9: true, 10: true, 12: false, 13: true, 15: false, 19: true, 20: false, 1 << 40: false} {
		require.Equal(t, has, s.has(number), number)
	}
	s, err = parseSnapshot("5000000000:5000000000:")
	require.NoError(t, err)
	require.True(t, s.has(4999999999))
	require.False(t, s.has(5000000000))
	for _, text := range []string{"", "1:2", "1:2:a", "a:2:", "1:2:3:4", "-1:2:"} {
		_, err := parseSnapshot(text)
		require.ErrorContains(t, err, "is not a snapshot", text)
	}
}

// Numbers of transactions start again after four thousand million.
func TestWiden(t *testing.T) {
	for name, tc := range map[string]struct {
		number uint32
		near   uint64
		want   uint64
	}{
		"a later one":                     {1001, 1000, 1001},
		"an earlier one":                  {999, 1000, 999},
		"in the third round":              {7, 2<<32 + 5, 2<<32 + 7},
		"that begins the next round":      {3, 1<<32 - 1, 1<<32 + 3},
		"of the round that has just past": {1<<32 - 2, 1<<32 + 3, 1<<32 - 2},
	} {
		require.Equal(t, tc.want, widen(tc.number, tc.near), name)
	}
}
