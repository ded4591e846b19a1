package pgstream_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// A random schedule of everything that publishers, members, operators and maintenance do, step by step against a model in memory. The engine's
// clock stands still between steps, so the model knows exactly what has expired. A schedule follows from its seed alone.

const (
	modelAckWait = 10 * time.Second
	dedupeWindow = 2 * time.Minute // of a stream by default
)

type modelMessage struct {
	id        int
	key       string
	wanted    bool // it passes the group's filter
	committed bool
	trimmed   bool          // it may never come, because the log has lost it
	redriven  bool          // it was a dead letter: what comes before it in the log may come after it now
	notBefore time.Duration // after a nack with a delay
}

// modelClaim is a claim as the model sees it. Whoever took its messages over, or ended it, made it dead.
type modelClaim struct {
	member   int
	token    string
	left     []int64       // unsettled, in order
	attempts map[int64]int // of each message
	expires  time.Duration
	dead     bool
	by       *modelClaim // what made it dead, if that was another claim
	unsure   bool        // a crash may have undone it, or what ended it
	durable  bool        // something was committed synchronously after it
}

// single says that the messages came from the delivery table.
func (c *modelClaim) single() bool { return strings.Contains(c.token, ".0.0.") }

type delayedMessage struct {
	modelMessage
	due time.Duration
}

type model struct {
	e    *engine
	r    *rand.Rand
	spec pgstream.GroupSpec
	seed uint64

	retention  pgstream.RetentionPolicy
	now        time.Duration
	ids        int
	start      int64 // where the group began last
	messages   map[int64]*modelMessage
	settled    map[int64]string // acked, dead, or passed over
	delayed    map[int]*delayedMessage
	remembered map[string]struct {
		position int64
		until    time.Duration
	}
	claims  []*modelClaim // every claim that was ever handed out, the oldest first
	hasty   []*modelClaim // acked by asynchronous commits that a crash may undo
	members []*pgstream.Consumer
	auto    int // the member that acks by receiving, -1 for none
	open    []*modelTx
	log     []string
}

type modelTx struct {
	tx        pgx.Tx
	positions []int64
	delayed   []int
}

func (m *model) note(format string, args ...any) { m.log = append(m.log, fmt.Sprintf(format, args...)) }

func (m *model) fail(format string, args ...any) {
	m.e.t.Helper()
	tail := m.log[max(0, len(m.log)-40):]
	m.e.t.Fatalf(format+"\nthe group: %+v, retention %s\nthe last steps:\n%s\nrepeat with: MILLRACE_SCHEDULE=%d go test ./internal/pgstream -run '^%s$'",
		append(args, m.spec, m.retention, strings.Join(tail, "\n"), m.seed, strings.Split(m.e.t.Name(), "/")[0])...)
}

func (m *model) must(err error) {
	m.e.t.Helper()
	if err != nil {
		m.fail("%v", err)
	}
}

// live returns the claim that holds the position now, nil when there is none.
func (m *model) live(position int64) *modelClaim {
	for _, c := range slices.Backward(m.claims) {
		if !c.dead && slices.Contains(c.left, position) {
			return c
		}
	}
	return nil
}

// written notes that something was committed synchronously: what was committed before it will outlive a crash.
func (m *model) written() {
	for _, c := range slices.Backward(m.claims) {
		if c.durable {
			break
		}
		c.durable = true
	}
	m.hasty = nil
}

// message makes up a message and what the model must know of it.
func (m *model) message() (pgstream.NewMessage, modelMessage) {
	m.ids++
	key := fmt.Sprintf("k%d", m.r.IntN(5))
	kind := []string{"plain", "special"}[m.r.IntN(2)]
	return pgstream.NewMessage{Key: &key, Payload: fmt.Appendf(nil, `{"id": %d}`, m.ids), Headers: fmt.Appendf(nil, `{"kind": %q}`, kind)},
		modelMessage{id: m.ids, key: key, wanted: m.spec.Filter.Headers == nil || kind == "special"}
}

