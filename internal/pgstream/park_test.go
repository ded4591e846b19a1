package pgstream_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// parking is an Ordered group with failure policy Park, whose claims last a second of the engine's clock, and two members; messages have the
// letters of keys as their keys.
func (e *engine) parking(keys string) (c, other *pgstream.Consumer) {
	e.t.Helper()
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, FailurePolicy: pgstream.FailurePark, MaxAttempts: 3, AckWait: time.Second})
	e.publishKeys(keys)
	return e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "c"}),
		e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "other"})
}

// publishKeys publishes a message for each letter.
func (e *engine) publishKeys(keys string) {
	e.t.Helper()
	for _, k := range keys {
		e.run(`select millrace.publish('orders', '{}', $1)`, string(k))
	}
}

// nothingIsParked checks that all is over.
func (e *engine) nothingIsParked() {
	e.t.Helper()
	if n := one[int](e, `select (select count(*) from millrace_engine.parked_key) + (select count(*) from millrace_engine.delivery)`); n != 0 {
		e.t.Errorf("%d keys or messages stayed parked", n)
	}
}

func TestAParkedKeyWaitsAloneAndInOrder(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, _ := e.parking("abaXa")
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 10*time.Second, "busy"))
	mustBeFenced(t, "an ack of what waits behind it", c.AckMessages(e.ctx, claim.Token, []int64{3}))
	must(t, c.Nack(e.ctx, claim.Token, []int64{3}, 0, "what is parked already")) // harmless
	same(t, "while the claim is open", positions(receive(e, c)), nil)
	must(t, c.AckMessages(e.ctx, claim.Token, []int64{2}))
	must(t, c.Ack(e.ctx, claim.Token))
	e.publishKeys("aba")
	same(t, "of the other keys", drain(e, c), []int64{7})
	if s := e.stats("orders", "g"); s.Retrying != 5 || s.Lag != 0 || s.InFlight != 0 {
		t.Errorf("retrying %d, lag %d, in flight %d; want 5, 0, 0", s.Retrying, s.Lag, s.InFlight)
	}
	e.jump(9 * time.Second)
	same(t, "before the delay is over", positions(receive(e, c)), nil)
	e.jump(time.Second)
	for _, want := range []struct {
		position int64
		attempt  int
	}{{1, 2}, {3, 1}, {5, 1}, {6, 1}, {8, 1}} {
		claim := mustReceive(e, c)
		same(t, "the first of the key", positions(claim), []int64{want.position})
		if m := claim.Messages[0]; m.Attempt != want.attempt || *m.Key != "a" || string(m.Payload) != "{}" {
			t.Errorf("position %d: attempt %d, key %s", m.Position, m.Attempt, *m.Key)
		}
		e.publishKeys("b")
		other := mustReceive(e, c)
		if *other.Messages[0].Key != "b" || len(other.Messages) != 1 {
			t.Errorf("beside it: %v", positions(other))
		}
		must(t, c.Ack(e.ctx, other.Token))
		must(t, c.Ack(e.ctx, claim.Token))
	}
	e.nothingIsParked()
	e.publishKeys("ab")
	same(t, "from the log again", positions(mustReceive(e, c)), []int64{14, 15})
}

func TestAParkedMessageThatFailsForTheLastTimeMakesWayForTheNext(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, _ := e.parking("aab")
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "first"))
	must(t, c.Ack(e.ctx, claim.Token))
	claim = mustReceive(e, c)
	same(t, "the head", positions(claim), []int64{1})
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, -1, "second"))
	same(t, "during the backoff", positions(receive(e, c)), nil)
	e.jump(time.Minute)
	claim = mustReceive(e, c)
	if a := claim.Messages[0].Attempt; a != 3 {
		t.Errorf("attempt %d, want 3", a)
	}
	e.jump(2 * time.Second) // nobody settles it
	claim = mustReceive(e, c)
	same(t, "the next of the key", positions(claim), []int64{2})
	must(t, c.DeadLetter(e.ctx, claim.Token, []int64{2}, "cannot be read"))
	e.nothingIsParked()
	same(t, "dead", deadPositions(e, pgstream.DeadLetterFilter{}), []int64{1, 2})
	dead, err := pgstream.DeadLetters(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{}, 1)
	must(t, err)
	if d := dead[0]; d.Attempt != 3 || len(d.Errors) != 3 || d.Errors[0].Error != "first" || d.Errors[1].Error != "second" {
		t.Errorf("dead letter: %+v", d)
	}
	e.publishKeys("aab")
	// At its last attempt a message is a dead letter at once, and the others of its key go on in the claim.
	e.run(`update millrace_engine.consumer_group set max_attempts = 1`)
	claim = mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{4}, 0, "no"))
	must(t, c.AckMessages(e.ctx, claim.Token, []int64{5}))
	must(t, c.Ack(e.ctx, claim.Token))
	same(t, "dead at the end", deadPositions(e, pgstream.DeadLetterFilter{}), []int64{1, 2, 4})
	e.nothingIsParked()
}

