package pgstream_test

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Groups with a queue policy, and those for unrouted messages, in the model. They hand out in an order that anybody can tell, so the model says what a receive
// has to return.

// queued is a message in the delivery table of such a group. Without attempts it is queued, with some it waits for another delivery, or a claim has it.
type queued struct {
	attempts int
	due      time.Duration
}

// modelRoute is another group of the stream, whose filter takes messages away from the one for unrouted messages.
type modelRoute struct {
	filter int     // of filters
	read   []int64 // of each lane: the last place that it had, or the one before its beginning
	member *pgstream.Consumer
}

func (m *model) queues() bool { return m.oneQueued() || m.oneActive() || m.spec.Filter.Unrouted }

func (m *model) oneQueued() bool {
	return m.spec.QueuePolicy == pgstream.QueueShort || m.spec.QueuePolicy == pgstream.QueueStately
}

func (m *model) oneActive() bool {
	return m.spec.QueuePolicy == pgstream.QueueSingleton || m.spec.QueuePolicy == pgstream.QueueStately
}

// chooseQueued makes some groups queued.
func (m *model) chooseQueued() {
	kind := m.r.IntN(8)
	switch {
	case kind == 0:
		m.spec.Filter = pgstream.Filter{Unrouted: true}
		m.spec.LapseLag, m.spec.LapseAfter = 0, 0
		if m.retention == pgstream.RetentionWorkQueue { // which has one group only
			m.retention = pgstream.RetentionInterest
		}
	case kind <= 3 && m.lanes == 1:
		m.keys = 2 // so that they meet
		m.spec.MaxAttempts = m.r.IntN(3)
		m.spec.QueuePolicy = []pgstream.QueuePolicy{pgstream.QueueShort, pgstream.QueueSingleton, pgstream.QueueStately}[kind-1]
	}
}

// horizon is the highest place of a lane that can be read.
func (m *model) horizon(priority int) int64 {
	top := at(priority, m.base[priority])
	for p := range m.messages {
		if of(p) == priority {
			top = max(top, p)
		}
	}
	for _, tx := range m.open {
		for _, p := range tx.positions {
			if of(p) == priority {
				top = min(top, p-1)
			}
		}
	}
	return top
}

// judge queues what can be read in a lane, or passes it over.
func (m *model) judge(priority int) {
	low, high := m.read[priority], m.horizon(priority)
	for _, p := range slices.Sorted(maps.Keys(m.messages)) {
		msg := m.messages[p]
		if p <= low || p > high || !msg.committed || !msg.wanted || msg.gone || m.queue[p] != nil || m.settled[p] != "" || !m.covered(p) {
			continue
		}
		switch {
		case m.route != nil && passes(filters[m.route.filter], *msg):
			m.settled[p] = "routed"
		case m.oneQueued() && m.isQueued(msg.key):
			m.settled[p] = "passed over"
		default:
			m.queue[p] = &queued{due: m.now}
		}
	}
	m.read[priority] = max(low, high)
}

func (m *model) judgeAll() {
	for priority := range m.lanes {
		m.judge(priority)
	}
}

// isQueued says that a message of the key was never handed out, or as good as never.
func (m *model) isQueued(key string) bool {
	for p, q := range m.queue {
		if q.attempts == 0 && m.messages[p].key == key {
			return true
		}
	}
	return false
}

// expire ends the claims of a lane that have expired.
func (m *model) expire(priority int) {
	for _, c := range m.claims {
		if c.dead || c.settling != nil || c.expires > m.now || of(c.left[0]) != priority {
			continue
		}
		c.dead, c.by = true, nil
		for _, p := range c.left {
			if m.retryIsTaken(p) {
				m.finished(p, "dead")
				continue
			}
			m.queue[p].due = c.expires
		}
	}
}

// retryIsTaken says that a message cannot wait for another delivery, because one of its key does.
func (m *model) retryIsTaken(p int64) bool {
	if m.spec.QueuePolicy != pgstream.QueueStately {
		return false
	}
	for other, q := range m.queue {
		if other != p && q.attempts > 0 && m.messages[other].key == m.messages[p].key && m.live(other) == nil {
			return true
		}
	}
	return false
}

// due is what a receive has to return.
func (m *model) due(most int) []int64 {
	if m.spec.Paused {
		return nil
	}
	for priority := m.lanes - 1; priority >= 0; priority-- {
		m.judge(priority)
		m.expire(priority)
		active, taken := map[string]bool{}, map[string]bool{}
		var due []int64
		for p, q := range m.queue {
			switch {
			case of(p) != priority:
			case m.live(p) != nil:
				active[m.messages[p].key] = true
			case q.due <= m.now && (m.spec.MaxAttempts == 0 || q.attempts < m.spec.MaxAttempts):
				due = append(due, p)
			}
		}
		slices.SortFunc(due, func(a, b int64) int { return cmp.Or(cmp.Compare(m.queue[a].due, m.queue[b].due), cmp.Compare(a, b)) })
		if m.oneActive() {
			due = slices.DeleteFunc(due, func(p int64) bool {
				key := m.messages[p].key
				waits := active[key] || taken[key]
				taken[key] = true
				return waits
			})
		}
		if len(due) > 0 {
			return due[:min(most, len(due))]
		}
	}
	return nil
}