func (m *model) publish() {
	ctx := m.e.ctx
	if len(m.open) < 3 && m.r.IntN(3) == 0 {
		m.open = append(m.open, &modelTx{tx: m.begin()})
		m.note("begin")
	}
	var db pgstream.DB = m.e
	var tx *modelTx
	if len(m.open) > 0 && m.r.IntN(2) == 0 {
		tx = m.open[m.r.IntN(len(m.open))]
		db = tx.tx
	}
	switch m.r.IntN(6) {
	case 0:
		msg, known := m.message()
		msg.Delay = time.Duration(1+m.r.IntN(20)) * time.Second
		position, err := pgstream.Publish(ctx, db, "orders", msg)
		m.must(err)
		if position != 0 {
			m.fail("a delayed message has position %d", position)
		}
		known.committed = tx == nil
		m.delayed[known.id] = &delayedMessage{known, m.now + msg.Delay}
		if tx != nil {
			tx.delayed = append(tx.delayed, known.id)
		}
		m.note("publish %d with a delay of %s, committed %t", known.id, msg.Delay, tx == nil)
	case 1:
		// In a transaction of its own, because two that use one key wait for each other.
		msg, known := m.message()
		msg.DedupeKey = fmt.Sprintf("d%d", m.r.IntN(3))
		position, err := pgstream.Publish(ctx, m.e, "orders", msg)
		m.must(err)
		first, exists := m.remembered[msg.DedupeKey]
		m.note("publish %d with dedupe key %s: %d", known.id, msg.DedupeKey, position)
		switch {
		case exists && first.until > m.now && position != first.position:
			m.fail("a message with a dedupe key of position %d got position %d", first.position, position)
		case exists && first.until > m.now:
			return
		}
		known.committed = true
		m.append(position, &known)
		first.position, first.until = position, m.now+dedupeWindow
		m.remembered[msg.DedupeKey] = first
	default:
		ms := make([]pgstream.NewMessage, 1+m.r.IntN(6))
		all := make([]modelMessage, len(ms))
		for i := range ms {
			ms[i], all[i] = m.message()
			all[i].committed = tx == nil
		}
		positions, err := pgstream.PublishBatch(ctx, db, "orders", ms)
		m.must(err)
		for i, p := range positions {
			m.append(p, &all[i])
		}
		if tx != nil {
			tx.positions = append(tx.positions, positions...)
		}
		m.note("publish %v, committed %t", positions, tx == nil)
	}
	if tx == nil {
		m.written()
	}
}

func (m *model) append(position int64, msg *modelMessage) {
	if old := m.messages[position]; old != nil && old.committed {
		m.fail("position %d was given away twice", position)
	}
	m.messages[position] = msg
}

func (m *model) end() {
	if len(m.open) == 0 {
		return
	}
	i := m.r.IntN(len(m.open))
	tx := m.open[i]
	m.open = slices.Delete(m.open, i, i+1)
	if m.r.IntN(3) == 0 {
		rollback(m.e, tx.tx)
		for _, id := range tx.delayed {
			delete(m.delayed, id)
		}
		m.note("rollback %v %v", tx.positions, tx.delayed)
	} else {
		commit(m.e, tx.tx)
		for _, p := range tx.positions {
			m.messages[p].committed = true
		}
		for _, id := range tx.delayed {
			m.delayed[id].committed = true
		}
		if len(tx.positions)+len(tx.delayed) > 0 {
			m.written()
		}
		m.note("commit %v %v", tx.positions, tx.delayed)
	}
}

func (m *model) begin() pgx.Tx {
	tx, err := m.e.Begin(m.e.ctx) // a connection of the pool's: making one costs more than a step
	m.must(err)
	return tx
}

// moveDue moves delayed messages into the log and learns their positions.
func (m *model) moveDue() {
	_, err := m.e.Exec(m.e.ctx, "select millrace_engine.move_due($1)", 1+m.r.IntN(5))
	m.must(err)
	m.learn()
}

