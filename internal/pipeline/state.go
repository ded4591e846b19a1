package pipeline

import (
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// State remembers the latest record of each key, bounded by a number of keys. It is updated before the write, so it shows
// what has been seen, durable or not; an item that comes again changes nothing but its count.
//
// It lives in one process: when several processors share a Redis group, each sees only the entries that it read.
type State struct {
	columns               []config.Column
	keyColumn, timeColumn int
	keyType               config.ColumnType
	maxKeys               int
	asked                 bool // Before is wanted

	mu      sync.Mutex
	records map[string]*record
	newest  *record // most recently used; the list runs from here through older
	oldest  *record
	evicted int64
	// recent holds the records of the last rows that were taken in, each at its number.
	recent [recentRows]*record
	rows   uint64 // taken in so far
}

// recentRows is how many rows are kept as they were decoded, together with the other rows and the entry that they came with.
// Most are replaced soon; only those that are not are copied, so that a key that has become silent keeps its own row and no more.
const recentRows = 4096

// Record is what State knows of one key.
type Record struct {
	Key string
	// Last is the row with the greatest time; among rows of the same time, the one that came last.
	Last []Value
	// LastSeen is the greatest time seen, so that old records coming late do not set it back.
	LastSeen time.Time
	// Count of records since this process first saw the key, redeliveries included.
	Count int64

	columns []config.Column // of Last
}

type record struct {
	Record
	lastMicros   int64
	number       uint64 // of Last among the rows that were taken in
	stream       string // of the item that was seen last
	place        place  // the furthest in that stream
	newer, older *record
}

// NewState returns the state that the configuration asks for, or nil when it asks for none.
func NewState(c *config.Config) *State {
	if c.State == nil {
		return nil
	}
	s := &State{columns: c.Mapping.Columns, maxKeys: c.State.MaxKeys, records: map[string]*record{}}
	for i, col := range c.Mapping.Columns {
		if col.Name == c.State.Key {
			s.keyColumn, s.keyType = i, col.Type
		}
		if col.Name == c.State.Time {
			s.timeColumn = i
		}
	}
	return s
}

// Update takes in decoded items. Items without key or time are left out.
func (s *State) Update(items []*Item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, it := range items {
		key, at := it.Row[s.keyColumn], it.Row[s.timeColumn]
		if !key.Valid || !at.Valid {
			continue
		}
		r := s.update(s.keyText(key), at.N, it.Row)
		if !s.asked {
			continue
		}
		if p := placeOf(it); it.Stream != r.stream || p.after(r.place) {
			r.stream, r.place = it.Stream, p
		}
	}
}

// Before returns what was known of an item's key before that item: nil when nothing was. Of an item that may have been seen
// already nobody knows that any more; then too the answer is nil. So an expression that leaves out what has not changed never
// leaves out an item because of itself, however often and by whatever way it comes again.
func (s *State) Before(it *Item) *Record {
	key, at := it.Row[s.keyColumn], it.Row[s.timeColumn]
	if !key.Valid {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.records[s.keyText(key)]
	if !ok {
		return nil
	}
	// What has been seen set lastMicros to its time at least, and place to its own, unless that was another stream's.
	isNew := at.Valid && at.N > r.lastMicros || it.Stream == r.stream && placeOf(it).after(r.place)
	if !isNew {
		return nil
	}
	known := r.Record
	return &known
}

// place is where an item stands in its stream.
type place struct{ major, minor uint64 }

func (p place) after(o place) bool {
	return p.major > o.major || p.major == o.major && p.minor > o.minor
}

// placeOf is the position of a message, or the two numbers of a Redis entry's id.
func placeOf(it *Item) place {
	if it.Position != 0 {
		return place{major: uint64(it.Position)}
	}
	major, minor, _ := strings.Cut(it.ID, "-")
	var p place
	p.major, _ = strconv.ParseUint(major, 10, 64) // an id that is none stands before all others
	p.minor, _ = strconv.ParseUint(minor, 10, 64)
	return p
}

func (s *State) keyText(v Value) string {
	if isBytes(s.keyType) {
		return v.S
	}
	return strconv.FormatInt(v.N, 10)
}

func (s *State) update(key string, at int64, row []Value) *record {
	r, ok := s.records[key]
	if !ok {
		key = strings.Clone(key) // the key would otherwise keep its whole entry in memory
		r = &record{Record: Record{Key: key, columns: s.columns}, lastMicros: at}
		s.records[key] = r
	} else {
		s.unlink(r)
	}
	s.link(r)
	r.Count++
	if r.Last == nil || at >= r.lastMicros {
		r.Last, r.lastMicros = row, at
		s.remember(r)
		r.LastSeen = time.UnixMicro(at).UTC()
	}
	if len(s.records) > s.maxKeys {
		delete(s.records, s.oldest.Key)
		s.unlink(s.oldest)
		s.evicted++
	}
	return r
}

// remember numbers a record's new row, and copies the row that is no longer a recent one, unless it has been replaced.
func (s *State) remember(r *record) {
	place := &s.recent[s.rows%recentRows]
	if old := *place; old != nil && old.number+recentRows == s.rows {
		old.Last = copyRow(old.Last)
	}
	*place, r.number = r, s.rows
	s.rows++
}

// copyRow returns a row that shares no memory with the one that was decoded.
func copyRow(row []Value) []Value {
	own := slices.Clone(row)
	for i := range own {
		own[i].S = strings.Clone(own[i].S)
	}
	return own
}

func (s *State) link(r *record) {
	r.newer, r.older = nil, s.newest
	if s.newest != nil {
		s.newest.newer = r
	} else {
		s.oldest = r
	}
	s.newest = r
}

func (s *State) unlink(r *record) {
	if r.newer != nil {
		r.newer.older = r.older
	} else {
		s.newest = r.older
	}
	if r.older != nil {
		r.older.newer = r.newer
	} else {
		s.oldest = r.newer
	}
}

// Get returns the record of a key. It does not count as use.
func (s *State) Get(key string) (Record, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.records[key]; ok {
		return r.Record, true
	}
	return Record{}, false
}

// Size returns how many keys are remembered, and how many have been evicted.
func (s *State) Size() (keys int, evicted int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.records), s.evicted
}