func TestMessagesWithoutAKeyAreParkedAlone(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, _ := e.parking("")
	e.run(`insert into millrace.orders (payload) select '{}' from generate_series(1, 5)`)
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1, 3}, time.Second, "no"))
	must(t, c.AckMessages(e.ctx, claim.Token, []int64{2, 4, 5}))
	mustBeFenced(t, "the claim, of which nothing is left", c.Ack(e.ctx, claim.Token))
	e.run(`insert into millrace.orders (payload) select '{}' from generate_series(1, 2)`)
	same(t, "those that follow", drain(e, c), []int64{6, 7})
	e.jump(2 * time.Second)
	same(t, "the parked ones", sorted(positions(mustReceive(e, c))), []int64{1, 3})
}

func TestAClaimOfAParkingGroupThatKeepsExpiringIsADeadLetter(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, _ := e.parking("aab")
	for range 10 {
		claim := receive(e, c)
		if claim == nil {
			break
		}
		if slices.Contains(positions(claim), 1) {
			e.jump(2 * time.Second)
		} else {
			must(t, c.Ack(e.ctx, claim.Token))
		}
	}
	same(t, "dead", deadPositions(e, pgstream.DeadLetterFilter{}), []int64{1})
	e.nothingIsParked()
}

// The owner of a key's slot serves its parked messages; who held one before keeps it until its lease ends, and is fenced then.
func TestANewOwnerServesParkedMessages(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, other := e.parking("aab")
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
	must(t, c.Ack(e.ctx, claim.Token))
	held := mustReceive(e, c)
	same(t, "held", positions(held), []int64{1})
	// It stays away, and its partitions go to the other one, while it still has the message.
	ends, err := c.Extend(e.ctx, held.Token, 20*time.Second)
	must(t, err)
	e.jump(15 * time.Second)
	e.publishKeys("ab")
	same(t, "for the new owner", drain(e, other), []int64{5})
	e.jump(6 * time.Second)
	if now := one[time.Time](e, "select millrace_engine.clock()"); now.Before(ends) {
		t.Fatalf("the lease lasts until %s, it is %s", ends, now)
	}
	tx := e.begin()
	must(t, c.AckTx(e.ctx, tx, held.Token))
	same(t, "while it is being acked", positions(receive(e, other)), nil)
	rollback(e, tx)
	taken := mustReceive(e, other)
	same(t, "taken over", positions(taken), []int64{1})
	mustRefuseAll(e, held.Token)
	same(t, "for the old owner", positions(receive(e, c)), nil)
	must(t, other.Ack(e.ctx, taken.Token))
	// Two members share the slots now. Each key goes on with its owner.
	e.publishKeys("abcdefghij")
	var got []int64
	for range 8 {
		for _, m := range []*pgstream.Consumer{c, other} {
			if claim := receive(e, m); claim != nil {
				got = append(got, positions(claim)...)
				must(t, m.Ack(e.ctx, claim.Token))
			}
		}
	}
	same(t, "in the end", sorted(got), []int64{2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
	e.nothingIsParked()
}

func TestWhatIsRedrivenIntoAnOrderedGroupWaitsItsTurn(t *testing.T) {
	t.Parallel()
	for _, policy := range []pgstream.FailurePolicy{pgstream.FailureBlock, pgstream.FailureSkip, pgstream.FailurePark} {
		t.Run(string(policy), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			c, _ := e.parking("aabaab")
			e.run(`update millrace_engine.consumer_group set failure_policy = $1`, string(policy))
			claim := mustReceive(e, c)
			must(t, c.DeadLetter(e.ctx, claim.Token, []int64{1, 2}, "no"))
			if n := redrive(e, pgstream.RedriveOptions{}); n != 2 {
				t.Errorf("%d were moved, want 2", n)
			}
			same(t, "while the claim is open, which has others of the key", positions(receive(e, c)), nil)
			must(t, c.Ack(e.ctx, claim.Token))
			e.publishKeys("ab")
			first := mustReceive(e, c)
			same(t, "redriven", positions(first), []int64{1})
			same(t, "beside it", drain(e, c), []int64{8})
			must(t, c.Ack(e.ctx, first.Token))
			same(t, "then", drain(e, c), []int64{2, 7})
			e.nothingIsParked()
		})
	}
}

// unparked is a race: an ack of the last parked message is open when a receive reaches the next one of its key in the log. It returns what is wrong
// in the end.
func unparked(e *engine, undone bool) []string {
	t := e.t
	t.Helper()
	c, other := e.parking("ab")
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
	must(t, c.Ack(e.ctx, claim.Token))
	last := mustReceive(e, c)
	same(t, "held", positions(last), []int64{1})
	e.publishKeys("bab")
	tx := e.begin()
	must(t, c.AckTx(e.ctx, tx, last.Token))
	got := drain(e, c)
	if undone {
		rollback(e, tx)
	} else {
		commit(e, tx)
	}
	return e.missing(c, other, got)
}

// missing lets both members receive until long after every lease, and returns what was not delivered, or out of order.
func (e *engine) missing(c, other *pgstream.Consumer, got []int64) []string {
	e.t.Helper()
	for range 6 {
		e.jump(2 * time.Second)
		got = append(got, drain(e, c)...)
		got = append(got, drain(e, other)...)
	}
	var broken []string
	for p := int64(2); p <= 5; p++ {
		if !slices.Contains(got, p) && p != 2 { // the second was acked before the race
			broken = append(broken, fmt.Sprintf("position %d was never delivered", p))
		}
	}
	if i, j := slices.Index(got, 1), slices.Index(got, 4); i > j && j >= 0 {
		broken = append(broken, "position 4 was delivered before position 1")
	}
	return broken
}

func TestTheLastParkedMessageIsAckedWhileTheNextIsReceived(t *testing.T) {
	t.Parallel()
	for _, undone := range []bool{false, true} {
		t.Run(fmt.Sprintf("the ack first, undone %t", undone), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			mustHold(t, unparked(e, undone))
			e.nothingIsParked()
		})
	}
}