// released notes that a claim was given back: its attempt does not count.
func (m *model) released(c *modelClaim) {
	if !m.queues() {
		return
	}
	for _, p := range c.left {
		m.queue[p].attempts--
		m.queue[p].due = m.now
	}
	if !m.oneQueued() {
		return
	}
	for _, p := range c.left {
		key := m.messages[p].key
		var all []int64
		for other, q := range m.queue {
			if q.attempts == 0 && m.messages[other].key == key {
				all = append(all, other)
			}
		}
		for i, later := range sorted(all) {
			if i > 0 {
				m.finished(later, "passed over")
			}
		}
	}
}

// mayQueue says that a dead letter can be queued again.
func (m *model) mayQueue(p int64, dead []int64) bool {
	key := m.messages[p].key
	return !m.oneQueued() || !m.isQueued(key) && !slices.ContainsFunc(dead, func(q int64) bool { return q < p && m.messages[q].key == key })
}

// learnQueue asks what a crash has left, and checks that it has lost nothing.
func (m *model) learnQueue() {
	rows, err := m.e.Query(m.e.ctx, `select s.priority * $1::bigint + d."position", d.attempt, coalesce(d.nonce, 0),
			(extract(epoch from d.visible_at) * 1000000)::bigint
		from millrace_engine.delivery d join millrace_engine.consumer_group g on g.id = d.group_id join millrace_engine.stream s on s.id = g.stream_id
		where g.name = $2`, int64(lane), modelGroup)
	m.must(err)
	clear(m.queue)
	held := map[string][]int64{}
	var p, visible int64
	var nonce string
	var attempts int
	_, err = pgx.ForEachRow(rows, []any{&p, &attempts, &nonce, &visible}, func() error {
		m.queue[p] = &queued{attempts: attempts, due: time.Duration(visible)*time.Microsecond - m.epoch}
		held[nonce] = append(held[nonce], p)
		if how := m.settled[p]; how != "" {
			m.fail("position %d is queued after it was %s", p, how)
		}
		return nil
	})
	m.must(err)
	for _, c := range m.claims {
		nonce := c.token[strings.LastIndex(c.token, ".")+1:]
		c.left = sorted(held[nonce])
		c.dead, c.unsure, c.by = len(c.left) == 0, false, nil
		if !c.dead {
			c.expires = m.queue[c.left[0]].due
		}
	}
	for priority := range m.lanes {
		m.read[priority] = at(priority, one[int64](m.e, `select c.frontier from millrace_engine.consumer_group g
			join millrace_engine.stream s on s.id = g.stream_id join millrace_engine.claim c on c.lane_id = g.lane_id
			where g.name = $1 and s.priority = $2 order by c.claim desc limit 1`, modelGroup, priority))
	}
	m.buried()
	for p, msg := range m.messages {
		judged := p <= m.read[of(p)]
		switch how := m.settled[p]; {
		case !judged && (how == "passed over" && m.covered(p) || how == "routed"):
			delete(m.settled, p)
		case judged && how == "" && m.queue[p] == nil && m.oneQueued():
			m.settled[p] = "passed over"
		case judged && how == "" && m.queue[p] == nil && msg.committed && msg.wanted && !msg.trimmed && m.covered(p):
			m.fail("position %d was lost by a crash", p)
		}
	}
}

// purgeDeliveries removes what waits for another delivery.
func (m *model) purgeDeliveries() {
	before := m.buried()
	var filter pgstream.DeadLetterFilter
	if m.r.IntN(2) == 0 {
		filter.Keys = []string{"k0", "k1"}
	}
	rows, err := m.e.Query(m.e.ctx, `select s.priority * $1::bigint + d."position" from millrace_engine.delivery d
		join millrace_engine.consumer_group g on g.id = d.group_id join millrace_engine.stream s on s.id = g.stream_id
		where g.name = $2 and (d.nonce is null or d.visible_at <= millrace_engine.clock())`, int64(lane), modelGroup)
	m.must(err)
	waiting, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	m.must(err)
	n, err := pgstream.PurgeDeliveries(m.e.ctx, m.e, m.spec.Stream, modelGroup, filter)
	m.must(err)
	if m.queues() {
		for priority := range m.lanes {
			m.expire(priority)
		}
	}
	dead := m.buried()
	gone := 0
	for _, p := range sorted(waiting) {
		c := m.live(p)
		if filter.Keys != nil && !slices.Contains(filter.Keys, m.messages[p].key) || c != nil && c.settling != nil || slices.Contains(dead, p) && !slices.Contains(before, p) {
			continue
		}
		if m.settled[p] != "" || c != nil && c.expires > m.now && !c.unsure {
			m.fail("position %d was purged, and it was %q, held by %+v", p, m.settled[p], c)
		}
		m.finished(p, "purged")
		gone++
	}
	m.note("purge %d of the deliveries %v", gone, waiting)
	if int(n) != gone {
		m.fail("%d deliveries were purged, not %d of %v", n, gone, waiting)
	}
	if gone > 0 { // a transaction that has written nothing waits for no disk
		m.written()
	}
}

