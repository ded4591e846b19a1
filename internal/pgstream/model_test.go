package pgstream_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// A random schedule of everything that publishers, members and maintenance do, step by step against a model in memory. The engine's clock
// stands still between steps, so the model knows exactly what has expired.

const modelAckWait = 10 * time.Second

type modelMessage struct {
	key       string
	committed bool
}

// modelClaim is a claim as the model sees it. Whoever took its messages over, or ended it, made it dead.
type modelClaim struct {
	member  int
	token   string
	left    []int64 // unsettled, in order
	expires time.Duration
	dead    bool
}

type model struct {
	e        *engine
	r        *rand.Rand
	mode     pgstream.Mode
	now      time.Duration
	messages map[int64]*modelMessage
	settled  map[int64]string // acked or dead
	claims   []*modelClaim    // every claim that was ever handed out, the oldest first
	members  []*pgstream.Consumer
	open     []*modelTx
	log      []string
	broken   bool
}

type modelTx struct {
	tx        pgx.Tx
	positions []int64
}

func (m *model) note(format string, args ...any) { m.log = append(m.log, fmt.Sprintf(format, args...)) }

func (m *model) fail(format string, args ...any) {
	m.e.t.Helper()
	m.broken = true
	tail := m.log[max(0, len(m.log)-40):]
	m.e.t.Fatalf(format+"\nthe last steps:\n%s", append(args, strings.Join(tail, "\n"))...)
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

func (m *model) publish() {
	if len(m.open) < 3 && m.r.IntN(3) == 0 {
		m.open = append(m.open, &modelTx{tx: m.e.begin()})
		m.note("begin")
	}
	var db pgstream.DB = m.e
	var tx *modelTx
	if len(m.open) > 0 && m.r.IntN(2) == 0 {
		tx = m.open[m.r.IntN(len(m.open))]
		db = tx.tx
	}
	ms := make([]pgstream.NewMessage, 1+m.r.IntN(6))
	for i := range ms {
		key := fmt.Sprintf("k%d", m.r.IntN(5))
		ms[i] = pgstream.NewMessage{Key: &key, Payload: []byte(`{}`)}
	}
	positions, err := pgstream.PublishBatch(m.e.ctx, db, "orders", ms)
	must(m.e.t, err)
	for i, p := range positions {
		m.messages[p] = &modelMessage{key: *ms[i].Key, committed: tx == nil}
	}
	if tx != nil {
		tx.positions = append(tx.positions, positions...)
	}
	m.note("publish %v, committed %t", positions, tx == nil)
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
		m.note("rollback %v", tx.positions)
	} else {
		commit(m.e, tx.tx)
		for _, p := range tx.positions {
			m.messages[p].committed = true
		}
		m.note("commit %v", tx.positions)
	}
	_ = tx.tx.Conn().Close(m.e.ctx)
}

func (m *model) receive() *modelClaim {
	i := m.r.IntN(len(m.members))
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
	fresh := &modelClaim{member: member, token: claim.Token, left: positions(claim), expires: m.now + modelAckWait}
	inClaim := map[string]int64{}
	for _, msg := range claim.Messages {
		p := msg.Position
		known := m.messages[p]
		switch {
		case known == nil || !known.committed:
			m.fail("position %d was delivered and is not committed", p)
		case m.settled[p] != "":
			m.fail("position %d was delivered after it was %s", p, m.settled[p])
		case *msg.Key != known.key:
			m.fail("position %d has key %s, published with %s", p, *msg.Key, known.key)
		}
		if holder := m.live(p); holder != nil {
			if holder.expires > m.now {
				m.fail("position %d was delivered while %s holds it", p, holder.token)
			}
			holder.dead = true // its messages are somebody else's from here
			m.note("%s is taken over", holder.token)
		}
		if m.mode == pgstream.ModeOrdered {
			if last := inClaim[known.key]; last > p {
				m.fail("position %d of key %s comes after %d in one claim", p, known.key, last)
			}
			inClaim[known.key] = p
			for q, other := range m.messages {
				if q < p && other.key == known.key && other.committed && m.settled[q] == "" && !slices.Contains(fresh.left, q) {
					m.fail("position %d of key %s was delivered before %d", p, known.key, q)
				}
			}
		}
	}
	m.claims = append(m.claims, fresh)
	return fresh
}

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
	if errors.Is(err, pgstream.ErrFenced) && c.expires <= m.now {
		c.dead = true // set aside by somebody's receive, which found it expired
		return false
	}
	if err != nil {
		m.fail("%s with %s, which is held: %v", verb, c.token, err)
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
	return chosen
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
	without := func(gone []int64) {
		c.left = slices.DeleteFunc(c.left, func(p int64) bool { return slices.Contains(gone, p) })
		c.dead = c.dead || len(c.left) == 0
	}
	switch m.r.IntN(12) {
	default:
		if m.use(c, "ack", func() error { return member.Ack(ctx, c.token) }) {
			for _, p := range c.left {
				m.settled[p] = "acked"
			}
			c.dead = true
		}
	case 0: // in a transaction that is rolled back
		m.use(c, "ack and rollback", func() error {
			tx := m.e.begin()
			err := member.AckTx(ctx, tx, c.token)
			rollback(m.e, tx)
			_ = tx.Conn().Close(ctx)
			return err
		})
	case 1, 2:
		some := m.some(c.left)
		if m.mode == pgstream.ModeOrdered { // a handler of an Ordered group goes forward
			some = c.left[:len(some)]
		}
		some = slices.Clone(some)
		if m.use(c, fmt.Sprintf("ack %v of", some), func() error { return member.AckMessages(ctx, c.token, some) }) {
			for _, p := range some {
				m.settled[p] = "acked"
			}
			without(some)
		}
	case 3, 4:
		some := slices.Clone(m.some(c.left))
		if m.use(c, fmt.Sprintf("nack %v of", some), func() error {
			return member.Nack(ctx, c.token, some, time.Duration(m.r.IntN(3))*time.Second, "no")
		}) {
			if m.mode == pgstream.ModeOrdered {
				c.dead = true
			} else {
				without(some)
			}
		}
	case 5:
		some := slices.Clone(m.some(c.left))
		if m.use(c, fmt.Sprintf("dead letter %v of", some), func() error { return member.DeadLetter(ctx, c.token, some, "bad") }) {
			for _, p := range some {
				m.settled[p] = "a dead letter"
			}
			without(some)
		}
	case 6:
		if m.use(c, "release", func() error { return member.Release(ctx, c.token) }) {
			c.dead = true
		}
	case 7:
		if m.use(c, "extend", func() error { _, err := member.Extend(ctx, c.token, 2*modelAckWait); return err }) {
			c.expires = m.now + 2*modelAckWait
		}
	}
}