func TestTheNextMessageIsReceivedWhileTheLastParkedIsAcked(t *testing.T) {
	t.Parallel()
	for _, undone := range []bool{false, true} {
		t.Run(fmt.Sprintf("the receive undone %t", undone), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			mustHold(t, diverted(e, undone))
			e.nothingIsParked()
		})
	}
}

// diverted is the other race: a receive that moves a message behind the parked ones is open when the last of them is acked.
func diverted(e *engine, undone bool) []string {
	t := e.t
	t.Helper()
	c, other := e.parking("ab")
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
	must(t, c.Ack(e.ctx, claim.Token))
	last := mustReceive(e, c)
	e.publishKeys("bab")
	open, ack := e.begin(), e.begin()
	rows, err := open.Query(e.ctx, `select "position" from millrace.receive('orders', 'g', 'c')`)
	must(t, err)
	got, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	must(t, err)
	same(t, "without the message of that key", got, []int64{3, 5})
	done := make(chan error, 1)
	go func() {
		err := c.AckTx(e.ctx, ack, last.Token)
		if err == nil {
			err = ack.Commit(e.ctx)
		}
		done <- err
	}()
	e.eventually("the ack waits, or is done", func() bool {
		return len(done) == 1 || one[bool](e, `select exists (select from pg_stat_activity where pid = $1 and wait_event_type = 'Lock')`, pid(ack))
	})
	if undone {
		rollback(e, open)
		got = nil
	} else {
		commit(e, open)
	}
	must(t, <-done)
	return e.missing(c, other, got)
}

func TestPurgeOfParkedMessagesLeavesTheKeyInOrder(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, _ := e.parking("aaaab")
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
	must(t, c.Ack(e.ctx, claim.Token))
	purge := func(p int64) int64 {
		t.Helper()
		n, err := pgstream.PurgeDeliveries(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{From: p, To: p})
		must(t, err)
		return n
	}
	if n := purge(1); n != 1 {
		t.Errorf("%d were removed, want the head", n)
	}
	held := mustReceive(e, c)
	same(t, "the next", positions(held), []int64{2})
	if n := purge(2); n != 0 {
		t.Errorf("%d were removed, though somebody holds it", n)
	}
	tx := e.begin()
	must(t, c.AckTx(e.ctx, tx, held.Token))
	if n := purge(3); n != 0 {
		t.Errorf("%d were removed beside an ack of the same key", n)
	}
	commit(e, tx)
	if n := purge(3); n != 1 {
		t.Errorf("%d were removed, want 1", n)
	}
	same(t, "the last", drain(e, c), []int64{4})
	e.nothingIsParked()
}

func TestAThousandParkedMessagesOfAKeyAreMovedOutOfTheWay(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.parking("ab")
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "c", MaxMessages: 3})
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, time.Hour, "no"))
	must(t, c.Ack(e.ctx, claim.Token))
	e.run(`insert into millrace.orders (key, payload) select 'a', '{}' from generate_series(1, 1000)`)
	e.publishKeys("b")
	same(t, "behind a thousand", positions(mustReceive(e, c)), []int64{1003})
	if n := one[int](e, `select count(*) from millrace_engine.delivery where parked`); n != 1001 {
		t.Errorf("%d messages are parked, want 1001", n)
	}
}

