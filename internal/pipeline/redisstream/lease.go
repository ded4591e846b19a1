package redisstream

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/redis/rueidis"
)

// Term is the right by which an entry was read: the incarnation of its stream and, with Exclusive, the lease of the stream.
// When either has ended, the entry is no longer this member's to settle (R7, R8).
type Term struct {
	Incarnation int
	Epoch       string // of the lease; empty without Exclusive
}

// lease is what a member knows of its ownership of the stream.
type lease struct {
	epoch  string // empty: not the owner
	until  time.Time
	giving bool  // about to be given to another member: nothing more is read
	err    error // why the lease could not be tended last time
}

// Current says whether what was read in a term may still be written and settled. It asks nobody: with Exclusive it is true
// until the lease would have ended had Redis not heard of this member since.
func (m *Member) Current(t Term) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current(t)
}

func (m *Member) current(t Term) bool {
	return t == m.term() && (!m.cfg.Exclusive || t.Epoch != "" && time.Now().Before(m.lease.until))
}

func (m *Member) term() Term { return Term{Incarnation: m.incarnation, Epoch: m.lease.epoch} }

// Standing is what is known of the right to entries that were read in a term.
type Standing uint8

// Standings.
const (
	Held    Standing = iota // they may be written
	Unknown                 // the lease has run out and Redis has not said whose it is; ask again
	Lost                    // another member has them, or will
)

// Standing tells whether entries read in a term may be written. Those of an earlier incarnation of the stream may: nobody
// else has them any more.
func (m *Member) Standing(t Term) Standing {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case !m.cfg.Exclusive || t.Incarnation != m.incarnation:
		return Held
	case m.suspect:
		return Unknown
	case t.Epoch != m.lease.epoch:
		return Lost
	case time.Now().Before(m.lease.until):
		return Held
	}
	return Unknown
}

// Owner says whether the member owns the stream.
func (m *Member) Owner() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lease.epoch != "" && time.Now().Before(m.lease.until)
}

// What Tend asks of lease.lua.
const (
	leaseKeep  = "keep"
	leaseTake  = "take"
	leaseGive  = "give"
	leaseLeave = "leave"
)

// Tend keeps this member among those that share the streams, renews the lease of the stream, and takes or gives it as
// the shares are: of the living members in the order of their names, the n-th owns the streams whose index is n modulo
// their number. Call it much more often than ReclaimAfter, which is how long a lease lasts without it.
//
// A stream changes hands when its owner has settled everything that it had read, or when the lease has ended.
func (m *Member) Tend(ctx context.Context, index int) error {
	members, err := m.tend(ctx, leaseKeep)
	if err != nil {
		return err
	}
	if err := m.verified(ctx); err != nil {
		return err
	}
	slices.Sort(members)
	mine := len(members) > 0 && members[index%len(members)] == m.cfg.Consumer
	m.mu.Lock()
	owner := m.lease.epoch != ""
	m.lease.giving = owner && !mine
	m.mu.Unlock()
	switch {
	case mine && !owner:
		_, err = m.tend(ctx, leaseTake) // in vain while another has it
	case !mine && owner:
		m.reading.Lock() // no read is under way that could bring something more
		defer m.reading.Unlock()
		if m.Held() == 0 {
			_, err = m.tend(ctx, leaseGive)
		}
	}
	return err
}

// tend runs lease.lua and returns the living members.
func (m *Member) tend(ctx context.Context, want string) ([]string, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	m.mu.Lock()
	epoch := m.lease.epoch
	m.mu.Unlock()
	if epoch == "" {
		epoch = "0"
	}
	began := time.Now()
	answer, err := leaseScript.Exec(ctx, m.client, []string{m.leaseKey()},
		[]string{m.cfg.Consumer, epoch, strconv.FormatInt(m.cfg.ReclaimAfter.Milliseconds(), 10), want}).AsStrSlice()
	if err == nil && len(answer) < 2 {
		err = fmt.Errorf("unexpected answer of %d parts", len(answer))
	}
	if err != nil {
		err = fmt.Errorf("tend the lease of stream %q: %w", m.cfg.Stream, err)
		m.mu.Lock()
		m.lease.err = err
		m.mu.Unlock()
		return nil, err
	}
	owner, epoch, members := answer[0], answer[1], answer[2:]
	// Redis counts from later on; the rest is for clocks that do not run alike.
	until := began.Add(m.cfg.ReclaimAfter * 9 / 10)
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case owner != m.cfg.Consumer:
		m.dropLease()
	case m.lease.epoch == epoch:
		m.lease.until, m.lease.err = until, nil
	default:
		m.dropLease()
		m.lease = lease{epoch: epoch, until: until}
		m.ownAgain = true // begin with what the last owner left
	}
	return members, nil
}