// learn finds the messages that were moved into the log.
func (m *model) learn() {
	if len(m.delayed) == 0 {
		return
	}
	rows, err := m.e.Query(m.e.ctx, `select "position", (payload ->> 'id')::int from millrace.orders where (payload ->> 'id')::int = any ($1) order by "position"`,
		slices.Collect(maps.Keys(m.delayed)))
	m.must(err)
	var position int64
	var id int
	_, err = pgx.ForEachRow(rows, []any{&position, &id}, func() error {
		d := m.delayed[id]
		if !d.committed || d.due > m.now {
			m.fail("message %d, due at %s and committed %t, is in the log at %s", id, d.due, d.committed, m.now)
		}
		known := d.modelMessage
		m.append(position, &known)
		delete(m.delayed, id)
		m.note("message %d is due and has position %d", id, position)
		return nil
	})
	m.must(err)
}

// buried notes which messages the engine has given up on.
func (m *model) buried() []int64 {
	rows, err := m.e.Query(m.e.ctx, `select "position" from millrace_engine.dead_letter order by 1`)
	m.must(err)
	dead, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	m.must(err)
	for _, p := range dead {
		switch {
		case m.settled[p] == "dead":
		case m.settled[p] != "":
			m.fail("position %d is a dead letter and was %s", p, m.settled[p])
		case m.spec.MaxAttempts == 0:
			m.fail("position %d is a dead letter, in a group that never gives up", p)
		default:
			m.settled[p] = "dead"
			m.note("position %d has had its attempts", p)
		}
	}
	return dead
}

func (m *model) receive(i int) *modelClaim {
	if m.spec.MaxAttempts > 0 {
		m.buried()
	}
	claim, err := m.members[i].TryReceive(m.e.ctx)
	if err != nil {
		m.fail("receive: %v", err)
	}
	if claim == nil {
		m.note("member %d receives nothing", i)
		return nil
	}
	return m.received(i, claim)
}

// received checks a claim against the model and adds it.
func (m *model) received(member int, claim *pgstream.Claim) *modelClaim {
	m.note("member %d receives %v as %s", member, positions(claim), claim.Token)
	fresh := &modelClaim{member: member, token: claim.Token, left: positions(claim), attempts: map[int64]int{}, expires: m.now + modelAckWait}
	inClaim := map[string]int64{}
	for _, msg := range claim.Messages {
		p := msg.Position
		known := m.messages[p]
		var payload struct{ ID int }
		m.must(json.Unmarshal(msg.Payload, &payload))
		switch {
		case known == nil || !known.committed:
			m.fail("position %d was delivered and is not committed", p)
		case m.settled[p] != "":
			m.fail("position %d was delivered after it was %s", p, m.settled[p])
		case *msg.Key != known.key || payload.ID != known.id:
			m.fail("position %d is message %d with key %s, published was %d with %s", p, payload.ID, *msg.Key, known.id, known.key)
		case !known.wanted:
			m.fail("position %d was delivered and does not pass the filter", p)
		case known.notBefore > m.now:
			m.fail("position %d was delivered at %s, before %s", p, m.now, known.notBefore)
		case msg.Attempt > m.spec.MaxAttempts && m.spec.MaxAttempts > 0 && (m.spec.Mode == pgstream.ModeShared || m.spec.FailurePolicy != pgstream.FailureBlock):
			m.fail("position %d was delivered for the %dth time", p, msg.Attempt)
		}
		fresh.attempts[p] = msg.Attempt
		if holder := m.live(p); holder != nil {
			if holder.expires > m.now && !holder.unsure {
				m.fail("position %d was delivered while %s holds it", p, holder.token)
			}
			holder.dead, holder.by = true, fresh // its messages are somebody else's from here
			m.note("%s is taken over", holder.token)
		}
		if m.spec.Mode == pgstream.ModeOrdered {
			m.checkOrder(p, inClaim, fresh)
		}
	}
	m.claims = append(m.claims, fresh)
	if member == m.auto {
		m.hasty = append(m.hasty, fresh)
		m.acked(fresh)
	}
	return fresh
}

func (m *model) checkOrder(p int64, inClaim map[string]int64, fresh *modelClaim) {
	key := m.messages[p].key
	if last := inClaim[key]; last > p {
		m.fail("position %d of key %s comes after %d in one claim", p, key, last)
	}
	inClaim[key] = p
	for q, other := range m.messages {
		if q >= p || other.key != key || !other.committed || !other.wanted || other.trimmed || other.redriven || q < m.start || m.settled[q] != "" || slices.Contains(fresh.left, q) {
			continue
		}
		m.buried()
		if m.settled[q] == "" {
			m.fail("position %d of key %s was delivered before %d", p, key, q)
		}
	}
}

