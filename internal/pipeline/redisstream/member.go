package redisstream

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/redis/rueidis"
)

// Config of a Member.
type Config struct {
	Stream   string // key of the stream
	Group    string // consumer group; created when it is missing
	Consumer string // this member's name; unique among living members
	// FromLatest makes a new group begin with the entries that come after it. Default: with the first entry there is.
	FromLatest bool
	// ReclaimAfter is how long an entry must have been idle before it counts as abandoned. Required.
	ReclaimAfter time.Duration
	// Version of the server. The zero value is the oldest that is supported.
	Version Version
	// Delete makes Ack delete the entries too, whatever other groups have read.
	Delete bool
	// Exclusive makes the member read only while it owns the stream; see Tend.
	Exclusive bool
	// Incarnations remember the stream beyond this process; nil: nobody does.
	Incarnations Incarnations
}

// Limits of a Member's calls.
const (
	callTimeout    = 3 * time.Second        // longest wait for an answer of Redis beyond a deliberate block
	ackPage        = 1000                   // entries acknowledged per script call
	releasePage    = 500                    // entries given back per script call
	refreshPage    = 500                    // entries refreshed per script call
	releasedIdle   = 3600 * 1000            // milliseconds of idleness that a released entry is given
	staleFactor    = 20                     // a consumer is stale after this many ReclaimAfter without a sign of life
	minStale       = 10 * time.Minute       // … and never sooner than this
	reclaimPause   = 50 * time.Millisecond  // shortest time between two looks for abandoned entries
	reclaimEvery   = 5 * time.Second        // longest time between two looks for abandoned entries
	reclaimTrimmed = time.Minute            // the same where reading takes them over, and only trimmed ones are left
	rejoinPause    = 100 * time.Millisecond // between making a group and making it again, at first
	maxRejoinPause = 10 * time.Second       // … and at most
	rejoinCalm     = time.Minute            // without a vanished group, after which the pause begins again
	countLimit     = 1000                   // entries that are counted when Redis cannot tell the lag
	pendingLookup  = 128                    // lookups of delivery counts per round trip
	releasedName   = "millrace:released"    // consumer that owns entries between their release and their next delivery
	earliest       = "0"                    // XREADGROUP: this consumer's own pending entries from the start
	latest         = "$"                    // XGROUP CREATE: only what comes after
	undelivered    = ">"                    // XREADGROUP: entries never delivered to any consumer
	firstID        = "0-0"                  // before every id; XAUTOCLAIM: the list is through
)

// Field is one field of an entry. Order and repetition of fields are kept.
type Field = rueidis.XRangeFieldValue

// Entry is one entry of the stream.
type Entry struct {
	ID     string
	Fields []Field
	// Term is what Ack and Forget want back.
	Term Term
	// Deliveries is how often the entry has been handed out, this time included; 0 when only Redis knows.
	Deliveries int
}

// Counters are what happened to a Member's entries besides reading and acknowledging.
type Counters struct {
	Reclaimed int64 // taken over because they were idle for too long
	Trimmed   int64 // pending entries that Redis had deleted or trimmed before they were settled
	Stolen    int64 // held entries that another member took over
	Fenced    int64 // outcomes that came too late, because the entries were no longer this member's
}

// Member is one consumer of one group of one stream. Read must be called by one goroutine; the other methods are safe
// for concurrent use.
type Member struct {
	client rueidis.Client
	cfg    Config

	// Only Read uses these.
	ownCursor   string // place in this consumer's own pending list; empty when that has been read
	claimCursor string // place in the group's pending list
	claimDue    time.Time
	rejoinDue   time.Time // not before then is a group made again
	rejoinPause time.Duration

	reading sync.Mutex // with Exclusive: a read is under way

	mu       sync.Mutex
	held     map[string]time.Time // entry to the time of its last sign of life
	lastRead string               // greatest id read with >; empty when nothing was read since the stream began anew
	// readNewCount is how many entries were read with >. A stream to which fewer were added is another stream.
	readNewCount int64
	seen         Extent // how far the stream reached, as far as this member knows; see reach
	newest       Entry  // with the greatest id of those that were read; the next mark
	remembered   Extent // what of it Incarnations remember
	incarnation  int
	suspect      bool   // the stream may have begun anew; verify finds out
	opened       uint64 // connections of the client when it was verified last
	ownAgain     bool   // Read shall begin with what is pending for this member
	lease        lease
	counters     Counters
}

// NewMember returns a member. Call Join before the first Read.
func NewMember(client rueidis.Client, cfg Config) *Member {
	return &Member{
		client: client, cfg: cfg,
		ownCursor: earliest, claimCursor: earliest,
		held: map[string]time.Time{},
		seen: Extent{Top: firstID, Added: -1}, remembered: Extent{Top: firstID, Added: -1},
	}
}

// Config returns what the member was made with.
func (m *Member) Config() Config { return m.cfg }

// Counters returns the counts so far.
func (m *Member) Counters() Counters {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.counters
}

// Held returns how many entries the member holds.
func (m *Member) Held() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.held)
}

// Forget stops holding entries without acknowledging them. They stay pending, and count as abandoned after ReclaimAfter.
func (m *Member) Forget(t Term, ids []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t != m.term() {
		return // what is held by now under these ids was read anew
	}
	for _, id := range ids {
		delete(m.held, id)
	}
}

// hold starts holding entries and drops from the list those that are held already (R2).
func (m *Member) hold(entries []Entry) []Entry {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(entries) > 0 {
		m.saw(entries[len(entries)-1]) // they are in the order of the stream
	}
	kept := entries[:0]
	for _, e := range entries {
		if _, ok := m.held[e.ID]; ok {
			continue
		}
		m.held[e.ID] = now
		e.Term = m.term()
		kept = append(kept, e)
	}
	return kept
}

// call bounds one round trip.
func call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, callTimeout)
}

// companion is the beginning of the names of keys that belong to a stream: whatever follows it, they are in its slot.
func companion(stream string) string {
	if open := strings.IndexByte(stream, '{'); open >= 0 {
		if n := strings.IndexByte(stream[open:], '}'); n > 1 {
			return stream // it has a hash tag of its own
		}
	}
	return "{" + stream + "}"
}