// dropLease forgets everything that was held under the lease.
func (m *Member) dropLease() {
	if n := len(m.held); n > 0 {
		m.counters.Stolen += int64(n)
		m.suspect = true // or Redis has lost its data, and nobody has them
		clear(m.held)
	}
	m.lease = lease{}
}

// leaseKey is in the slot of the stream, because a script of a Cluster may only use keys of one slot.
func (m *Member) leaseKey() string {
	return companion(m.cfg.Stream) + ":millrace:lease:" + m.cfg.Group
}

// readOwned reads as the owner of the stream: first everything that is pending, whoever had it, in the order of the
// stream, then what is new. Each read checks the lease in the same script, so that what a former owner reads late is
// nothing (R8). Without the lease it waits.
func (m *Member) readOwned(ctx context.Context, count int, block time.Duration) ([]Entry, bool, error) {
	entries, more, err := m.readAsOwner(ctx, count)
	if err != nil || len(entries) > 0 || more {
		return entries, more, err
	}
	if !m.Owner() {
		select {
		case <-ctx.Done():
		case <-time.After(block):
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		return nil, false, m.lease.err // a member that cannot become the owner says why
	}
	// Waiting is apart from reading, because a script cannot wait, and what a command that waits brings is not checked.
	m.mu.Lock()
	after := m.lastRead
	m.mu.Unlock()
	if after == "" {
		after = latest
	}
	wait, cancel := context.WithTimeout(ctx, block+callTimeout)
	defer cancel()
	err = m.client.Do(wait, m.client.B().Xread().Count(1).Block(max(block.Milliseconds(), 1)).Streams().Key(m.cfg.Stream).Id(after).Build()).Error()
	if rueidis.IsRedisNil(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("wait for stream %q: %w", m.cfg.Stream, err)
	}
	return m.readAsOwner(ctx, count)
}

func (m *Member) readAsOwner(ctx context.Context, count int) ([]Entry, bool, error) {
	m.reading.Lock()
	defer m.reading.Unlock()
	m.mu.Lock()
	may := m.lease.epoch != "" && !m.lease.giving && time.Now().Before(m.lease.until)
	m.mu.Unlock()
	if !may {
		return nil, false, nil
	}
	if m.ownCursor != "" {
		entries, next, err := m.autoclaim(ctx, 0, m.ownCursor, count)
		if err != nil {
			return nil, false, err
		}
		if m.ownCursor = next; next == firstID {
			m.ownCursor = ""
		}
		return entries, true, nil
	}
	if !time.Now().Before(m.claimDue) {
		if entries, err := m.reclaim(ctx, count); err != nil || len(entries) > 0 {
			return entries, true, err
		}
	}
	callCtx, cancel := call(ctx)
	defer cancel()
	answer, err := m.owned(callCtx, "XREADGROUP", "GROUP", m.cfg.Group, m.cfg.Consumer, "COUNT", strconv.Itoa(count), "STREAMS", m.cfg.Stream, undelivered)
	if err != nil || answer == nil || answer.IsNil() {
		return nil, false, err
	}
	streams, err := answer.AsXReadSlices()
	if err != nil {
		return nil, false, fmt.Errorf("read stream %q: %w", m.cfg.Stream, err)
	}
	raw := streams[m.cfg.Stream]
	if len(raw) == 0 {
		return nil, false, nil
	}
	entries, err := m.holdNew(ctx, raw)
	return entries, len(raw) == count, err
}

// owned runs one command, if this member owns the stream at that moment. It returns nil when it does not.
func (m *Member) owned(ctx context.Context, command ...string) (*rueidis.RedisMessage, error) {
	m.mu.Lock()
	epoch := m.lease.epoch
	m.mu.Unlock()
	answer, err := ownedScript.Exec(ctx, m.client, []string{m.cfg.Stream, m.leaseKey()}, append([]string{m.cfg.Consumer, epoch}, command...)).ToArray()
	if err != nil {
		return nil, fmt.Errorf("%s as owner of stream %q: %w", command[0], m.cfg.Stream, err)
	}
	if len(answer) < 2 {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.lease.epoch == epoch {
			m.dropLease()
		}
		return nil, nil
	}
	return &answer[1], nil
}