// acked notes that a claim was settled.
func (m *model) acked(c *modelClaim) {
	for _, p := range c.left {
		if m.settled[p] != "" {
			m.fail("position %d was acked and is %s", p, m.settled[p])
		}
		m.settled[p] = "acked"
	}
	m.kill(c)
}

// kill ends a claim, and with it the uncertainty about who took it over.
func (m *model) kill(c *modelClaim) {
	c.dead, c.by = true, nil
	for _, other := range m.claims {
		if other.unsure && other != c && slices.ContainsFunc(other.left, func(p int64) bool { return slices.Contains(c.left, p) }) {
			other.dead, other.by = true, nil
		}
	}
}

// Verbs that commit asynchronously, or not at all.
const (
	ackAndReceive  = "receive and ack"
	ackAndRollback = "ack and rollback"
)

// use checks that a verb works exactly as long as the claim is the member's.
func (m *model) use(c *modelClaim, verb string, do func() error) bool {
	err := do()
	m.note("%s %s: %v", verb, c.token, err)
	if c.dead {
		if !errors.Is(err, pgstream.ErrFenced) {
			m.fail("%s with %s, which has ended: %v", verb, c.token, err)
		}
		return false
	}
	if errors.Is(err, pgstream.ErrFenced) && (c.expires <= m.now || c.unsure) {
		c.dead = true // set aside by somebody's receive, which found it expired
		return false
	}
	if err != nil {
		m.fail("%s with %s, which is held: %v", verb, c.token, err)
	}
	if verb != ackAndReceive && verb != ackAndRollback {
		m.written()
	}
	return true
}

func (m *model) some(of []int64) []int64 {
	var chosen []int64
	for _, p := range of {
		if m.r.IntN(2) == 0 {
			chosen = append(chosen, p)
		}
	}
	if len(chosen) == 0 {
		chosen = of[:1]
	}
	return slices.Clone(chosen)
}

func (m *model) settle() {
	if len(m.claims) == 0 {
		return
	}
	c := m.claims[max(0, len(m.claims)-1-m.r.IntN(8))]
	ctx, member := m.e.ctx, m.members[c.member]
	if len(c.left) == 0 {
		m.use(c, "ack", func() error { return member.Ack(ctx, c.token) })
		return
	}
	switch m.r.IntN(14) {
	default:
		if m.use(c, "ack", func() error { return member.Ack(ctx, c.token) }) {
			m.acked(c)
		}
	case 0: // in a transaction that is rolled back
		m.use(c, ackAndRollback, func() error {
			tx := m.begin()
			err := member.AckTx(ctx, tx, c.token)
			rollback(m.e, tx)
			return err
		})
	case 1, 2:
		some := m.some(c.left)
		if m.spec.Mode == pgstream.ModeOrdered && !c.single() { // a handler of an Ordered group goes forward
			some = slices.Clone(c.left[:len(some)])
		}
		if m.use(c, fmt.Sprintf("ack %v of", some), func() error { return member.AckMessages(ctx, c.token, some) }) {
			for _, p := range some {
				m.settled[p] = "acked"
			}
			m.without(c, some)
		}
	case 3, 4:
		m.nack(c)
	case 5:
		some := m.some(c.left)
		if m.use(c, fmt.Sprintf("dead letter %v of", some), func() error { return member.DeadLetter(ctx, c.token, some, "bad") }) {
			for _, p := range some {
				m.settled[p] = "dead"
			}
			m.without(c, some)
		}
	case 6:
		if m.use(c, "release", func() error { return member.Release(ctx, c.token) }) {
			m.kill(c)
		}
	case 7:
		if m.use(c, "extend", func() error { _, err := member.Extend(ctx, c.token, 2*modelAckWait); return err }) {
			c.expires = m.now + 2*modelAckWait
		}
	case 8, 9, 10:
		m.ackAndReceive(c)
	}
}

