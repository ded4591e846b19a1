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
// clock stands still between steps, so the model knows exactly what has expired. A schedule follows from its seed alone, and each of its steps from
// the seed and the step's number, so that steps can be left out of it. Many schedules share a stream, each with a group of its own that begins where
// the last one ended: making a stream takes as long as a schedule.
//
// Positions are counted for each priority. Here a position is a place: priority * lane + position.

const (
	modelAckWait = 10 * time.Second
	modelGroup   = "g"
	lane         = 1 << 40

	// of everyLane
	lastPosition = "coalesce(pg_sequence_last_value(('millrace_engine.position_' || s.id)::regclass), 0)"
)

type modelMessage struct {
	id        int
	priority  int
	key       string // "": none
	kind      string // a header, "": no headers
	wanted    bool   // it passes the group's filter
	committed bool
	trimmed   bool          // it may never come, because the log has lost it
	gone      bool          // the log has lost it
	deleted   bool          // a member has removed it from the log
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
	settling *modelTx    // the open transaction that acks it
}

// single says that the messages came from the delivery table.
func (c *modelClaim) single() bool { return strings.Contains(c.token, ".0.0.") }

type delayedMessage struct {
	modelMessage
	due time.Duration
}

type model struct {
	e     *engine
	r     *rand.Rand
	spec  pgstream.GroupSpec
	seed  uint64
	steps int      // done so far
	skip  []int    // steps that are left out
	ops   []op     // with the weights of this schedule
	begun []pgx.Tx // every transaction, ended or not

	retention  pgstream.RetentionPolicy
	limit      int // of messages; 0: none
	lanes      int
	window     time.Duration // of dedupe keys
	base       []int64       // of each lane: the last position before the schedule
	now        time.Duration
	ids        int
	start      []int64       // of each lane: where the group began last
	worked     time.Duration // when it received something last, or began
	lapsed     bool
	messages   map[int64]*modelMessage
	places     map[int]int64    // by id
	seen       map[int64]bool   // was handed out
	settled    map[int64]string // acked, dead, or passed over
	delayed    map[int]*delayedMessage
	remembered map[string]struct {
		position int64
		until    time.Duration
	}
	keys    int           // how many
	epoch   time.Duration // the engine's clock when now was 0
	queue   map[int64]*queued
	read    []int64       // of each lane of a queued group: the place up to which its messages were judged
	route   *modelRoute   // nil: there is none
	claims  []*modelClaim // every claim that was ever handed out, the oldest first
	hasty   []*modelClaim // acked by asynchronous commits that a crash may undo
	members []*pgstream.Consumer
	most    []int // messages that each receives at once
	auto    int   // the member that acks by receiving, -1 for none
	open    []*modelTx
	// Histories of the schedule's own keys, as ids of messages: what is committed. One priority only.
	histories map[string][]int
	log       []string
}

// local is the position of a place, as the engine counts it.
func local(place int64) int64 { return place % lane }

func locals(places []int64) []int64 {
	all := make([]int64, len(places))
	for i, p := range places {
		all[i] = local(p)
	}
	return all
}

// of is the priority of a place.
func of(place int64) int { return int(place / lane) }

func at(priority int, position int64) int64 { return int64(priority)*lane + position }

// covered says that the group is to have the place: it is not before where the group began.
func (m *model) covered(place int64) bool { return local(place) >= m.start[of(place)] }

type modelTx struct {
	tx        pgx.Tx
	positions []int64
	delayed   []int
	histories map[string][]int // appended here, each whole; nobody else can append to these keys
	acks      []*modelClaim
	prepared  string // its name, when it was prepared to be committed
}

func (m *model) note(format string, args ...any) { m.log = append(m.log, fmt.Sprintf(format, args...)) }

func (m *model) fail(format string, args ...any) {
	m.e.t.Helper()
	tail := m.log[max(0, len(m.log)-40):]
	m.e.t.Fatalf(format+"\nthe group: %+v, retention %s, %d priorities, dedupe keys for %s\nthe last steps:\n%s",
		append(args, m.spec, m.retention, m.lanes, m.window, strings.Join(tail, "\n"))...)
}

func (m *model) must(err error) {
	m.e.t.Helper()
	if err != nil {
		m.fail("%v", err)
	}
}

// held is how many claims somebody has.
func (m *model) held() int {
	n := 0
	for _, c := range m.claims {
		if !c.dead && len(c.left) > 0 {
			n++
		}
	}
	return n
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
	known := modelMessage{id: m.ids, key: fmt.Sprintf("k%d", m.r.IntN(m.keys)), kind: []string{"plain", "special", "special", "odd", ""}[m.r.IntN(5)]}
	msg := pgstream.NewMessage{Payload: fmt.Appendf(nil, `{"id": %d}`, m.ids)}
	if m.r.IntN(8) == 0 {
		known.key = ""
	} else {
		msg.Key = &known.key
	}
	if known.kind != "" {
		msg.Headers = fmt.Appendf(nil, `{"kind": %q}`, known.kind)
	}
	known.wanted = passes(m.spec.Filter, known)
	return msg, known
}

// passes says whether a filter lets a message pass, but for what is routed elsewhere.
func passes(f pgstream.Filter, msg modelMessage) bool {
	for _, wanted := range f.Headers { // all have the kind, if any
		if list, ok := wanted.([]any); ok && !slices.Contains(list, any(msg.kind)) || !ok && wanted != msg.kind {
			return false
		}
	}
	return (f.WithoutHeaders == nil || msg.kind == "") && (f.Keys == nil || slices.Contains(f.Keys, msg.key)) && strings.HasPrefix(msg.key, f.KeyPrefix)
}

// filters are those that a group may have.
var filters = []pgstream.Filter{
	{Headers: map[string]any{"kind": "special"}},
	{Headers: map[string]any{"kind": []any{"plain", "special"}}},
	{WithoutHeaders: []string{"kind"}},
	{Keys: []string{"k0", "k3"}},
	{KeyPrefix: "k1", Headers: map[string]any{"kind": "special"}},
}

func (m *model) publish() {
	ctx := m.e.ctx
	if m.r.IntN(3) == 0 {
		m.beginTx()
	}
	var db pgstream.DB = m.e
	tx := m.someTx()
	var savepoint pgx.Tx // it is rolled back at once
	if tx != nil {
		db = tx.tx
		if m.r.IntN(4) == 0 {
			var err error
			savepoint, err = tx.tx.Begin(ctx)
			m.must(err)
			db = savepoint
		}
	}
	priority, wrote := m.r.IntN(m.lanes), tx == nil
	switch m.r.IntN(8) {
	case 0:
		msg, known := m.message()
		known.priority, msg.Priority = priority, priority
		msg.Delay = time.Duration(1+m.r.IntN(20)) * time.Second
		position, err := pgstream.Publish(ctx, db, m.spec.Stream, msg)
		m.must(err)
		if position != 0 {
			m.fail("a delayed message has position %d", position)
		}
		known.committed = tx == nil
		if savepoint == nil {
			m.delayed[known.id] = &delayedMessage{known, m.now + msg.Delay}
		}
		if tx != nil && savepoint == nil {
			tx.delayed = append(tx.delayed, known.id)
		}
		m.note("publish %d with a delay of %s, committed %t, rolled back %t", known.id, msg.Delay, tx == nil, savepoint != nil)
	case 1, 2:
		// In a transaction of its own, because two that use one key wait for each other.
		wrote = m.publishOnce(priority)
	case 3:
		wrote = m.publishThrottled(priority)
	default:
		ms := make([]pgstream.NewMessage, 1+m.r.IntN(6))
		all := make([]modelMessage, len(ms))
		for i := range ms {
			ms[i], all[i] = m.message()
			ms[i].Priority, all[i].priority = priority, priority
			all[i].committed = tx == nil
		}
		positions, err := pgstream.PublishBatch(ctx, db, m.spec.Stream, ms)
		m.must(err)
		for i, p := range positions {
			m.append(at(priority, p), &all[i])
			if tx != nil && savepoint == nil {
				tx.positions = append(tx.positions, at(priority, p))
			}
		}
		m.note("publish %v with priority %d, committed %t, rolled back %t", positions, priority, tx == nil, savepoint != nil)
	}
	if savepoint != nil {
		rollback(m.e, savepoint)
	}
	if wrote {
		m.written()
	}
}

