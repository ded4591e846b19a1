package redisstream

import (
	"context"
	"fmt"
	"hash/fnv"

	"github.com/redis/rueidis"
)

// Extent is how far a stream ever reached. Top and Added only grow, as long as it is the same stream.
type Extent struct {
	// Top is the greatest id the stream ever had; 0-0 when there is no stream.
	Top string
	// Added is how many entries were ever added; -1 when Redis does not count them, as before Redis 7.
	Added int64
	// Mark is an entry that the stream had, the greatest that is known.
	Mark Mark
}

// Mark is an entry by which a stream can be told from another one of its name.
type Mark struct {
	ID     string // empty: none
	Digest int64  // of its fields
}

// Join returns the greater of both, part by part.
func (e Extent) Join(o Extent) Extent {
	if CompareIDs(e.Top, o.Top) < 0 {
		e.Top = o.Top
	}
	if CompareIDs(e.Mark.ID, o.Mark.ID) < 0 {
		e.Mark = o.Mark
	}
	e.Added = max(e.Added, o.Added)
	return e
}

// Sight is what Redis shows of a stream at one moment. The mark of its extent is the newest entry.
type Sight struct {
	Extent
	Length int64
	// First is the id of the first entry, Deleted the greatest that was deleted by its id; empty when Redis does not tell, as
	// before Redis 7.
	First, Deleted string
	// Entries are the digests of the entries that were asked for, as far as the stream has them.
	Entries map[string]int64
}

// Continues says whether the stream can be the one that reached as far as past. Its mark must have been asked for.
func (s Sight) Continues(past Extent) bool {
	if CompareIDs(s.Top, past.Top) < 0 || s.Added >= 0 && s.Added < past.Added {
		return false
	}
	if past.Mark.ID == "" {
		return true
	}
	if digest, there := s.Entries[past.Mark.ID]; there {
		return digest == past.Mark.Digest
	}
	return s.mayHaveRemoved(past)
}

// mayHaveRemoved says whether a mark that is no longer there can have been deleted or trimmed. Only Redis 7 keeps what would
// show that it was not; a stream that an older one has filled and Redis 7 has loaded does not have it.
func (s Sight) mayHaveRemoved(past Extent) bool {
	return s.First == "" || past.Added < 0 || s.Length == 0 ||
		CompareIDs(s.First, past.Mark.ID) > 0 || CompareIDs(s.Deleted, past.Mark.ID) >= 0
}

// Digest tells the fields of an entry from those of another one of the same id.
func Digest(fields []Field) int64 {
	h := fnv.New64a()
	for _, f := range fields {
		for _, text := range [2]string{f.Field, f.Value} {
			// The hash never fails. A length before each text keeps "ab","c" from being "a","bc".
			fmt.Fprintf(h, "%d:", len(text))
			_, _ = h.Write([]byte(text))
		}
	}
	return int64(h.Sum64())
}

// look asks how far the stream reaches, and for the entries of some ids; an empty id is left out.
func (m *Member) look(ctx context.Context, ids ...string) (Sight, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	asked := make([]string, 0, len(ids))
	for _, id := range ids {
		if id != "" {
			asked = append(asked, id)
		}
	}
	answer, err := extentScript.Exec(ctx, m.client, []string{m.cfg.Stream}, asked).ToArray()
	if re, ok := rueidis.IsRedisErr(err); ok && hasPrefix(re.Error(), "no such key") {
		return Sight{Extent: Extent{Top: firstID, Added: -1}}, nil
	}
	s, err := sight(answer, err)
	if err != nil {
		return Sight{}, fmt.Errorf("read the extent of stream %q: %w", m.cfg.Stream, err)
	}
	return s, nil
}

// sight reads the answer of extent.lua.
func sight(answer []rueidis.RedisMessage, err error) (s Sight, _ error) {
	const parts = 6 // before the entries that were asked for
	if err == nil && len(answer) < parts {
		err = fmt.Errorf("unexpected answer of %d parts", len(answer))
	}
	if err != nil {
		return s, err
	}
	texts := [3]*string{&s.Top, &s.First, &s.Deleted}
	for i, at := range [3]int{0, 3, 4} {
		if *texts[i], err = answer[at].ToString(); err != nil {
			return s, err
		}
	}
	if s.Added, err = answer[1].ToInt64(); err != nil {
		return s, err
	}
	if s.Length, err = answer[2].ToInt64(); err != nil {
		return s, err
	}
	s.Entries = map[string]int64{}
	for i, entry := range answer[parts-1:] {
		if entry.IsNil() {
			continue
		}
		e, err := entry.AsXRangeSlice()
		if err != nil {
			return s, err
		}
		if i == 0 {
			s.Mark = Mark{ID: e.ID, Digest: Digest(e.FieldValues)}
		} else {
			s.Entries[e.ID] = Digest(e.FieldValues)
		}
	}
	return s, nil
}