func (m *model) without(c *modelClaim, gone []int64) {
	c.left = slices.DeleteFunc(c.left, func(p int64) bool { return slices.Contains(gone, p) })
	if len(c.left) == 0 {
		m.kill(c)
	}
}

// ackAndReceive settles a claim with the next receive of its member.
func (m *model) ackAndReceive(c *modelClaim) {
	var next *pgstream.Claim
	if m.spec.MaxAttempts > 0 {
		m.buried()
	}
	if !m.use(c, ackAndReceive, func() (err error) {
		next, err = m.members[c.member].AckAndTryReceive(m.e.ctx, c.token)
		return err
	}) {
		return
	}
	m.hasty = append(m.hasty, c)
	m.acked(c)
	if next != nil {
		m.received(c.member, next)
	}
}

func (m *model) nack(c *modelClaim) {
	some := m.some(c.left)
	delay := time.Duration(m.r.IntN(3)) * time.Second
	if !m.use(c, fmt.Sprintf("nack for %s %v of", delay, some), func() error {
		return m.members[c.member].Nack(m.e.ctx, c.token, some, delay, "no")
	}) {
		return
	}
	ordered := m.spec.Mode == pgstream.ModeOrdered && !c.single()
	last := func(p int64) bool { return m.spec.MaxAttempts > 0 && c.attempts[p] >= m.spec.MaxAttempts }
	again := func(ps []int64) {
		for _, p := range ps {
			m.messages[p].notBefore = m.now + delay
		}
	}
	switch {
	case ordered && m.spec.FailurePolicy == pgstream.FailureBlock:
		again(c.left)
		m.kill(c)
	case ordered && m.spec.FailurePolicy == pgstream.FailureSkip && !last(some[0]):
		again(c.left)
		m.kill(c)
	case ordered && m.spec.FailurePolicy == pgstream.FailureSkip:
		for _, p := range some {
			m.settled[p] = "dead"
		}
		m.kill(c)
	case ordered && !last(some[0]): // parked, with all that comes after them
		again(some)
		parked := slices.DeleteFunc(slices.Clone(c.left), func(q int64) bool {
			return !slices.ContainsFunc(some, func(p int64) bool { return p <= q && m.messages[p].key == m.messages[q].key })
		})
		m.without(c, parked)
	default:
		for _, p := range some {
			if last(p) {
				m.settled[p] = "dead"
			} else {
				again([]int64{p})
			}
		}
		m.without(c, some)
	}
}

func (m *model) leave() {
	i := m.r.IntN(len(m.members))
	m.must(m.members[i].Leave(m.e.ctx))
	m.note("member %d leaves", i)
	for _, c := range m.claims {
		if c.member == i {
			c.dead, c.by = true, nil
		}
	}
}

func (m *model) jump(d time.Duration) {
	m.now += d
	m.e.jump(d)
	m.written()
	m.note("%s pass", d)
}

func (m *model) maintain() {
	did, err := pgstream.MaintainWithRing(m.e.ctx, m.e.Pool, 1)
	if err != nil {
		m.fail("maintain: %v", err)
	}
	m.note("maintain: %v", did)
	m.learn()
	if m.retention == pgstream.RetentionLimits {
		m.lose(one[int64](m.e, "select first_position from millrace_engine.stream"))
	}
}

// lose notes that the log has no message below the mark any more. What was handed out or set aside may still come.
func (m *model) lose(mark int64) {
	for p, msg := range m.messages {
		if p < mark && m.settled[p] == "" {
			msg.trimmed = true
		}
	}
}

// redrive moves dead letters back to the group.
func (m *model) redrive() {
	before := m.buried()
	most := 1 + m.r.IntN(3)
	n, err := pgstream.Redrive(m.e.ctx, m.e, "orders", "g", pgstream.RedriveOptions{Max: int64(most)})
	m.must(err)
	want := before[:min(most, len(before))]
	m.note("redrive %v", want)
	left := m.buried()
	if int(n) != len(want) || !slices.Equal(left, before[len(want):]) {
		m.fail("redrive moved %d; %v were dead, and are %v", n, before, left)
	}
	for _, p := range want {
		delete(m.settled, p)
		m.messages[p].redriven, m.messages[p].notBefore = true, 0
	}
	if n > 0 {
		m.written()
	}
}