// publishOnce publishes messages with dedupe keys, and perhaps rolls back. It returns whether any was committed.
func (m *model) publishOnce(priority int) (wrote bool) {
	ms := make([]pgstream.NewMessage, 1+m.r.IntN(3))
	all := make([]modelMessage, len(ms))
	delay := time.Duration(0)
	if m.r.IntN(5) == 0 {
		delay = time.Duration(1+m.r.IntN(20)) * time.Second
	}
	for i := range ms {
		ms[i], all[i] = m.message()
		ms[i].Priority, all[i].priority, ms[i].Delay = priority, priority, delay
		if n := m.r.IntN(4); n < 3 {
			ms[i].DedupeKey = fmt.Sprintf("d%d", n)
		}
	}
	undone := m.r.IntN(5) == 0
	tx := m.transaction()
	positions, err := pgstream.PublishBatch(m.e.ctx, tx, m.spec.Stream, ms)
	m.must(err)
	if undone {
		rollback(m.e, tx)
		m.note("publish %v with dedupe keys, rolled back", positions)
		return false
	}
	commit(m.e, tx)
	for i, position := range positions {
		key, known := ms[i].DedupeKey, all[i]
		m.note("publish %d with dedupe key %q and a delay of %s: %d", known.id, key, delay, position)
		known.committed = true
		first, exists := m.remembered[key]
		switch {
		case key != "" && exists && first.until > m.now:
			if position != first.position {
				m.fail("a message with a dedupe key of position %d got position %d", first.position, position)
			}
			continue // it may have written nothing
		case delay > 0 && position != 0:
			m.fail("a delayed message has position %d", position)
		case delay > 0:
			m.delayed[known.id] = &delayedMessage{known, m.now + delay}
		default:
			m.append(at(priority, position), &known)
		}
		wrote = true
		if key != "" {
			m.remember(key, position, m.now+m.window)
		}
	}
	return wrote
}

// publishThrottled publishes a message of which there is to be one in each slot of half a minute, and returns whether it was that one.
func (m *model) publishThrottled(priority int) bool {
	const slot = 30 * time.Second
	msg, known := m.message()
	known.priority, msg.Priority = priority, priority
	msg.DedupeKey, msg.Throttle, msg.NextSlot = "t", slot, m.r.IntN(2) == 0
	position, err := pgstream.Publish(m.e.ctx, m.e, m.spec.Stream, msg)
	m.must(err)
	m.note("publish %d, one in %s, in the next slot %t: %d", known.id, slot, msg.NextSlot, position)
	n := (m.epoch + m.now) / slot
	ends := (n+1)*slot - m.epoch
	known.committed = true
	first, exists := m.remembered[fmt.Sprint("slot ", n)]
	next := fmt.Sprint("slot ", n+1)
	switch _, waits := m.remembered[next]; {
	case !exists:
		m.append(at(priority, position), &known)
		m.remember(fmt.Sprint("slot ", n), position, ends)
	case !msg.NextSlot && position != first.position || msg.NextSlot && position != 0:
		m.fail("a message in a slot that has position %d got position %d", first.position, position)
	case msg.NextSlot && !waits:
		m.delayed[known.id] = &delayedMessage{known, ends}
		m.remember(next, 0, ends+slot)
	default:
		return false
	}
	return true
}

func (m *model) remember(key string, position int64, until time.Duration) {
	m.remembered[key] = struct {
		position int64
		until    time.Duration
	}{position, until}
}

// appendTo appends to the history of a key, and expects a version: the right one, a wrong one, or none. A projection makes documents of it.
func (m *model) appendTo() {
	if m.lanes > 1 {
		return // a stream with priorities has no versions
	}
	key := fmt.Sprintf("e%d-%d", m.seed, m.r.IntN(3))
	var db pgstream.DB = m.e
	var tx *modelTx
	for _, open := range m.open {
		if _, holds := open.histories[key]; holds {
			if open.prepared != "" {
				return
			}
			tx = open // whoever else came would wait for it
		}
	}
	if tx == nil {
		tx = m.someTx()
	}
	if tx != nil {
		db = tx.tx
	}
	history := m.histories[key]
	if tx != nil && tx.histories[key] != nil {
		history = tx.histories[key]
	}
	ms := make([]pgstream.NewMessage, 1+m.r.IntN(3))
	all := make([]modelMessage, len(ms))
	for i := range ms {
		ms[i], all[i] = m.message()
		all[i].key, all[i].committed = key, tx == nil
		all[i].wanted = passes(m.spec.Filter, all[i])
	}
	has := int64(len(history))
	expected := []int64{has, has, pgstream.AnyVersion, has + 1, max(has-1, 0), pgstream.NoVersion, pgstream.ExistingVersion}[m.r.IntN(7)]
	fits := expected == has || expected == pgstream.AnyVersion || expected == pgstream.ExistingVersion && has > 0
	var a pgstream.Appended
	try := func(db pgstream.DB) (err error) {
		a, err = pgstream.Append(m.e.ctx, db, m.spec.Stream, key, expected, ms)
		return err
	}
	var err error
	if tx != nil {
		err = pgx.BeginFunc(m.e.ctx, tx.tx, func(savepoint pgx.Tx) error { return try(savepoint) }) // a conflict ends the savepoint only
	} else {
		err = try(db)
	}
	present, conflict := pgstream.IsVersionError(err)
	switch {
	case conflict && (fits || present != has):
		m.fail("an append to %s of version %d that expects %d is refused for version %d", key, has, expected, present)
	case conflict:
		m.note("append to %s of version %d, expected %d: refused", key, has, expected)
		return
	}
	m.must(err)
	if !fits || a.Version != has+int64(len(ms)) {
		m.fail("an append of %d to %s of version %d that expects %d has come to version %d", len(ms), key, has, expected, a.Version)
	}
	grown := slices.Clone(history)
	for i := range all {
		place := at(0, a.Position-int64(len(all)-1-i))
		m.append(place, &all[i])
		grown = append(grown, all[i].id)
		if tx != nil {
			tx.positions = append(tx.positions, place)
		}
	}
	m.note("append to %s of version %d, expected %d: position %d, committed %t", key, has, expected, a.Position, tx == nil)
	if tx != nil {
		tx.histories[key] = grown
		return
	}
	m.histories[key] = grown
	m.written()
}

// checkHistories compares versions with what was appended, and the projection's documents with the fold of it.
func (m *model) checkHistories() {
	for i := range 3 {
		var version int64
		var document string
		key := fmt.Sprintf("e%d-%d", m.seed, i)
		err := m.e.QueryRow(m.e.ctx, `select coalesce((select version from millrace_engine.entity where key = $1 and stream_id = millrace_engine.stream_id($2)), 0),
			coalesce((select document::text from public.model_documents where key = $1), '[]')`, key, m.spec.Stream).Scan(&version, &document)
		m.must(err)
		want := "[" + strings.ReplaceAll(strings.Trim(fmt.Sprint(m.histories[key]), "[]"), " ", ", ") + "]"
		if version != int64(len(m.histories[key])) || document != want {
			m.fail("%s has version %d and document %s, and appended was %s", key, version, document, want)
		}
	}
}

func (m *model) append(place int64, msg *modelMessage) {
	if old := m.messages[place]; old != nil && old.committed {
		m.fail("position %d was given away twice", place)
	}
	m.messages[place], m.places[msg.id] = msg, place
}