// parkingModel plays by chance with a group that parks and keeps the rules in mind: what may be handed out when.
type parkingModel struct {
	e       *engine
	r       *rand.Rand
	letters []string
	members []*pgstream.Consumer
	now     time.Duration
	keys    map[int64]string
	state   map[int64]string // "": to be done
	holder  map[int64]*parkedClaim
	passed  map[[2]int64]bool // {p, q}: p was handed out before q was redriven, and need not wait for it
	claims  []*parkedClaim
	acks    []*parkedAck
	log     []string
	broken  []string
}

type parkedClaim struct {
	member  *pgstream.Consumer
	token   string
	left    []int64
	expires time.Duration
}

// parkedAck is an ack in a transaction that is still open.
type parkedAck struct {
	tx    pgx.Tx
	claim *parkedClaim
}

func (m *parkingModel) note(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

func (m *parkingModel) wrong(format string, args ...any) {
	m.note("WRONG: "+format, args...)
	m.broken = append(m.broken, fmt.Sprintf(format, args...)+"\n"+strings.Join(m.log[max(0, len(m.log)-60):], "\n"))
}

func (m *parkingModel) publish() {
	var ms []pgstream.NewMessage
	for range 1 + m.r.IntN(6) {
		key := m.letters[m.r.IntN(len(m.letters))]
		ms = append(ms, pgstream.NewMessage{Key: &key, Payload: []byte(`{}`)})
	}
	all, err := pgstream.PublishBatch(m.e.ctx, m.e.Pool, "orders", ms)
	must(m.e.t, err)
	for i, p := range all {
		m.keys[p] = *ms[i].Key
		m.note("publish %d %s", p, *ms[i].Key)
	}
}

func (m *parkingModel) receive() {
	i := m.r.IntN(len(m.members))
	got, err := m.members[i].TryReceive(m.e.ctx)
	must(m.e.t, err)
	m.look()
	if got == nil {
		m.note("%s receives nothing", m.members[i].Member())
		return
	}
	c := &parkedClaim{member: m.members[i], token: got.Token, left: positions(got), expires: m.now + time.Second}
	m.note("%s receives %v as %s", c.member.Member(), c.left, c.token)
	m.claims = append(m.claims, c)
	for n, p := range c.left {
		if h := m.holder[p]; m.state[p] != "" {
			m.wrong("position %d was handed out after it was %s", p, m.state[p])
		} else if h != nil && slices.Contains(h.left, p) && h.expires > m.now {
			m.wrong("position %d was handed out while %s holds it", p, h.token)
		}
		for q, key := range m.keys {
			if key != m.keys[p] || q == p {
				continue
			}
			if h := m.holder[q]; h != nil && h != c && h.expires > m.now && slices.Contains(h.left, q) && !slices.Contains(c.left, q) {
				m.wrong("position %d was handed out while %s holds position %d of its key", p, h.token, q)
			}
			if q < p && m.state[q] == "" && !slices.Contains(c.left[:n], q) && !m.passed[[2]int64{p, q}] {
				m.wrong("position %d was handed out before position %d of its key", p, q)
			}
		}
	}
	for _, p := range c.left {
		if h := m.holder[p]; h != nil {
			h.left = slices.DeleteFunc(slices.Clone(h.left), func(q int64) bool { return q == p })
		}
		m.holder[p] = c
	}
}

// pick returns a claim that is not being acked just now.
func (m *parkingModel) pick() *parkedClaim {
	var some []*parkedClaim
	for _, c := range m.claims {
		if len(c.left) > 0 && !slices.ContainsFunc(m.acks, func(a *parkedAck) bool { return a.claim == c }) {
			some = append(some, c)
		}
	}
	if len(some) == 0 {
		return nil
	}
	return some[m.r.IntN(len(some))]
}

// settle notes the outcome of a verb. Being fenced is right only when the lease had ended.
func (m *parkingModel) settle(what string, c *parkedClaim, all []int64, to string, err error) {
	m.note("%s %v of %s: %v", what, all, c.token, err)
	if err != nil {
		mustBeFenced(m.e.t, what, err)
		if c.expires > m.now {
			m.wrong("%s of %s was fenced before its lease ended", what, c.token)
		}
		return
	}
	for _, p := range all {
		if to != "" {
			m.state[p] = to
		}
	}
	c.left = slices.DeleteFunc(slices.Clone(c.left), func(p int64) bool { return slices.Contains(all, p) })
}

func (m *parkingModel) step() {
	ctx := m.e.ctx
	switch n := m.r.IntN(100); {
	case n < 15:
		m.publish()
	case n < 45:
		m.receive()
	case n < 70:
		c := m.pick()
		if c == nil {
			return
		}
		some := c.left[:1+m.r.IntN(len(c.left))]
		one := []int64{c.left[m.r.IntN(len(c.left))]}
		switch m.r.IntN(8) {
		case 0:
			m.settle("ack some", c, some, "acked", c.member.AckMessages(ctx, c.token, some))
		case 1:
			m.settle("dead letter", c, one, "dead", c.member.DeadLetter(ctx, c.token, one, "no"))
		case 2, 3:
			err := c.member.Nack(ctx, c.token, one, time.Duration(m.r.IntN(2))*time.Second, "no")
			if err == nil && m.dead(one[0]) {
				m.settle("nack for the last time", c, one, "dead", nil)
			} else if err == nil {
				later := slices.DeleteFunc(slices.Clone(c.left), func(p int64) bool { return p < one[0] || m.keys[p] != m.keys[one[0]] })
				m.settle("nack", c, later, "", nil)
			} else {
				m.settle("nack", c, one, "", err)
			}
		case 4:
			m.settle("release", c, c.left, "", c.member.Release(ctx, c.token))
		case 5:
			if len(m.acks) < 2 {
				tx := m.e.begin()
				if err := c.member.AckTx(ctx, tx, c.token); err != nil {
					rollback(m.e, tx)
					m.settle("ack in a transaction", c, c.left, "acked", err)
				} else {
					m.note("ack of %s in an open transaction", c.token)
					m.acks = append(m.acks, &parkedAck{tx, c})
				}
			}
		default:
			m.settle("ack", c, c.left, "acked", c.member.Ack(ctx, c.token))
		}
	case n < 78:
		m.finish()
	case n < 88:
		d := time.Duration(m.r.IntN(700)) * time.Millisecond
		m.e.jump(d)
		m.now += d
		m.note("%s later", d)
	case n < 93 && len(m.acks) == 0: // it would wait for an ack that unparks one of its keys
		all := deadPositions(m.e, pgstream.DeadLetterFilter{})
		if len(all) > 0 {
			m.redrive(all[m.r.IntN(len(all))])
		}
	case n < 96:
		p := int64(1 + m.r.IntN(len(m.keys)+1))
		n, err := pgstream.PurgeDeliveries(ctx, m.e.Pool, "orders", "g", pgstream.DeadLetterFilter{From: p, To: p})
		must(m.e.t, err)
		m.note("purge %d: %d", p, n)
		if n > 0 {
			if h := m.holder[p]; h != nil && h.expires > m.now && slices.Contains(h.left, p) {
				m.wrong("position %d was purged while %s holds it", p, h.token)
			}
			m.state[p] = "purged"
		}
	case n < 98:
		i := m.r.IntN(len(m.members))
		who := m.members[i]
		must(m.e.t, who.Leave(ctx))
		m.note("%s leaves", who.Member())
		for _, c := range m.claims {
			if c.member == who && !slices.ContainsFunc(m.acks, func(a *parkedAck) bool { return a.claim == c }) {
				c.left = nil
			}
		}
	}
}

// dead says whether a message has become a dead letter.
func (m *parkingModel) dead(p int64) bool {
	return one[bool](m.e, `select exists (select from millrace_engine.dead_letter where "position" = $1)`, p)
}

func (m *parkingModel) redrive(p int64) {
	if n := redrive(m.e, pgstream.RedriveOptions{Filter: pgstream.DeadLetterFilter{From: p, To: p}}); n != 1 {
		m.wrong("redrive of position %d moved %d", p, n)
	}
	m.note("redrive %d", p)
	m.state[p] = ""
	m.holder[p] = nil
	for q, key := range m.keys {
		// What was handed out from the log before may be finished first, by whoever has its claim.
		if key == m.keys[p] && q > p && m.state[q] == "" && m.holder[q] != nil {
			m.passed[[2]int64{q, p}] = true
		}
	}
}

// finish ends one of the open transactions.
func (m *parkingModel) finish() {
	if len(m.acks) == 0 {
		return
	}
	i := m.r.IntN(len(m.acks))
	a := m.acks[i]
	m.acks = slices.Delete(m.acks, i, i+1)
	if m.r.IntN(3) == 0 {
		rollback(m.e, a.tx)
		m.note("rollback of the ack of %s", a.claim.token)
	} else {
		commit(m.e, a.tx)
		m.settle("commit of the ack", a.claim, a.claim.left, "acked", nil)
	}
	_ = a.tx.Conn().Close(m.e.ctx)
}

// dying are messages that became dead letters because their lease ended for the last time.
func (m *parkingModel) look() {
	for _, p := range deadPositions(m.e, pgstream.DeadLetterFilter{}) {
		if m.state[p] == "" {
			m.note("position %d is dead", p)
			m.state[p] = "dead"
		} else if m.state[p] != "dead" {
			m.wrong("position %d is a dead letter after it was %s", p, m.state[p])
		}
	}
}

// left counts the messages that are not done with.
func (m *parkingModel) left() (n int) {
	for p := range m.keys {
		if m.state[p] == "" {
			n++
		}
	}
	return n
}

func playParking(e *engine, r *rand.Rand, steps int) []string {
	t := e.t
	t.Helper()
	e.parking("")
	m := &parkingModel{e: e, r: r, keys: map[int64]string{}, state: map[int64]string{}, holder: map[int64]*parkedClaim{}, passed: map[[2]int64]bool{}}
	for _, slot := range []int{0, 511, 512, 1023} { // where lanes begin and end
		m.letters = append(m.letters, one[string](e, `select 'k' || n from generate_series(1, 100000) n where millrace_engine.slot('k' || n, 0) = $1 limit 1`, slot))
	}
	for i := range 3 {
		m.members = append(m.members, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: fmt.Sprint("m", i), MaxMessages: 1 + r.IntN(8)}))
	}
	m.publish()
	for range steps {
		m.step()
		m.look()
		if len(m.broken) > 0 {
			return m.broken
		}
	}
	for len(m.acks) > 0 {
		m.finish()
	}
	// Everything comes to its end when members do what they should.
	for n := 0; n < 1000 && m.left() > 0; n++ {
		for _, c := range m.claims {
			if len(c.left) > 0 {
				m.settle("ack at the end", c, c.left, "acked", c.member.Ack(e.ctx, c.token))
				c.left = nil
			}
		}
		m.receive()
		m.look()
		if n%20 == 19 {
			e.jump(2 * time.Second)
			m.now += 2 * time.Second
		}
		if len(m.broken) > 0 {
			return m.broken
		}
	}
	if n := m.left(); n > 0 {
		m.wrong("%d messages were never settled", n)
	}
	if n := one[int](e, `select (select count(*) from millrace_engine.parked_key) + (select count(*) from millrace_engine.delivery)`); n != 0 {
		m.wrong("%d keys or messages stayed parked", n)
	}
	return m.broken
}