// reset moves the group, and ends everything that it holds.
func (m *model) reset() {
	first := one[int64](m.e, "select first_position from millrace_engine.stream")
	to := pgstream.Place{From: pgstream.StartEarliest}
	m.start = first
	if m.r.IntN(2) == 0 && len(m.messages) > 0 {
		top := slices.Max(slices.Collect(maps.Keys(m.messages)))
		to = pgstream.Place{From: pgstream.StartPosition, Position: max(first, 1+m.r.Int64N(top+1))}
		m.start = to.Position
	}
	_, err := pgstream.PurgeDeadLetters(m.e.ctx, m.e, "orders", "g", pgstream.DeadLetterFilter{})
	m.must(err)
	_, err = pgstream.ResetGroup(m.e.ctx, m.e, "orders", "g", to)
	m.must(err)
	m.note("reset to %d", m.start)
	for _, c := range m.claims {
		c.dead, c.by = true, nil
	}
	for p, msg := range m.messages {
		msg.redriven, msg.notBefore = false, 0
		switch {
		case p >= m.start:
			delete(m.settled, p)
			msg.trimmed = false
		default:
			m.settled[p] = "passed over"
		}
	}
	m.written()
}

func (m *model) trim() {
	if len(m.messages) == 0 {
		return
	}
	top := slices.Max(slices.Collect(maps.Keys(m.messages)))
	mark := one[int64](m.e, "select millrace.trim('orders', $1)", 1+m.r.Int64N(top+1))
	m.note("trim up to %d", mark)
	m.lose(mark)
}

// crash kills the server. What was committed asynchronously a moment ago may be undone: claims, and the end of claims that they took over.
func (m *model) crash(s *postgres.Server) {
	m.must(s.Kill())
	m.must(s.Restart(m.e.ctx))
	m.e.Reset()
	m.note("the server was killed")
	for _, tx := range m.open {
		for _, id := range tx.delayed {
			delete(m.delayed, id)
		}
		_ = tx.tx.Rollback(m.e.ctx)
	}
	m.open = nil
	for p, msg := range m.messages {
		if !msg.committed {
			delete(m.messages, p) // the position may be given away again
		}
	}
	for _, c := range m.hasty {
		c.dead, c.unsure = false, true
		for _, p := range c.left {
			delete(m.settled, p)
			m.messages[p].trimmed = true // acked or not
		}
	}
	m.hasty = nil
	for _, c := range m.claims {
		if c.durable {
			continue
		}
		c.unsure = true
		for _, old := range m.claims {
			if old.by == c {
				old.dead, old.unsure, old.by = false, true, nil
			}
		}
	}
}

// finish ends everything and checks that nothing was lost.
func (m *model) finish() {
	for len(m.open) > 0 {
		m.end()
	}
	m.note("everything is committed and handled")
	for quiet := 0; quiet < 3; quiet++ {
		m.jump(time.Hour)
		m.moveDue()
		for i := range m.members {
			for {
				c := m.receive(i)
				if c == nil {
					break
				}
				quiet = 0
				if i == m.auto {
					continue
				}
				if m.use(c, "ack", func() error { return m.members[i].Ack(m.e.ctx, c.token) }) {
					m.acked(c)
				}
			}
		}
	}
	m.buried()
	if len(m.delayed) > 0 {
		m.fail("%d delayed messages never came into the log", len(m.delayed))
	}
	for p, msg := range m.messages {
		if msg.committed && msg.wanted && !msg.trimmed && p >= m.start && m.settled[p] == "" {
			m.fail("position %d was committed and never delivered to its end", p)
		}
	}
	for p, how := range m.settled {
		if how == "dead" && !m.messages[p].trimmed && !slices.Contains(m.buried(), p) {
			m.fail("position %d should be a dead letter", p)
		}
	}
	if s := m.e.stats("orders", "g"); s.InFlight != 0 || s.Retrying != 0 {
		m.fail("at the end: %+v", s)
	}
}