// rotate moves the stream's ring on, as maintenance does when a segment is large.
func (m *model) rotate() {
	m.e.run(`select millrace_engine.next_segment(s, millrace_engine.segment(s.id)) from millrace_engine.stream s
		where s.name = $1 or s.parent_id = (select p.id from millrace_engine.stream p where p.name = $1)`, m.spec.Stream)
	m.note("rotate")
}

// wait notes that somebody waits for messages: from then on publishers notify, and readers of the horizon try locks instead of listing them.
func (m *model) wait() {
	m.e.run("select millrace_engine.wait_for(array[s.id]), millrace_engine.confirm_fresh_locks(s.id) from millrace_engine.stream s where s.name = $1", m.spec.Stream)
	m.note("somebody waits")
}

// repartition raises the number of partitions.
func (m *model) repartition() {
	if m.spec.Mode != pgstream.ModeOrdered {
		return
	}
	m.e.run(`update millrace_engine.stream s set partitions = least(s.partitions * 2, 64)
		where s.name = $1 or s.parent_id = (select p.id from millrace_engine.stream p where p.name = $1)`, m.spec.Stream)
	m.note("twice the partitions")
}

// reroute makes another group whose filter takes messages, changes it, works for it, or drops it.
func (m *model) reroute() {
	if !m.spec.Filter.Unrouted {
		return
	}
	m.endSettling() // handing over waits for who acks a message that is handed over again
	switch n := m.r.IntN(6); {
	case m.route == nil:
		r := &modelRoute{filter: m.r.IntN(len(filters))}
		m.judgeAll() // by the routes that there were
		m.applyRoute(r.filter)
		for priority := range m.lanes {
			r.read = append(r.read, m.horizon(priority))
		}
		r.member = m.e.consumer(pgstream.ConsumerConfig{Stream: m.spec.Stream, Group: "route", Member: "r", MaxMessages: 1})
		m.route = r
	case n == 0:
		m.dropRoute()
	case n == 1:
		m.judgeAll()
		before, after := filters[m.route.filter], (m.route.filter+1+m.r.IntN(len(filters)-1))%len(filters)
		m.route.filter = after
		m.applyRoute(after)
		m.handOver(func(msg modelMessage) bool { return passes(before, msg) && !passes(filters[after], msg) }, 0)
	default:
		if claim, _ := m.routeReceives(); claim != nil {
			m.must(m.route.member.Ack(m.e.ctx, claim.Token))
		}
	}
}

func (m *model) applyRoute(filter int) {
	m.must(pgstream.ApplyGroup(m.e.ctx, m.e, pgstream.GroupSpec{Stream: m.spec.Stream, Name: "route", AckWait: modelAckWait,
		StartFrom: pgstream.StartLatest, Filter: filters[filter]}))
	m.note("a route for %+v", filters[filter])
}

// routeReceives takes the next message of the route. 0: none.
func (m *model) routeReceives() (*pgstream.Claim, int64) {
	claim, err := m.route.member.TryReceive(m.e.ctx)
	m.must(err)
	var want int64
	for priority := m.lanes - 1; priority >= 0 && want == 0; priority-- {
		for _, p := range slices.Sorted(maps.Keys(m.messages)) {
			msg := m.messages[p]
			if of(p) == priority && p > m.route.read[priority] && p <= m.horizon(priority) && msg.committed && !msg.gone && !msg.deleted &&
				passes(filters[m.route.filter], *msg) {
				want = p
				m.route.read[priority] = p
				break
			}
		}
	}
	m.note("the route receives %v", positions(claim))
	if got := positions(claim); want == 0 && len(got) > 0 || want != 0 && !slices.Equal(got, []int64{local(want)}) {
		m.fail("the route received %v, and not %d", got, want)
	}
	return claim, want
}

// dropRoute drops the route, perhaps while it holds a message.
func (m *model) dropRoute() {
	m.endSettling()
	var held int64
	if m.r.IntN(2) == 0 {
		_, held = m.routeReceives()
	}
	m.judgeAll()
	before := filters[m.route.filter]
	m.must(pgstream.DropGroup(m.e.ctx, m.e, m.spec.Stream, "route", pgstream.Owner{}))
	m.note("the route is dropped")
	m.handOver(func(msg modelMessage) bool { return passes(before, msg) }, held)
	m.route = nil
}

// handOver queues what the route had before it, or holds, and has no more. A dead letter stays one.
func (m *model) handOver(left func(modelMessage) bool, held int64) {
	dead := m.buried()
	for p, msg := range m.messages {
		if slices.Contains(dead, p) {
			continue
		}
		if (p > m.route.read[of(p)] && p <= m.read[of(p)] || p == held) && msg.committed && !msg.gone && !msg.deleted && m.queue[p] == nil && left(*msg) {
			delete(m.settled, p)
			m.queue[p] = &queued{due: m.now}
		}
	}
}