func (m *model) leave() {
	i := m.r.IntN(len(m.members))
	must(m.e.t, m.members[i].Leave(m.e.ctx))
	m.note("member %d leaves", i)
	for _, c := range m.claims {
		if c.member == i {
			c.dead = true
		}
	}
}

func (m *model) jump() {
	d := time.Duration(1+m.r.IntN(8)) * time.Second
	if m.r.IntN(4) == 0 {
		d = 3 * modelAckWait
	}
	m.now += d
	m.e.jump(d)
	m.note("%s pass", d)
}

func (m *model) maintain() {
	did, err := pgstream.MaintainWithRing(m.e.ctx, m.e.Pool, 1)
	if err != nil {
		m.fail("maintain: %v", err)
	}
	m.note("maintain: %v", did)
}

// finish ends everything and checks that nothing was lost.
func (m *model) finish() {
	for len(m.open) > 0 {
		m.end()
	}
	m.e.jump(time.Hour)
	m.now += time.Hour
	m.note("an hour passes; everything is committed and handled")
	for idle := 0; idle < 2*len(m.members); {
		c := m.receive()
		if c == nil {
			if idle++; idle%len(m.members) == 0 {
				m.e.jump(time.Hour)
				m.now += time.Hour
			}
			continue
		}
		idle = 0
		must(m.e.t, m.members[c.member].Ack(m.e.ctx, c.token))
		for _, p := range c.left {
			m.settled[p] = "acked"
		}
		c.dead = true
	}
	for p, msg := range m.messages {
		if msg.committed && m.settled[p] == "" {
			m.fail("position %d was committed and never delivered to its end", p)
		}
	}
	dead := 0
	for _, how := range m.settled {
		if how == "a dead letter" {
			dead++
		}
	}
	s := m.e.stats("orders", "g")
	if s.InFlight != 0 || s.Retrying != 0 || s.Lag != 0 || s.DeadLetters != int64(dead) {
		m.fail("at the end: %+v, with %d dead letters", s, dead)
	}
}

func runModel(e *engine, mode pgstream.Mode, r *rand.Rand, steps int) *model {
	m := &model{e: e, r: r, mode: mode, messages: map[int64]*modelMessage{}, settled: map[int64]string{}}
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: modelAckWait, MaxAttempts: 0})
	for i := range 4 {
		m.members = append(m.members, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: fmt.Sprintf("m%d", i), MaxMessages: 1 + r.IntN(12)}))
	}
	for range steps {
		switch n := r.IntN(100); {
		case n < 20:
			m.publish()
		case n < 30:
			m.end()
		case n < 60:
			m.receive()
		case n < 88:
			m.settle()
		case n < 91:
			m.leave()
		case n < 95:
			m.jump()
		default:
			m.maintain()
		}
	}
	m.finish()
	return m
}

func TestTheEngineDoesWhatItsModelDoes(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		r := random(t)
		length := soak(t, 3*time.Second)
		var settled int
		for start := time.Now(); ; {
			e := newEngine(t)
			e.extendDeadline(length)
			m := runModel(e, mode, r, 400)
			settled += len(m.settled)
			e.Close()
			if time.Since(start) > length {
				break
			}
		}
		if settled == 0 {
			t.Error("nothing was settled: the run proves nothing")
		}
		t.Logf("%d messages were settled", settled)
	})
}