// newModel makes a stream and a group of a kind that the seed decides.
func newModel(e *engine, mode pgstream.Mode, seed uint64) *model {
	r := rand.New(rand.NewPCG(seed, 0))
	m := &model{e: e, r: r, seed: seed, start: 1, auto: -1, messages: map[int64]*modelMessage{}, settled: map[int64]string{}, delayed: map[int]*delayedMessage{},
		remembered: map[string]struct {
			position int64
			until    time.Duration
		}{}}
	e.stopClock()
	m.retention = []pgstream.RetentionPolicy{pgstream.RetentionLimits, pgstream.RetentionLimits, pgstream.RetentionInterest}[r.IntN(3)]
	limit := 0
	if m.retention == pgstream.RetentionLimits && r.IntN(3) == 0 {
		limit = 20
	}
	e.run("select millrace_engine.apply_stream($1)", fmt.Sprintf(`{"name": "orders", "retention_policy": %q, "max_messages": %d}`, m.retention, limit))
	m.spec = pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: modelAckWait, MaxAttempts: []int{0, 0, 3}[r.IntN(3)]}
	if mode == pgstream.ModeOrdered {
		m.spec.FailurePolicy = []pgstream.FailurePolicy{pgstream.FailureBlock, pgstream.FailureSkip, pgstream.FailurePark}[r.IntN(3)]
	}
	if r.IntN(4) == 0 {
		m.spec.Filter.Headers = map[string]any{"kind": "special"}
	}
	e.group(m.spec)
	if r.IntN(4) == 0 {
		m.auto = 3
	}
	for i := range 4 {
		m.members = append(m.members, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: fmt.Sprintf("m%d", i),
			MaxMessages: 1 + r.IntN(12), AutoAck: i == m.auto}))
	}
	return m
}

// step does one random thing.
func (m *model) step() {
	switch n := m.r.IntN(1000); {
	case n < 200:
		m.publish()
	case n < 300:
		m.end()
	case n < 600:
		m.receive(m.r.IntN(len(m.members)))
	case n < 860:
		m.settle()
	case n < 880:
		m.leave()
	case n < 930:
		m.jump([]time.Duration{time.Duration(1+m.r.IntN(8)) * time.Second, 3 * modelAckWait}[m.r.IntN(4)/3])
	case n < 965:
		m.maintain()
	case n < 980:
		m.moveDue()
	case n < 990:
		m.redrive()
	case n < 995:
		m.trim()
	default:
		m.reset()
	}
}

func (m *model) run() {
	for range 20 + m.r.IntN(150) {
		m.step()
	}
	m.finish()
}

// schedule is the seed that MILLRACE_SCHEDULE asks for.
func schedule(t testing.TB) (seed uint64, asked bool) {
	t.Helper()
	s := os.Getenv("MILLRACE_SCHEDULE")
	if s == "" {
		return 0, false
	}
	seed, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("MILLRACE_SCHEDULE=%q is not a number", s)
	}
	return seed, true
}

func TestTheEngineDoesWhatItsModelDoes(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		r := random(t)
		length := soak(t, 6*time.Second)
		e := newEngine(t)
		e.extendDeadline(length)
		// No crash here, so nothing needs to be on disk.
		e.run("do $$ begin execute format('alter database %I set synchronous_commit = off', current_database()); end $$")
		e.Reset()
		schedules, steps, settled := 0, 0, 0
		for start, told := time.Now(), time.Now(); ; schedules++ {
			seed, asked := schedule(t)
			if !asked {
				seed = r.Uint64()
			}
			m := newModel(e, mode, seed)
			m.run()
			e.run("select millrace_engine.drop_stream('orders', false)")
			settled += len(m.settled)
			steps += len(m.log)
			if asked || time.Since(start) > length {
				break
			}
			if time.Since(told) > 30*time.Second {
				told = time.Now()
				t.Logf("after %s: %d schedules, %d steps, %d messages settled", time.Since(start).Round(time.Second), schedules, steps, settled)
			}
		}
		if settled == 0 {
			t.Error("nothing was settled: the run proves nothing")
		}
		t.Logf("%d schedules, %d steps, %d messages settled", schedules+1, steps, settled)
	})
}