func TestAKeysOrderOutlivesParking(t *testing.T) {
	t.Parallel()
	r := random(t)
	length := soak(t, 2*time.Second)
	start := time.Now()
	played := 0
	for ; played < 1 || time.Since(start) < length; played++ {
		e := newEngine(t)
		if broken := playParking(e, r, 250); len(broken) > 0 {
			t.Fatalf("game %d: %s", played, broken[0])
		}
	}
	t.Logf("%d games", played)
}

// The same with everything at once: members nack, stop and die, partitions are raised and the ledgers rotate.
func TestAKeysOrderOutlivesParkingUnderLoad(t *testing.T) {
	t.Parallel()
	r := random(t)
	length := soak(t, 2*time.Second)
	e := newEngine(t)
	e.extendDeadline(length)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Partitions: 8}}))
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, FailurePolicy: pgstream.FailurePark, AckWait: 10 * time.Minute})
	ctx, cancel := context.WithTimeout(e.ctx, length)
	defer cancel()
	failed := make(chan error, 100)
	order := newKeyOrder()
	var published, nacked atomic.Int64
	var publishers, members sync.WaitGroup
	for range 2 {
		own := newRand(r)
		publishers.Go(func() {
			for ctx.Err() == nil {
				order.mu.Lock()
				ahead := published.Load() - int64(len(order.handled))
				order.mu.Unlock()
				if ahead > 300 { // a key that is parked is handled one message at a time
					time.Sleep(time.Millisecond)
					continue
				}
				ms := make([]pgstream.NewMessage, 1+own.IntN(10))
				for i := range ms {
					key := fmt.Sprintf("k%d", own.IntN(12))
					ms[i] = pgstream.NewMessage{Key: &key, Payload: []byte(`{}`)}
				}
				if _, err := pgstream.PublishBatch(e.ctx, e.Pool, "orders", ms); err != nil {
					failed <- err
					return
				}
				published.Add(int64(len(ms)))
				if own.IntN(30) > 0 {
					continue
				}
				if _, err := pgstream.MaintainWithRing(e.ctx, e.Pool, 1); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	live := func(name string, own *rand.Rand, last bool) error {
		c, err := pgstream.NewConsumer(e.ctx, e.Pool, pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: name, MaxMessages: 1 + own.IntN(20)})
		if err != nil {
			return err
		}
		for idle := 0; ; {
			claim, err := c.TryReceive(e.ctx)
			if err != nil {
				return err
			}
			if claim == nil {
				if idle++; last && idle > 50 || !last && (ctx.Err() != nil || own.IntN(30) == 0) {
					return c.Leave(e.ctx)
				}
				continue
			}
			idle = 0
			order.begin(name, claim)
			switch chance := own.IntN(30); {
			case chance == 0 && !last: // dies; its lease ends
				order.end(claim, false)
				_, err := e.Exec(e.ctx, `update millrace_engine.member set expires_at = '-infinity' where name = $1`, name)
				if err == nil {
					_, err = e.Exec(e.ctx, "select millrace.extend($1, 0.000001)", claim.Token)
				}
				return err
			case chance < 3:
				order.end(claim, false)
				err = c.Release(e.ctx, claim.Token)
			case chance < 12:
				bad := claim.Messages[own.IntN(len(claim.Messages))]
				kept, parked := *claim, *claim
				kept.Messages, parked.Messages = nil, nil
				for _, m := range claim.Messages {
					if *m.Key == *bad.Key && m.Position >= bad.Position {
						parked.Messages = append(parked.Messages, m)
					} else {
						kept.Messages = append(kept.Messages, m)
					}
				}
				order.end(&kept, true)
				order.end(&parked, false)
				nacked.Add(1)
				err = c.Nack(e.ctx, claim.Token, []int64{bad.Position}, 0, "no")
				if err == nil && len(kept.Messages) > 0 {
					err = c.Ack(e.ctx, claim.Token)
				}
			default:
				order.end(claim, true)
				err = c.Ack(e.ctx, claim.Token)
			}
			if err != nil {
				return err
			}
		}
	}
	for i := range 6 {
		own := newRand(r)
		members.Go(func() {
			for life := 0; ctx.Err() == nil; life++ {
				if err := live(fmt.Sprintf("m%d.%d", i, life), own, false); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	publishers.Wait()
	members.Wait()
	if err := live("last", r, true); err != nil {
		t.Fatal(err)
	}
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	mustHold(t, order.broken)
	if int64(len(order.handled)) != published.Load() {
		t.Errorf("%d messages were handled of %d", len(order.handled), published.Load())
	}
	for p, n := range order.handled {
		if n != 1 {
			t.Errorf("position %d was acked %d times", p, n)
		}
	}
	e.nothingIsParked()
	t.Logf("%d messages, %d nacks", published.Load(), nacked.Load())
}

// What members and operators do with messages that failed needs no more than the runtime role.
func TestTheRuntimeRoleMayParkAndRedrive(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	role := "runtime_" + one[string](e, "select current_database()")[:20]
	e.run(`create role "` + role + `" nologin`)
	t.Cleanup(func() {
		e.run(`drop owned by "` + role + `"`)
		e.run(`drop role "` + role + `"`)
	})
	_, err := schema.Migrate(e.ctx, e.connect(), schema.Options{RuntimeRole: role})
	must(t, err)
	c, _ := e.parking("aab")
	e.stream("other")
	e.run(`grant insert, select on all tables in schema millrace, public to "` + role + `"`)
	conn := e.connect()
	_, err = conn.Exec(e.ctx, `set role "`+role+`"`)
	must(t, err)
	call := func(sql string, args ...any) {
		t.Helper()
		exec(e, conn, sql, args...)
	}
	receive := func() (token string) {
		t.Helper()
		must(t, conn.QueryRow(e.ctx, `select claim from millrace.receive('orders', 'g', 'c')`).Scan(&token))
		return token
	}
	token := receive()
	call("select millrace.nack($1, '{1}', 0, 'no')", token)
	call("select millrace.ack($1)", token)
	call("insert into millrace.orders (key, payload) values ('a', '{}'), ('b', '{}')")
	call("select millrace.dead_letter($1, '{1}', 'no')", receive())
	call("select millrace.dead_letter($1, '{2}', 'no')", receive())
	call("select millrace.ack($1)", receive())
	call("select millrace.redrive('orders', 'g', p_max => 1)")
	call("select millrace.redrive('orders', 'g', p_to => 'other')")
	call("select millrace.purge_deliveries('orders', 'g'), millrace.purge_dead_letters('orders', 'g')")
	call("select millrace.leave('orders', 'g', 'c')")
	same(t, "left", drain(e, c), nil)
	e.nothingIsParked()
}

// What a filter hides is neither parked nor moved.
func TestParkingHonoursTheFilter(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, _ := e.parking("")
	e.run(`update millrace_engine.consumer_group set filter = '{"headers": {"wanted": true}}'`)
	publish := func(wanted ...bool) {
		t.Helper()
		for _, w := range wanted {
			e.run(`select millrace.publish('orders', '{}', 'a', jsonb_build_object('wanted', $1::boolean))`, w)
		}
	}
	publish(true, false, true, false)
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
	mustBeFenced(t, "the claim, of which nothing is left", c.Ack(e.ctx, claim.Token))
	publish(false, true, false)
	same(t, "in order", drain(e, c), []int64{1, 3, 6})
	if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 || s.Retrying != 0 {
		t.Errorf("lag %d, in flight %d, retrying %d at the end", s.Lag, s.InFlight, s.Retrying)
	}
	e.nothingIsParked()
}

// A reset delivers everything again from the log; what was parked is forgotten.
func TestAResetEndsParking(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, _ := e.parking("aab")
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
	must(t, c.Ack(e.ctx, claim.Token))
	held := mustReceive(e, c)
	e.run("select millrace.reset_group('orders', 'g', 'Earliest')")
	mustBeFenced(t, "an ack from before the reset", c.Ack(e.ctx, held.Token))
	e.nothingIsParked()
	same(t, "after it", drain(e, c), []int64{1, 2, 3})
}

// games plays until something is wrong, at most so many times.
func games(most uint64) func(begin func() *engine) []string {
	return func(begin func() *engine) (broken []string) {
		for seed := uint64(1); seed <= most && len(broken) == 0; seed++ {
			broken = playParking(begin(), rand.New(rand.NewPCG(seed, 0)), 200)
		}
		return broken
	}
}

// redrivenTwice hands out two messages of a key that were redriven one by one and are due at once.
func redrivenTwice(begin func() *engine) []string {
	e := begin()
	c, _ := e.parking("aab")
	claim := mustReceive(e, c)
	must(e.t, c.DeadLetter(e.ctx, claim.Token, []int64{1, 2}, "no"))
	must(e.t, c.Ack(e.ctx, claim.Token))
	redrive(e, pgstream.RedriveOptions{Max: 1})
	redrive(e, pgstream.RedriveOptions{Max: 1})
	if got := positions(mustReceive(e, c)); len(got) > 1 {
		return []string{fmt.Sprintf("positions %v of one key were handed out together", got)}
	}
	return nil
}

// redrivenBesideAHeldOne redrives a message of a key while a later one is being handled.
func redrivenBesideAHeldOne(begin func() *engine) []string {
	e := begin()
	c, _ := e.parking("aa")
	claim := mustReceive(e, c)
	must(e.t, c.DeadLetter(e.ctx, claim.Token, []int64{1}, "no"))
	must(e.t, c.Nack(e.ctx, claim.Token, []int64{2}, 0, "no"))
	same(e.t, "held", positions(mustReceive(e, c)), []int64{2})
	redrive(e, pgstream.RedriveOptions{})
	if got := positions(receive(e, c)); got != nil {
		return []string{fmt.Sprintf("positions %v of the key were handed out beside it", got)}
	}
	return nil
}

// givenBack parks the last message of a claim, whose other messages are given back and read again one at a time.
func givenBack(begin func() *engine) []string {
	e := begin()
	c, _ := e.parking("baa")
	claim := mustReceive(e, c)
	must(e.t, c.Nack(e.ctx, claim.Token, []int64{3}, 0, "no"))
	must(e.t, c.Release(e.ctx, claim.Token))
	small := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "c", MaxMessages: 1})
	var got []int64
	for range 5 { // a receive that only moves messages returns none
		got = append(got, drain(e, small)...)
	}
	if !slices.Equal(got, []int64{1, 2, 3}) {
		return []string{fmt.Sprintf("delivered %v, want 1, 2 and 3", got)}
	}
	return nil
}

// movedTwice lets a receive find nothing but a message of a parked key.
func movedTwice(begin func() *engine) []string {
	e := begin()
	c, _ := e.parking("a")
	claim := mustReceive(e, c)
	must(e.t, c.Nack(e.ctx, claim.Token, []int64{1}, time.Second, "no"))
	e.publishKeys("a")
	got := drain(e, c)
	e.jump(2 * time.Second)
	if got = append(got, drain(e, c)...); !slices.Equal(got, []int64{1, 2}) {
		return []string{fmt.Sprintf("delivered %v, want 1 and 2", got)}
	}
	return nil
}

func TestParkingIsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name                       string
		function, old, replacement string
		trap                       func(begin func() *engine) []string
	}{
		{"later messages of the key in the claim", "park", `or m."position" >= $7[array_position($6, m.key)]`, "or false", games(40)},
		{"moving messages of parked keys out of the log", "receive_template", "parking := parks and", "parking := false and", games(40)},
		{"noting what was moved", "receive_template", "not (parks and skip is not null and edge > last.frontier)", "true", movedTwice},
		{"handing out the first of a key only", "receive_parked", `and o."position" < y."position"`, "and false", redrivenTwice},
		{"waiting for who holds another message of the key", "receive_parked", "and o.nonce is not null", "and false", redrivenBesideAHeldOne},
		{"making the next of the key due", "next_parked", "head.visible_at = 'infinity'", "false", movedTwice},
		{"the lock of a key that receive moves messages of", "divert_template", "for key share skip locked", "",
			func(begin func() *engine) []string { return unparked(begin(), false) }},
		{"the lock before the second look at a key", "next_parked", "for update;", ";",
			func(begin func() *engine) []string { return diverted(begin(), false) }},
		{"waiting until the lane has reached a parked message again", "receive_parked", `and y."position" + 0 <= p_frontier`, "", givenBack},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			mustBeBroken(t, c.trap(func() *engine {
				e := newEngine(t)
				e.mutate("millrace_engine."+c.function, c.old, c.replacement)
				return e
			}))
		})
	}
	for _, trap := range []func(func() *engine) []string{redrivenTwice, redrivenBesideAHeldOne, movedTwice, givenBack} {
		mustHold(t, trap(func() *engine { return newEngine(t) }))
	}
}