// beginTx opens a transaction, unless there are enough.
func (m *model) beginTx() {
	if len(m.open) < 3 {
		tx := &modelTx{tx: m.transaction(), histories: map[string][]int{}}
		exec(m.e, tx.tx, "set local millrace.notify = off") // or it could not be prepared
		m.open = append(m.open, tx)
		m.note("begin")
	}
}

// someTx returns an open transaction, or nil.
func (m *model) someTx() *modelTx {
	working := slices.DeleteFunc(slices.Clone(m.open), func(tx *modelTx) bool { return tx.prepared != "" })
	if len(working) == 0 || m.r.IntN(2) == 0 {
		return nil
	}
	return working[m.r.IntN(len(working))]
}

// ackLater acks a claim in a transaction that stays open.
func (m *model) ackLater(c *modelClaim) {
	m.beginTx()
	tx := m.someTx()
	if tx == nil {
		return
	}
	if m.use(c, ackAndWait, func() error {
		return pgx.BeginFunc(m.e.ctx, tx.tx, func(savepoint pgx.Tx) error { return m.members[c.member].AckTx(m.e.ctx, savepoint, c.token) })
	}) {
		c.settling = tx
		tx.acks = append(tx.acks, c)
	}
}

// end ends a transaction, or prepares it to be ended later.
func (m *model) end() {
	if len(m.open) == 0 {
		return
	}
	tx := m.open[m.r.IntN(len(m.open))]
	another := slices.ContainsFunc(m.open, func(tx *modelTx) bool { return tx.prepared != "" })
	if !another && m.r.IntN(6) == 0 {
		tx.prepared = fmt.Sprintf("%s %d", m.e.Config().ConnConfig.Database, m.steps)
		exec(m.e, tx.tx, "prepare transaction '"+tx.prepared+"'")
		_ = tx.tx.Rollback(m.e.ctx) // for the connection, which has no transaction any more
		m.written()
		m.note("prepare %v %v", tx.positions, tx.delayed)
		return
	}
	m.endTx(tx, m.r.IntN(3) != 0)
}

func (m *model) endTx(tx *modelTx, committed bool) {
	m.open = slices.DeleteFunc(m.open, func(other *modelTx) bool { return other == tx })
	for _, c := range tx.acks {
		c.settling = nil
	}
	if !committed {
		if tx.prepared != "" {
			m.e.run("rollback prepared '" + tx.prepared + "'")
		} else {
			rollback(m.e, tx.tx)
		}
		for _, id := range tx.delayed {
			delete(m.delayed, id)
		}
		m.note("rollback %v %v", tx.positions, tx.delayed)
		return
	}
	if tx.prepared != "" {
		m.e.run("commit prepared '" + tx.prepared + "'")
	} else {
		commit(m.e, tx.tx)
	}
	for _, p := range tx.positions {
		m.messages[p].committed = true
	}
	for _, id := range tx.delayed {
		m.delayed[id].committed = true
	}
	for _, c := range tx.acks {
		m.acked(c)
	}
	maps.Copy(m.histories, tx.histories)
	if len(tx.positions)+len(tx.delayed)+len(tx.acks) > 0 {
		m.written()
	}
	m.note("commit %v %v", tx.positions, tx.delayed)
}

// endSettling ends the transactions that ack something.
func (m *model) endSettling() {
	for _, tx := range slices.Clone(m.open) {
		if len(tx.acks) > 0 {
			m.endTx(tx, m.r.IntN(2) == 0)
		}
	}
}

func (m *model) transaction() pgx.Tx {
	tx, err := m.e.Begin(m.e.ctx) // a connection of the pool's: making one costs more than a step
	m.must(err)
	m.begun = append(m.begun, tx)
	return tx
}

// moveDue moves delayed messages into the log and learns their positions.
func (m *model) moveDue(most int) {
	_, err := m.e.Exec(m.e.ctx, "select millrace_engine.move_due($1)", most)
	m.must(err)
	m.learn()
}

// learn finds the messages that were moved into the log.
func (m *model) learn() {
	if len(m.delayed) == 0 {
		return
	}
	ids := slices.Collect(maps.Keys(m.delayed))
	for priority := range m.lanes {
		rows, err := m.e.Query(m.e.ctx, fmt.Sprintf(`select "position", (payload ->> 'id')::int from millrace.%q where "position" > $1
			and (payload ->> 'id')::int = any ($2) order by "position"`, m.lane(priority)), m.base[priority], ids)
		m.must(err)
		var position int64
		var id int
		_, err = pgx.ForEachRow(rows, []any{&position, &id}, func() error {
			d := m.delayed[id]
			if !d.committed || d.due > m.now || d.priority != priority {
				m.fail("message %d, due at %s, committed %t, of priority %d, is in the log of priority %d at %s", id, d.due, d.committed, d.priority, priority, m.now)
			}
			known := d.modelMessage
			m.append(at(priority, position), &known)
			delete(m.delayed, id)
			m.note("message %d is due and has position %d", id, at(priority, position))
			return nil
		})
		m.must(err)
	}
}

// lane is the name of the table of a priority.
func (m *model) lane(priority int) string {
	if priority == 0 {
		return m.spec.Stream
	}
	return fmt.Sprintf("%s.p%d", m.spec.Stream, priority)
}

// everyLane asks for a number of each lane.
func (m *model) everyLane(column string) []int64 {
	rows, err := m.e.Query(m.e.ctx, "select "+column+` from millrace_engine.stream s
		where s.name = $1 or s.parent_id = (select p.id from millrace_engine.stream p where p.name = $1) order by s.priority`, m.spec.Stream)
	m.must(err)
	all, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	m.must(err)
	return all
}

// buried notes which messages the engine has given up on.
func (m *model) buried() []int64 {
	rows, err := m.e.Query(m.e.ctx, `select s.priority * $1::bigint + d."position" from millrace_engine.dead_letter d
		join millrace_engine.consumer_group g on g.id = d.group_id join millrace_engine.stream s on s.id = g.stream_id
		where g.name = $2 order by s.priority desc, d."position"`, int64(lane), modelGroup)
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
			m.finished(p, "dead")
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
	if m.lapsed {
		if !errors.Is(err, pgstream.ErrLapsed) {
			m.fail("receive in a group that has lapsed: %v, %v", positions(claim), err)
		}
		return nil
	}
	if err != nil {
		m.fail("receive: %v", err)
	}
	return m.received(i, claim)
}

// checkWaiting checks that no message that nobody has had yet waits in a lane from a priority on. Who has it to get does not matter in a Shared
// group only.
func (m *model) checkWaiting(from int) {
	if m.spec.Mode != pgstream.ModeShared || m.spec.Paused || m.queues() {
		return
	}
	for p := range m.messages {
		if of(p) >= from && m.waits(p) {
			m.fail("position %d waits, and was not delivered", p)
		}
	}
}

// waits says that a message is below the horizon and was never handed out.
func (m *model) waits(p int64) bool {
	msg := m.messages[p]
	return msg.committed && msg.wanted && !msg.trimmed && !m.seen[p] && m.settled[p] == "" && m.covered(p) && m.readable(p)
}

// readable says that no open transaction has published before.
func (m *model) readable(p int64) bool {
	return !slices.ContainsFunc(m.open, func(tx *modelTx) bool {
		return slices.ContainsFunc(tx.positions, func(q int64) bool { return of(q) == of(p) && q < p })
	})
}

func keyOf(msg pgstream.Message) string {
	if msg.Key == nil {
		return ""
	}
	return *msg.Key
}