func TestTheEngineDoesWhatItsModelDoesOverCrashes(t *testing.T) {
	t.Parallel()
	r := random(t)
	length := soak(t, 5*time.Second)
	e, server := ownServer(t)
	e.extendDeadline(length)
	crashes := 0
	for start := time.Now(); ; {
		seed, asked := schedule(t)
		if !asked {
			seed = r.Uint64()
		}
		mode := []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered}[seed%2]
		m := newModel(e, mode, seed)
		for range 2 {
			for range 20 + m.r.IntN(60) {
				m.step()
			}
			m.crash(server)
			crashes++
		}
		m.run()
		e.run("select millrace_engine.drop_stream('orders', false)")
		if asked || time.Since(start) > length {
			break
		}
	}
	t.Logf("%d crashes", crashes)
}

// alarm is a test that fails inside another one.
type alarm struct {
	testing.TB
	said string
}

func (a *alarm) Helper() {}

func (a *alarm) Fatalf(format string, args ...any) {
	a.said = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func (a *alarm) Fatal(args ...any) { a.Fatalf("%s", fmt.Sprint(args...)) }

func (a *alarm) Errorf(format string, args ...any) { a.said = fmt.Sprintf(format, args...) }

func TestTheModelSeesWhatIsBroken(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		mode   pgstream.Mode
		damage func(e *engine)
	}{
		{"filters", pgstream.ModeShared, func(e *engine) {
			e.run(`create or replace function millrace_engine.matches(p_filter jsonb, p_key text, p_headers jsonb) returns boolean
				language sql immutable parallel safe return true`)
		}},
		{"delays of nacks", pgstream.ModeShared, func(e *engine) {
			e.run(`create or replace function millrace_engine.delay(p_group millrace_engine.consumer_group, p_attempt integer, p_seconds double precision)
				returns interval language sql volatile return interval '0'`)
		}},
		{"dedupe keys", pgstream.ModeShared, func(e *engine) {
			e.mutate("millrace_engine.remember", "millrace_engine.clock() + make_interval", "millrace_engine.clock() - make_interval")
		}},
		{"takeovers of what has expired only", pgstream.ModeShared, func(e *engine) {
			e.mutate("millrace_engine.take_over", "o.expires_at > p_now", "false")
			e.mutate("millrace_engine.take_over", "again.expires_at > p_now", "false")
			e.mutate("millrace_engine.receive_template", "now_ >= last.next_check", "true")
		}},
		{"the order of a key", pgstream.ModeOrdered, func(e *engine) {
			e.mutate("millrace_engine.receive_template", "continue when g.mode = 'Ordered' and t.blocked and taken.claim is null", "continue when false")
		}},
		{"acks inside a claim", pgstream.ModeShared, func(e *engine) {
			e.mutate("millrace_engine.open_claims", " + coalesce(progress.settled, '{}'::int8multirange)", "")
		}},
		{"delayed messages", pgstream.ModeShared, func(e *engine) {
			e.mutate("millrace_engine.move_due", "millrace_engine.clock()", "(millrace_engine.clock() + interval '5 seconds')")
		}},
		{"resets", pgstream.ModeOrdered, func(e *engine) {
			e.run(`create or replace function millrace_engine.move_group(p_group integer, p_stream millrace_engine.stream, p_place jsonb) returns bigint
				language sql as 'select 0::bigint'`)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			a := &alarm{TB: t}
			quiet := *e
			quiet.t = a
			c.damage(e)
			for seed := uint64(1); seed <= 60 && a.said == ""; seed++ {
				done := make(chan struct{})
				go func() {
					defer close(done)
					m := newModel(&quiet, c.mode, seed)
					defer func() {
						for _, tx := range m.open {
							_ = tx.tx.Rollback(e.ctx)
						}
					}()
					m.run()
				}()
				<-done
				e.run("select millrace_engine.drop_stream('orders', false)")
			}
			if a.said == "" {
				t.Error("the model saw nothing wrong")
			}
			t.Logf("it said: %.150s", a.said)
		})
	}
}