// received checks a claim against the model and adds it. nil: nothing was received.
func (m *model) received(member int, claim *pgstream.Claim) *modelClaim {
	var due []int64
	if m.queues() {
		due = m.due(m.most[member])
	}
	if claim == nil {
		m.note("member %d receives nothing", member)
		if len(due) > 0 {
			m.fail("nothing was delivered, and %v are queued", due)
		}
		m.checkWaiting(0)
		return nil
	}
	m.note("member %d receives %v as %s", member, positions(claim), claim.Token)
	m.worked = m.now
	fresh := &modelClaim{member: member, token: claim.Token, attempts: map[int64]int{}, expires: m.now + modelAckWait}
	var payload struct{ ID int }
	m.must(json.Unmarshal(claim.Messages[0].Payload, &payload))
	priority := of(m.places[payload.ID])
	for _, p := range positions(claim) {
		fresh.left = append(fresh.left, at(priority, p))
	}
	m.checkWaiting(priority + 1)
	if got := sorted(slices.Clone(fresh.left)); m.queues() && !slices.Equal(got, sorted(due)) {
		m.fail("%v were delivered of a queued group, and not %v", got, due)
	}
	inClaim := map[string]int64{}
	for _, msg := range claim.Messages {
		p := at(priority, msg.Position)
		known := m.messages[p]
		m.must(json.Unmarshal(msg.Payload, &payload))
		m.seen[p] = true
		switch {
		case m.spec.Paused:
			m.fail("position %d was delivered while the group is paused", p)
		case known == nil || !known.committed:
			m.fail("position %d was delivered and is not committed", p)
		case m.settled[p] != "":
			m.fail("position %d was delivered after it was %s", p, m.settled[p])
		case keyOf(msg) != known.key || payload.ID != known.id:
			m.fail("position %d is message %d with key %s, published was %d with %s", p, payload.ID, keyOf(msg), known.id, known.key)
		case !known.wanted:
			m.fail("position %d was delivered and does not pass the filter", p)
		case known.notBefore > m.now:
			m.fail("position %d was delivered at %s, before %s", p, m.now, known.notBefore)
		case msg.Attempt > m.spec.MaxAttempts && m.spec.MaxAttempts > 0 && (m.spec.Mode == pgstream.ModeShared || m.spec.FailurePolicy != pgstream.FailureBlock):
			m.fail("position %d was delivered for the %dth time", p, msg.Attempt)
		}
		fresh.attempts[p] = msg.Attempt
		if holder := m.live(p); holder != nil {
			if holder.settling != nil {
				m.fail("position %d was delivered while a transaction settles %s", p, holder.token)
			}
			if holder.expires > m.now && !holder.unsure {
				m.fail("position %d was delivered while %s holds it", p, holder.token)
			}
			holder.dead, holder.by = true, fresh // its messages are somebody else's from here
			m.note("%s is taken over", holder.token)
		}
		if m.spec.Mode == pgstream.ModeOrdered && known.key != "" {
			m.checkOrder(p, inClaim, fresh)
		}
		if m.queues() {
			m.queue[p].attempts++
			if m.queue[p].attempts != msg.Attempt {
				m.fail("position %d was delivered for the %dth time, and says %d", p, m.queue[p].attempts, msg.Attempt)
			}
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
		if q >= p || of(q) != of(p) || other.key != key || !other.committed || !other.wanted || other.trimmed || other.redriven || !m.covered(q) ||
			m.settled[q] != "" || slices.Contains(fresh.left, q) {
			continue
		}
		m.buried()
		if m.settled[q] == "" {
			m.fail("position %d of key %s was delivered before %d", p, key, q)
		}
	}
}

// finished notes that a message never comes again.
func (m *model) finished(p int64, how string) {
	m.settled[p] = how
	delete(m.queue, p)
}

// acked notes that a claim was settled.
func (m *model) acked(c *modelClaim) {
	for _, p := range c.left {
		if m.settled[p] != "" {
			m.fail("position %d was acked and is %s", p, m.settled[p])
		}
		m.finished(p, "acked")
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
	ackAndWait     = "ack in an open transaction"
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
	if verb != ackAndReceive && verb != ackAndRollback && verb != ackAndWait {
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
	if c.settling != nil {
		return
	}
	if m.oneQueued() && !c.dead && m.r.IntN(3) == 0 { // what a policy does begins with a failure
		m.nack(c)
		return
	}
	ctx, member := m.e.ctx, m.members[c.member]
	if len(c.left) == 0 {
		m.use(c, "ack", func() error { return member.Ack(ctx, c.token) })
		return
	}
	switch m.r.IntN(17) {
	default:
		if m.use(c, "ack", func() error { return member.Ack(ctx, c.token) }) {
			m.acked(c)
		}
	case 0: // in a transaction that is rolled back
		m.use(c, ackAndRollback, func() error {
			tx := m.transaction()
			err := member.AckTx(ctx, tx, c.token)
			rollback(m.e, tx)
			return err
		})
	case 1, 2:
		some := m.some(c.left)
		if m.spec.Mode == pgstream.ModeOrdered && !c.single() { // a handler of an Ordered group goes forward
			some = slices.Clone(c.left[:len(some)])
		}
		if m.use(c, fmt.Sprintf("ack %v of", some), func() error { return member.AckMessages(ctx, c.token, locals(some)) }) {
			for _, p := range some {
				m.finished(p, "acked")
			}
			m.without(c, some)
		}
	case 3, 4, 14:
		m.nack(c)
	case 5:
		some := m.some(c.left)
		if m.use(c, fmt.Sprintf("dead letter %v of", some), func() error { return member.DeadLetter(ctx, c.token, locals(some), "bad") }) {
			for _, p := range some {
				m.finished(p, "dead")
			}
			m.without(c, some)
		}
	case 6:
		if m.use(c, "release", func() error { return member.Release(ctx, c.token) }) {
			m.released(c)
			m.kill(c)
		}
	case 7:
		if m.use(c, "extend", func() error { _, err := member.Extend(ctx, c.token, 2*modelAckWait); return err }) {
			c.expires = m.now + 2*modelAckWait
		}
	case 8, 9, 10:
		if !m.lapsed { // it would be refused as a whole
			m.ackAndReceive(c)
		}
	case 11, 12:
		if !c.single() || m.spec.Mode == pgstream.ModeShared { // what is unparked would be waited for
			m.ackLater(c)
		}
	case 13:
		if m.lanes > 1 { // a stream without versions
			m.deleteSome(c)
		}
	}
}

// deleteSome settles messages and removes them from the log.
func (m *model) deleteSome(c *modelClaim) {
	some := m.some(c.left)
	if m.spec.Mode == pgstream.ModeOrdered && !c.single() {
		some = slices.Clone(c.left[:len(some)])
	}
	if m.use(c, fmt.Sprintf("delete %v of", some), func() error {
		_, err := m.e.Exec(m.e.ctx, "select millrace.delete_messages($1, $2)", c.token, locals(some))
		if sqlState(err) == "MR001" {
			return pgstream.ErrFenced
		}
		return err
	}) {
		for _, p := range some {
			m.finished(p, "deleted")
			m.messages[p].deleted = true
		}
		m.without(c, some)
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
	m.received(c.member, next)
}

func (m *model) nack(c *modelClaim) {
	some := m.some(c.left)
	delay := time.Duration(m.r.IntN(3)) * time.Second
	if !m.use(c, fmt.Sprintf("nack for %s %v of", delay, some), func() error {
		return m.members[c.member].Nack(m.e.ctx, c.token, locals(some), delay, "no")
	}) {
		return
	}
	ordered := m.spec.Mode == pgstream.ModeOrdered && !c.single()
	last := func(p int64) bool {
		return m.spec.MaxAttempts > 0 && c.attempts[p] >= m.spec.MaxAttempts || m.retryIsTaken(p)
	}
	again := func(ps []int64) {
		for _, p := range ps {
			m.messages[p].notBefore = m.now + delay
			if q := m.queue[p]; q != nil {
				q.due = m.now + delay
			}
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
			m.finished(p, "dead")
		}
		m.kill(c)
	case ordered && !last(some[0]): // parked, with all that comes after them
		again(some)
		parked := slices.DeleteFunc(slices.Clone(c.left), func(q int64) bool {
			return !slices.ContainsFunc(some, func(p int64) bool {
				return p == q || p < q && m.messages[p].key == m.messages[q].key && m.messages[p].key != ""
			})
		})
		m.without(c, parked)
	default:
		m.without(c, some)
		for _, p := range some {
			if last(p) {
				m.finished(p, "dead")
			} else {
				again([]int64{p})
			}
		}
	}
}

func (m *model) leave() {
	i := m.r.IntN(len(m.members))
	m.must(m.members[i].Leave(m.e.ctx))
	m.note("member %d leaves", i)
	for _, c := range m.claims {
		if c.member == i && c.settling == nil {
			if !c.dead {
				m.released(c)
			}
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
	waiting := 0
	for p := range m.messages {
		if m.waits(p) && (!m.queues() || p > m.read[of(p)]) {
			waiting++
		}
	}
	did, err := pgstream.MaintainWithRing(m.e.ctx, m.e.Pool, []int64{1, pgstream.LedgerRingBytes}[min(m.r.IntN(3), 1)])
	if err != nil {
		m.fail("maintain: %v", err)
	}
	m.note("maintain: %v", did)
	m.learn()
	m.checkLapse(did, waiting)
	if m.retention == pgstream.RetentionLimits || m.lapsed {
		m.lose(m.everyLane("first_position"))
	}
	if m.queues() && !m.lapsed {
		m.judgeAll()
	}
}

// checkLapse checks that a group lapses when it has to, and only then. What waits for it is a part of its lag, and all that was published is more. The
// lag of an Ordered group is estimated for each lane by its share of the keys, and rounded up.
func (m *model) checkLapse(did []string, waiting int) {
	byLag, byTime := false, false
	for _, d := range did {
		byLag = byLag || strings.Contains(d, "has lapsed: lag")
		byTime = byTime || strings.Contains(d, "has lapsed: messages have waited")
	}
	all := int64(0)
	for priority, last := range m.everyLane(lastPosition) {
		all += last - m.start[priority] + 1
	}
	limit := m.spec.LapseLag
	if m.spec.Mode == pgstream.ModeOrdered {
		all += int64(m.lanes * len(m.members))
		waiting = 0
	}
	switch {
	case m.lapsed && (byLag || byTime):
		m.fail("the group has lapsed twice")
	case byLag && (limit == 0 || all <= limit):
		m.fail("the group has lapsed by its lag, with %d positions since it began and a limit of %d", all, limit)
	case byTime && (m.spec.LapseAfter == 0 || m.spec.Paused || m.now-m.worked <= m.spec.LapseAfter):
		m.fail("the group has lapsed at %s, and worked at %s", m.now, m.worked)
	case !m.lapsed && !byLag && !byTime && limit > 0 && int64(waiting) > limit:
		m.fail("the group has not lapsed, and %d messages wait", waiting)
	}
	m.lapsed = m.lapsed || byLag || byTime
}

// lose notes that the log has no message below the marks any more. What was handed out or set aside may still come.
func (m *model) lose(marks []int64) {
	for p, msg := range m.messages {
		if local(p) >= marks[of(p)] {
			continue
		}
		msg.gone = true
		if (m.settled[p] == "" || m.settled[p] == "routed") && m.queue[p] == nil {
			msg.trimmed = true
		}
	}
}

// redrive moves dead letters back to the group, of all keys or of some.
func (m *model) redrive() {
	before := m.buried()
	most := 1 + m.r.IntN(3)
	o := pgstream.RedriveOptions{Max: int64(most), Rate: float64([]int{0, 0, 1}[m.r.IntN(3)])}
	if m.r.IntN(2) == 0 {
		o.Filter.Keys = []string{"k0", "k1"}
	}
	n, err := pgstream.Redrive(m.e.ctx, m.e, m.spec.Stream, modelGroup, o)
	m.must(err)
	var want, stay []int64
	for _, p := range before {
		if len(want) < most && (o.Filter.Keys == nil || slices.Contains(o.Filter.Keys, m.messages[p].key)) && m.mayQueue(p, before) {
			want = append(want, p)
		} else {
			stay = append(stay, p)
		}
	}
	m.note("redrive %v", want)
	left := m.buried()
	if int(n) != len(want) || !slices.Equal(left, stay) {
		m.fail("redrive moved %d; %v were dead, and are %v", n, before, left)
	}
	for i, p := range want {
		delete(m.settled, p)
		m.messages[p].redriven, m.messages[p].notBefore = true, m.now+time.Duration(float64(i)*o.Rate)*time.Second // a second between two, or none
		if m.queues() {
			m.queue[p] = &queued{due: m.messages[p].notBefore}
		}
	}
	if n > 0 {
		m.written()
	}
}

// purge removes dead letters for good.
func (m *model) purge() {
	dead := m.buried()
	n, err := pgstream.PurgeDeadLetters(m.e.ctx, m.e, m.spec.Stream, modelGroup, pgstream.DeadLetterFilter{})
	m.must(err)
	if int(n) != len(dead) {
		m.fail("%d dead letters were purged of %v", n, dead)
	}
	for _, p := range dead {
		m.finished(p, "purged")
	}
	m.note("purge %v", dead)
	if len(dead) > 0 { // a transaction that has written nothing waits for no disk
		m.written()
	}
}

// reset moves the group, and ends everything that it holds.
func (m *model) reset() {
	first := m.everyLane("first_position")
	to := pgstream.Place{From: pgstream.StartEarliest}
	m.start = first
	if m.r.IntN(2) == 0 {
		to = pgstream.Place{From: pgstream.StartPosition, Position: max(first[0], m.somewhere())}
		m.start[0] = to.Position
	}
	m.resetTo(to)
}

func (m *model) resetTo(to pgstream.Place) {
	m.endSettling() // which it would wait for
	_, err := pgstream.PurgeDeadLetters(m.e.ctx, m.e, m.spec.Stream, modelGroup, pgstream.DeadLetterFilter{})
	m.must(err)
	_, err = pgstream.ResetGroup(m.e.ctx, m.e, m.spec.Stream, modelGroup, to)
	m.must(err)
	m.note("reset to %d", m.start)
	m.lapsed, m.worked = false, m.now
	clear(m.seen)
	clear(m.queue)
	for priority, first := range m.start {
		m.read[priority] = at(priority, first-1)
	}
	for _, c := range m.claims {
		c.dead, c.by = true, nil
	}
	for p, msg := range m.messages {
		msg.redriven, msg.notBefore = false, 0
		switch {
		case msg.deleted:
		case m.covered(p):
			delete(m.settled, p)
			msg.trimmed = false
		default:
			m.settled[p] = "passed over"
		}
	}
	m.written()
}

// somewhere is a position of priority 0 among those of the schedule, or the one after them.
func (m *model) somewhere() int64 {
	top := m.base[0]
	for p := range m.messages {
		if of(p) == 0 {
			top = max(top, p)
		}
	}
	return m.base[0] + 1 + m.r.Int64N(top-m.base[0]+1)
}

func (m *model) trim() {
	var mark int64
	if m.r.IntN(2) == 0 {
		mark = one[int64](m.e, "select millrace.trim($1, $2)", m.spec.Stream, m.somewhere())
	} else {
		mark = one[int64](m.e, "select millrace.trim($1, p_max_messages => $2, p_exact => $3)", m.spec.Stream, 1+m.r.IntN(20), m.r.IntN(2) == 0)
	}
	m.note("trim up to %d", mark)
	m.lose(m.everyLane("first_position"))
}

// pause stops deliveries, or lets them go on.
func (m *model) pause() {
	m.spec.Paused = !m.spec.Paused
	m.must(pgstream.ApplyGroup(m.e.ctx, m.e, m.spec))
	m.written()
	m.note("paused: %t", m.spec.Paused)
}

// crash kills the server. What was committed asynchronously a moment ago may be undone: claims, and the end of claims that they took over.
func (m *model) crash(s *postgres.Server) {
	m.must(s.Kill())
	m.must(s.Restart(m.e.ctx))
	m.e.Reset()
	m.note("the server was killed")
	var prepared []*modelTx
	kept := map[int64]bool{}
	for _, tx := range m.open {
		if tx.prepared != "" {
			prepared = append(prepared, tx)
			for _, p := range tx.positions {
				kept[p] = true
			}
			continue
		}
		for _, id := range tx.delayed {
			delete(m.delayed, id)
		}
		for _, c := range tx.acks {
			c.settling = nil
		}
		_ = tx.tx.Rollback(m.e.ctx)
	}
	m.open = prepared
	for p, msg := range m.messages {
		if !msg.committed && !kept[p] {
			delete(m.messages, p) // the position may be given away again
			delete(m.places, msg.id)
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
	if m.queues() {
		m.learnQueue()
	}
}

// finish ends everything and checks that nothing was lost.
func (m *model) finish() {
	for len(m.open) > 0 {
		m.end()
	}
	m.note("everything is committed and handled")
	m.r = rand.New(rand.NewPCG(m.seed, 0))
	if m.spec.Paused {
		m.pause()
	}
	if m.route != nil {
		m.dropRoute()
	}
	if m.lapsed {
		m.start = m.everyLane("first_position")
		m.resetTo(pgstream.Place{From: pgstream.StartEarliest})
	}
	last := 0 // who takes everything: the others' memberships and claims have expired
	for i, most := range m.most {
		if most > m.most[last] {
			last = i
		}
	}
	for more := true; more; {
		m.jump(time.Hour)
		m.moveDue(1000)
		more = false
		// A receive that takes over a claim of which the log has lost everything may find nothing. The next one goes on.
		for nothing := 0; nothing <= m.held(); nothing++ {
			c := m.receive(last)
			if c == nil {
				continue
			}
			more, nothing = true, -1
			if last != m.auto && m.use(c, "ack", func() error { return m.members[last].Ack(m.e.ctx, c.token) }) {
				m.acked(c)
			}
		}
	}
	if m.lanes == 1 {
		m.checkHistories()
	}
	if len(m.delayed) > 0 {
		m.fail("%d delayed messages never came into the log", len(m.delayed))
	}
	dead := m.buried()
	for p, msg := range m.messages {
		if msg.committed && msg.wanted && !msg.trimmed && m.covered(p) && m.settled[p] == "" {
			m.fail("position %d was committed and never delivered to its end", p)
		}
	}
	for p, how := range m.settled {
		if how == "dead" && !m.messages[p].trimmed && !slices.Contains(dead, p) {
			m.fail("position %d should be a dead letter", p)
		}
	}
	if s := m.e.stats(m.spec.Stream, modelGroup); s.InFlight != 0 || s.Retrying != 0 {
		m.fail("at the end: %+v", s)
	}
}

// op is one kind of step.
type op struct {
	weight int
	do     func(m *model)
}

// ops are all kinds of steps. Each schedule has weights of its own, so that some have many resets and others none.
var ops = []op{
	{200, (*model).publish},
	{100, (*model).end},
	{300, func(m *model) { m.receive(m.r.IntN(len(m.members))) }},
	{260, (*model).settle},
	{20, (*model).leave},
	{50, func(m *model) {
		m.jump([]time.Duration{time.Duration(1+m.r.IntN(8)) * time.Second, 3 * modelAckWait, 3 * time.Minute}[max(0, m.r.IntN(6)-3)])
	}},
	{30, (*model).maintain},
	{15, func(m *model) { m.moveDue(1 + m.r.IntN(5)) }},
	{25, (*model).redrive},
	{6, (*model).trim},
	{6, (*model).reset},
	{6, (*model).pause},
	{3, (*model).purge},
	{60, (*model).appendTo},
	{5, (*model).purgeDeliveries},
	{20, (*model).rotate},
	{4, (*model).repartition},
	{40, (*model).reroute},
	{6, (*model).wait},
}

// prioritiesOf is how many priorities a schedule's stream has.
func prioritiesOf(seed uint64) int {
	if seed%4 == 0 {
		return 3
	}
	return 1
}

// choose decides by the seed what kind of group and stream the schedule is about.
func (m *model) choose(mode pgstream.Mode) {
	m.r = rand.New(rand.NewPCG(m.seed, 0))
	m.retention = []pgstream.RetentionPolicy{pgstream.RetentionLimits, pgstream.RetentionLimits, pgstream.RetentionInterest, pgstream.RetentionWorkQueue}[m.r.IntN(4)]
	if m.retention == pgstream.RetentionLimits && m.r.IntN(3) == 0 {
		m.limit = 20
	}
	m.lanes, m.window = prioritiesOf(m.seed), []time.Duration{20 * time.Second, 2 * time.Minute}[m.r.IntN(2)]
	m.spec = pgstream.GroupSpec{Stream: fmt.Sprintf("lanes%d", m.lanes), Name: modelGroup, Mode: mode, AckWait: modelAckWait,
		MaxAttempts: []int{0, 0, 3}[m.r.IntN(3)], LapseLag: []int64{0, 0, 10}[m.r.IntN(3)],
		LapseAfter: []time.Duration{0, 0, 0, time.Minute}[m.r.IntN(4)]}
	if mode == pgstream.ModeOrdered {
		m.spec.FailurePolicy = []pgstream.FailurePolicy{pgstream.FailureBlock, pgstream.FailureSkip, pgstream.FailurePark}[m.r.IntN(3)]
	}
	if m.r.IntN(4) == 0 {
		m.spec.Filter = filters[m.r.IntN(len(filters))]
	}
	m.keys = 5
	if mode == pgstream.ModeShared {
		m.chooseQueued()
	}
}

// begin makes a group of that kind, at the end of a stream that it brings to settings of its own.
func (m *model) begin(mode pgstream.Mode) {
	m.choose(mode)
	m.messages, m.settled, m.delayed = map[int64]*modelMessage{}, map[int64]string{}, map[int]*delayedMessage{}
	m.places, m.seen, m.auto = map[int]int64{}, map[int64]bool{}, -1
	m.histories, m.queue = map[string][]int{}, map[int64]*queued{}
	m.remembered = map[string]struct {
		position int64
		until    time.Duration
	}{}
	m.e.stopClock()
	m.epoch = time.Duration(one[int64](m.e, "select (extract(epoch from millrace_engine.clock()) * 1000000)::bigint")) * time.Microsecond
	if m.base = m.everyLane(lastPosition); len(m.base) == 0 {
		m.e.run("select millrace_engine.apply_stream($1)", fmt.Sprintf(`{"name": %q, "priorities": %d, "versions": %t}`, m.spec.Stream, m.lanes, m.lanes == 1))
		if m.lanes == 1 {
			m.e.run(`create or replace function public.model_fold(document jsonb, payload jsonb, headers jsonb) returns jsonb language sql
				as $$ select coalesce(document, '[]') || (payload -> 'id') $$`)
			m.e.run("select millrace.create_projection($1, 'fold', 'public.model_fold', 'public.model_documents')", m.spec.Stream)
		}
		m.base = make([]int64, m.lanes)
	}
	for priority, last := range m.base {
		m.start = append(m.start, last+1)
		m.read = append(m.read, at(priority, last))
	}
	// What apply_stream and trim would do to a stream that is as it should be, in less time.
	m.e.run(`update millrace_engine.stream s set retention_policy = $2, max_messages = $3, dedupe_window_seconds = $4, partitions = 8, first_position = ($5::bigint[])[s.priority + 1]
		where s.name = $1 or s.parent_id = (select p.id from millrace_engine.stream p where p.name = $1)`,
		m.spec.Stream, m.retention, m.limit, int(m.window.Seconds()), m.start)
	m.e.group(m.spec)
	if m.r.IntN(4) == 0 {
		m.auto = 3
	}
	for i := range 4 {
		m.most = append(m.most, 1+m.r.IntN(12))
		m.members = append(m.members, m.e.consumer(pgstream.ConsumerConfig{Stream: m.spec.Stream, Group: modelGroup, Member: fmt.Sprintf("m%d", i),
			MaxMessages: m.most[i], AutoAck: i == m.auto}))
	}
	for _, o := range ops {
		o.weight *= []int{0, 1, 1, 1, 2, 6}[m.r.IntN(6)]
		m.ops = append(m.ops, o)
	}
	for i := range 4 { // something happens in each schedule
		m.ops[i].weight = max(m.ops[i].weight, ops[i].weight)
	}
}

// step does one random thing.
func (m *model) step() {
	n := m.steps
	m.steps++
	if slices.Contains(m.skip, n) {
		return
	}
	m.r = rand.New(rand.NewPCG(m.seed, uint64(n)+1))
	all := 0
	for _, o := range m.ops {
		all += o.weight
	}
	for chosen := m.r.IntN(all); ; {
		for _, o := range m.ops {
			if chosen < o.weight {
				o.do(m)
				return
			}
			chosen -= o.weight
		}
	}
}

// run is a schedule: 30 to 60 steps, sometimes more.
func (m *model) run() {
	steps := 30 + m.r.IntN(31)
	if m.r.IntN(20) == 0 {
		steps *= 3
	}
	for range steps {
		m.step()
	}
	m.finish()
}

// schedule is one that is asked for, or the next one.
type schedule struct {
	seed uint64
	skip []int // steps that are left out
}

func (s schedule) String() string {
	text := fmt.Sprintf("MILLRACE_SCHEDULE=%d", s.seed)
	for i, n := range s.skip {
		text += []string{"-", ","}[min(i, 1)] + strconv.Itoa(n)
	}
	return text
}

// askedSchedule is the schedule that MILLRACE_SCHEDULE asks for: a seed, and after a dash the steps that are left out.
func askedSchedule(t testing.TB) (s schedule, asked bool) {
	t.Helper()
	text := os.Getenv("MILLRACE_SCHEDULE")
	if text == "" {
		return s, false
	}
	seed, skip, _ := strings.Cut(text, "-")
	var err error
	if s.seed, err = strconv.ParseUint(seed, 10, 64); err != nil {
		t.Fatalf("MILLRACE_SCHEDULE=%q does not begin with a number", text)
	}
	for part := range strings.SplitSeq(skip, ",") {
		if n, err := strconv.Atoi(part); err == nil {
			s.skip = append(s.skip, n)
		}
	}
	return s, true
}

// try runs a schedule and returns what the model says is wrong; nothing when nothing is. play does its steps.
func try(e *engine, mode pgstream.Mode, s schedule, play func(*model)) (m *model, said string) {
	a := &alarm{TB: e.t}
	quiet := *e
	quiet.t = a
	m = &model{e: &quiet, seed: s.seed, skip: s.skip}
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.begin(mode)
		play(m)
		m.must(pgstream.DropGroup(e.ctx, e, m.spec.Stream, modelGroup, pgstream.Owner{}))
	}()
	<-done
	if a.said != "" {
		for _, tx := range m.begun { // or their connections never come back to the pool
			_ = tx.Rollback(e.ctx)
		}
		e.endTransactions()
		e.forgetStreams()
	}
	return m, a.said
}

// endTransactions rolls back whatever a schedule has left open.
func (e *engine) endTransactions() {
	e.t.Helper()
	e.run(`select pg_terminate_backend(a.pid, 10000) from pg_stat_activity a where a.datname = current_database() and a.pid <> pg_backend_pid() and a.state like 'idle in%'`)
	rows, err := e.Query(e.ctx, "select gid from pg_prepared_xacts where database = current_database()")
	must(e.t, err)
	prepared, err := pgx.CollectRows(rows, pgx.RowTo[string])
	must(e.t, err)
	for _, name := range prepared {
		e.run("rollback prepared '" + name + "'")
	}
	e.Reset() // of connections that were ended
}

// forgetStreams drops the streams of schedules, so that the next one begins with new ones.
func (e *engine) forgetStreams() {
	e.t.Helper()
	for _, name := range []string{"lanes1", "lanes3"} {
		e.run("select millrace_engine.drop_stream($1, false)", name)
	}
	e.run("drop table if exists public.model_documents") // a schedule that is played again has the same keys
}

// shrink leaves out the steps that a failure does not need, for as long as there is time, and returns the shorter schedule and what is said of it.
func shrink(e *engine, mode pgstream.Mode, s schedule, steps int, said string, play func(*model)) (schedule, string) {
	deadline := time.Now().Add(20 * time.Second)
	for size := steps / 2; size > 0; size /= 2 {
		for from := 0; from < steps && time.Now().Before(deadline); from += size {
			less := schedule{seed: s.seed, skip: slices.Clone(s.skip)}
			for n := from; n < min(from+size, steps); n++ {
				if !slices.Contains(less.skip, n) {
					less.skip = append(less.skip, n)
				}
			}
			if len(less.skip) == len(s.skip) {
				continue
			}
			if _, now := try(e, mode, less, play); now != "" {
				s, said = less, now
			} else {
				e.forgetStreams()
			}
		}
	}
	slices.Sort(s.skip)
	return s, said
}

// failed reports a schedule that has gone wrong, as short as it can be made.
func failed(t *testing.T, e *engine, mode pgstream.Mode, s schedule, m *model, said string, play func(*model)) {
	t.Helper()
	short, now := shrink(e, mode, s, m.steps, said, play)
	test, _, _ := strings.Cut(t.Name(), "/")
	t.Fatalf("%s\nas short as it could be made: %s\nrepeat with: %s go test ./internal/pgstream -run '^%s$/%s' (the whole schedule: MILLRACE_SCHEDULE=%d)", said, now, short, test, mode, s.seed)
}

// The short form of the model ends after modelTime, or when each mode has run manySchedules.
const (
	modelTime     = 2 * time.Minute
	manySchedules = 1500
)

func TestTheEngineDoesWhatItsModelDoes(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		r := random(t)
		length := soak(t, modelTime)
		e := newEngine(t)
		e.extendDeadline(length)
		// No crash here, so nothing needs to be on disk.
		e.run("do $$ begin execute format('alter database %I set synchronous_commit = off', current_database()); end $$")
		e.Reset()
		schedules, steps, settled := 0, 0, 0
		for start, told := time.Now(), time.Now(); ; {
			s, asked := askedSchedule(t)
			if !asked {
				s.seed = r.Uint64() &^ 3
				if schedules/25%4 != 3 { // most have one priority; streams are used again
					s.seed++
				}
			}
			m, said := try(e, mode, s, (*model).run)
			if said != "" {
				failed(t, e, mode, s, m, said, (*model).run)
			}
			schedules++
			if schedules%25 == 0 {
				e.forgetStreams()
			}
			settled += len(m.settled)
			steps += m.steps
			if asked || time.Since(start) > length || length == modelTime && schedules >= manySchedules {
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
		t.Logf("%d schedules, %d steps, %d messages settled", schedules, steps, settled)
	})
}

func TestTheEngineDoesWhatItsModelDoesOverCrashes(t *testing.T) {
	t.Parallel()
	r := random(t)
	length := soak(t, 5*time.Second)
	e, server := ownServer(t)
	e.extendDeadline(length)
	crashes := 0
	play := func(m *model) {
		for range 2 {
			for range 20 + m.r.IntN(60) {
				m.step()
			}
			m.crash(server)
			crashes++
		}
		m.run()
	}
	for start := time.Now(); ; {
		s, asked := askedSchedule(t)
		if !asked {
			s.seed = r.Uint64()
		}
		mode := []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered}[s.seed/4%2]
		if m, said := try(e, mode, s, play); said != "" {
			failed(t, e, mode, s, m, said, play)
		}
		e.forgetStreams()
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
	withPriorities := func(m *model) bool { return m.lanes > 1 }
	withVersions := func(m *model) bool { return m.lanes == 1 }
	withRoutes := func(m *model) bool { return m.spec.Filter.Unrouted }
	for _, c := range []struct {
		name   string
		mode   pgstream.Mode
		suits  func(m *model) bool // whether a schedule can show it; nil: any
		damage func(e *engine)
	}{
		{"filters", pgstream.ModeShared, nil, func(e *engine) {
			e.run(`create or replace function millrace_engine.matches(p_filter jsonb, p_key text, p_headers jsonb) returns boolean
				language sql immutable parallel safe return true`)
		}},
		{"delays of nacks", pgstream.ModeShared, nil, func(e *engine) {
			e.run(`create or replace function millrace_engine.delay(p_group millrace_engine.consumer_group, p_attempt integer, p_seconds double precision)
				returns interval language sql volatile return interval '0'`)
		}},
		{"dedupe keys", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.remember", "millrace_engine.clock() + make_interval", "millrace_engine.clock() - make_interval")
		}},
		{"takeovers of what has expired only", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.take_over", "o.expires_at > p_now", "false")
			e.mutate("millrace_engine.take_over", "again.expires_at > p_now", "false")
			e.mutate("millrace_engine.receive_template", "now_ >= last.next_check", "true")
		}},
		{"the order of a key", pgstream.ModeOrdered, nil, func(e *engine) {
			e.mutate("millrace_engine.receive_template", "continue when g.mode = 'Ordered' and t.blocked and taken.claim is null", "continue when false")
		}},
		{"acks inside a claim", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.open_claims", " + coalesce(progress.settled, '{}'::int8multirange)", "")
		}},
		{"delayed messages", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.move_due", "millrace_engine.clock()", "(millrace_engine.clock() + interval '5 seconds')")
		}},
		{"resets", pgstream.ModeOrdered, nil, func(e *engine) {
			e.run(`create or replace function millrace_engine.move_group(p_group integer, p_stream millrace_engine.stream, p_place jsonb) returns bigint
				language sql as 'select 0::bigint'`)
		}},
		{"the order of priorities", pgstream.ModeShared, withPriorities, func(e *engine) {
			e.mutate("millrace_engine.receive_priorities", "order by x.priority desc", "order by x.priority")
		}},
		{"the slowest group in retention", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.maintain_stream", "min(t.ack_floor) into keep_from", "max(t.ack_floor) + 1000000 into keep_from")
		}},
		{"limits of the lag", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.lapse_groups", "p.lag > g.lapse_lag", "false")
		}},
		{"the time that a group may rest", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.idle_for", "if not active then", "if true then")
			e.mutate("millrace_engine.idle_for", "p_now - seen.seen_at", "interval '1 day'")
		}},
		{"pauses", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.receive_template", "if g.paused then", "if false then")
		}},
		{"filters of redrives", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.is_chosen", "p_filter IS NULL", "true")
		}},
		{"parked keys", pgstream.ModeOrdered, nil, func(e *engine) {
			e.run(`drop trigger unpark on millrace_engine.delivery`)
		}},
		{"the version that an append expects", pgstream.ModeShared, withVersions, func(e *engine) {
			e.mutate("millrace.append", "or e.version = p_expected_version", "or true")
		}},
		{"projections", pgstream.ModeShared, withVersions, func(e *engine) {
			e.mutate("millrace_engine.project_documents", "update %s set document = $2", "update %s set document = coalesce(document, $2)")
		}},
		{"one message of a key that is queued", pgstream.ModeShared, (*model).oneQueued, func(e *engine) {
			e.mutate("millrace_engine.enqueue", "d.nonce is null and d.attempt = 0", "false")
		}},
		{"one message of a key that is active", pgstream.ModeShared, (*model).oneActive, func(e *engine) {
			e.mutate("millrace_engine.is_active", "a.nonce is not null", "false")
		}},
		{"one message of a key that waits for another delivery", pgstream.ModeShared, func(m *model) bool { return m.oneQueued() && m.oneActive() }, func(e *engine) {
			e.mutate("millrace_engine.retry_is_taken", "r.attempt > 0", "false")
		}},
		{"what is given back to a queue of one", pgstream.ModeShared, (*model).oneQueued, func(e *engine) {
			e.mutate("millrace_engine.release_deliveries", "if one_queued then\n        delete", "if false then\n        delete")
		}},
		{"what a route leaves behind", pgstream.ModeShared, withRoutes, func(e *engine) {
			e.run(`create or replace function millrace_engine.hand_over(p_group integer, p_filter jsonb, p_dropped boolean) returns void language sql as ''`)
		}},
		{"judging before routes change", pgstream.ModeShared, withRoutes, func(e *engine) {
			e.run(`create or replace function millrace_engine.route_all(p_stream integer) returns void language sql as ''`)
		}},
		{"claims that are being settled", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.take_over", "not pg_try_advisory_xact_lock((1073741824 + p_lane)::integer, (o.claim & 2147483647)::integer)", "false")
		}},
		{"locks of prepared transactions", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.horizon", "and k.granted", "and k.granted and k.pid is not null")
		}},
		{"locks of transactions that have lost one, or have done something else before", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.publish_guard_template", "_value('millrace_engine.state_template');", `_value('millrace_engine.state_template');
				if pg_current_xact_id_if_assigned() is not null then
					guard := set_config('millrace.guard_template', chr(97 + (state & 15)::integer) || pg_current_xact_id()::text, true);
					return null;
				end if;`)
		}},
		{"locks that are tried", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.horizon_from", "return greatest(p_known, p_known + i)", "return h")
		}},
		{"dedupe keys of a batch", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.append_chosen", "x.nth = 1 and", "")
		}},
		{"slots of throttled messages", pgstream.ModeShared, nil, func(e *engine) {
			e.run("create or replace function millrace_engine.slot_start(p_seconds integer) returns timestamptz language sql volatile return millrace_engine.clock()")
		}},
		{"one message for the next slot", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.append", "if found then\n            return result", "if found and not p_next_slot then\n            return result")
		}},
		{"lists in filters", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace_engine.matches_lists", "part -> 1 @>", "part -> 1 -> 0 @>")
		}},
		{"purges of what somebody holds", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate("millrace.purge_deliveries", "x.nonce is null", "true")
		}},
		{"messages that are deleted", pgstream.ModeShared, withPriorities, func(e *engine) {
			e.mutate("millrace.delete_messages", "any ($1)'", "any ($1) and false'")
		}},
		{"lanes that are split when they are idle", pgstream.ModeOrdered, nil, func(e *engine) {
			e.mutate("millrace_engine.assign", "if l.idle and (l.mine", "if (l.mine")
		}},
		{"trims", pgstream.ModeShared, nil, func(e *engine) {
			e.mutate(`millrace."trim"`, "mark := least(mark, top + 1)", "mark := mark + 3")
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			c.damage(e)
			said, schedules := "", 0
			for seed := uint64(1); schedules < 400 && said == ""; seed++ {
				kind := &model{seed: seed}
				if kind.choose(c.mode); c.suits == nil || c.suits(kind) {
					schedules++
					_, said = try(e, c.mode, schedule{seed: seed}, (*model).run)
				}
			}
			if said == "" {
				t.Error("the model saw nothing wrong")
			}
			t.Logf("after %d schedules it said: %.150s", schedules, said)
		})
	}
}
