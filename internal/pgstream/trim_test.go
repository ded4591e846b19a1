package pgstream_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func (e *engine) trim(args string) int64 {
	e.t.Helper()
	return one[int64](e, "select millrace.trim('orders', "+args+")")
}

// stored returns how many messages are on disk, above the mark or not.
func (e *engine) stored() int { return e.kept() }

// What is trimmed is gone for everybody at once: for consumers that begin, that read on, and that take over a claim which has expired.
func TestATrimIsHonouredAtOnce(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		for _, fresh := range []bool{true, false} {
			t.Run(map[bool]string{true: "by a new group", false: "by one that has begun"}[fresh], func(t *testing.T) {
				t.Parallel()
				e := newEngine(t)
				e.stopClock()
				e.stream("orders")
				e.publish("orders", 100)
				spec := pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Minute}
				c := func() *pgstream.Consumer {
					return e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m", MaxMessages: 30})
				}
				if !fresh {
					e.group(spec)
					mustReceive(e, c()) // 1 to 30; nobody settles them
				}
				if first := e.trim("21"); first != 21 {
					t.Errorf("the first position is %d, want 21", first)
				}
				if fresh {
					e.group(spec)
				}
				if n := e.stored(); n != 100 {
					t.Errorf("%d messages are stored; a part of a segment cannot be freed", n)
				}
				e.jump(2 * time.Minute) // a claim that was open has expired
				if s := e.stats("orders", "g"); s.AckFloor != 20 || s.Lag+s.InFlight < 70 || s.Lag+s.InFlight > 100 {
					t.Errorf("statistics: %+v", s)
				}
				got := drain(e, c())
				if len(got) != 80 || got[0] != 21 {
					t.Errorf("got %d messages from %v on; want 80 from 21 on", len(got), got[:min(len(got), 1)])
				}
				if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 || s.AckFloor != 100 {
					t.Errorf("statistics after the drain: %+v", s)
				}
			})
		}
	})
}

// A claim that expires for the second time is handed out message by message: those that were trimmed are not.
func TestATrimIsHonouredByWhatIsSetAside(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: time.Minute})
	e.publish("orders", 10)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m", MaxMessages: 10})
	for range 2 {
		mustReceive(e, c)
		e.jump(2 * time.Minute)
	}
	e.trim("8")
	got := drain(e, c)
	same(t, "what was left of the claim", sorted(got), []int64{8, 9, 10})
}

// Whoever has messages in hand finishes with them, and what failed is kept.
func TestATrimLeavesClaimsRetriesAndDeadLettersAlone(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: time.Minute})
	e.fillRing()
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 10})
	first, second := mustReceive(e, c), mustReceive(e, c)
	must(t, c.Nack(e.ctx, first.Token, []int64{1}, time.Second, "later"))
	must(t, c.DeadLetter(e.ctx, first.Token, []int64{2}, "never"))
	if p := e.trim("301"); p != 301 || e.stored() != 100 {
		t.Errorf("first position %d with %d messages stored; want 301 with 100", p, e.stored())
	}
	must(t, c.Ack(e.ctx, first.Token))
	must(t, c.Ack(e.ctx, second.Token))
	e.jump(2 * time.Second)
	retry := mustReceive(e, c)
	if p := positions(retry); len(p) != 1 || p[0] != 1 || string(retry.Messages[0].Payload) != `{"n": 0}` {
		t.Errorf("the retry is %v", p)
	}
	must(t, c.Ack(e.ctx, retry.Token))
	if s := e.stats("orders", "g"); s.DeadLetters != 1 || s.Retrying != 0 || s.Lag != 100 {
		t.Errorf("statistics: %+v", s)
	}
}

func TestATrimFreesWholeSegmentsAtOnce(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.fillRing()
	if p := e.trim("250"); p != 250 || e.stored() != 200 {
		t.Errorf("first position %d with %d messages stored; want 250 with the 200 of two segments", p, e.stored())
	}
	if p := e.trim("401"); p != 401 || e.stored() != 0 {
		t.Errorf("first position %d with %d messages stored; want 401 with none", p, e.stored())
	}
	if p := e.trim("5"); p != 401 {
		t.Errorf("the mark went back to %d", p)
	}
	e.publish("orders", 3)
	got, err := e.read(e, "401")
	must(t, err)
	same(t, "afterwards", got, []int64{401, 402, 403})
}

func TestAnApproximateTrimStopsAtASegment(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.fillRing()
	for before, want := range map[int]int64{100: 1, 101: 101} {
		e := newEngine(t)
		e.stream("orders")
		e.fillRing()
		if p := e.trim(fmt.Sprintf("%d, p_exact => false", before)); p != want {
			t.Errorf("before %d: first position %d, want %d", before, p, want)
		}
	}
	if p := e.trim("p_max_messages => 150, p_exact => false"); p != 201 || e.stored() != 200 {
		t.Errorf("first position %d with %d messages stored; want 201 with 200", p, e.stored())
	}
	if p := e.trim("p_max_messages => 0, p_exact => false"); p != 301 || e.stored() != 100 {
		t.Errorf("first position %d with %d messages stored; want 301 with 100: the current segment stays", p, e.stored())
	}
}

func TestATrimCountsMessagesAndTheirAge(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	for range 20 {
		e.publish("orders", 5)
		tx := e.begin()
		publishIn(e, tx, "orders")
		rollback(e, tx)
	}
	if p := e.trim("p_max_messages => 1000"); p != 1 {
		t.Errorf("with fewer messages than the limit the first position is %d", p)
	}
	e.trim("p_max_messages => 30")
	if n := one[int](e, "select count(*) from millrace.orders m, millrace_engine.stream s where m.position >= s.first_position"); n != 30 {
		t.Errorf("%d messages are left, want 30 whatever was rolled back between them", n)
	}
	e.run("update millrace.orders set created_at = created_at - interval '1 hour' where position <= 110")
	e.trim("p_max_age_seconds => 1800")
	if n := one[int](e, "select count(*) from millrace.orders m, millrace_engine.stream s where m.position >= s.first_position"); n != 8 {
		t.Errorf("%d messages are left, want the eight young ones", n)
	}
	two := int64(2)
	first, err := pgstream.Trim(e.ctx, e, "orders", pgstream.TrimLimits{MaxMessages: &two})
	must(t, err)
	same(t, "the last two", one[[]int64](e, "select array_agg(position order by position) from millrace.read('orders', $1)", first), []int64{118, 119})
	for _, args := range []string{"null", "0", "p_max_messages => -1", "p_max_age_seconds => 'NaN'", "p_max_age_seconds => -1"} {
		if _, err := e.Exec(e.ctx, "select millrace.trim('orders', "+args+")"); sqlState(err) != "MR004" {
			t.Errorf("trim(%s): %v; want MR004", args, err)
		}
	}
	if _, err := pgstream.Trim(e.ctx, e, "nothing", pgstream.TrimLimits{Before: &two}); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("a stream that does not exist: %v", err)
	}
	tx := e.beginAs(pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if _, err := tx.Exec(e.ctx, "select millrace.trim('orders', 2)"); sqlState(err) != "MR003" {
		t.Errorf("under repeatable read: %v; want MR003", err)
	}
}

// A message that is not committed yet is not old, whatever its position.
func TestATrimStaysBelowTheHorizon(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.publish("orders", 10)
	late := e.begin()
	p := publishIn(e, late, "orders")
	e.publish("orders", 10)
	for _, args := range []string{"1000", "p_max_messages => 0", "p_max_age_seconds => 0"} {
		if first := e.trim(args); first != p {
			t.Errorf("trim(%s): the first position is %d, want %d, which is open", args, first, p)
		}
	}
	commit(e, late)
	got := drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"}))
	if len(got) != 11 || got[0] != p {
		t.Errorf("got %v", got)
	}
}

func TestATrimIsSeenBrokenWithoutTheHorizon(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.mutate(`millrace."trim"`, "millrace_engine.horizon(stream)", "pg_sequence_last_value('millrace_engine.position_1')")
	late := e.begin()
	p := publishIn(e, late, "orders")
	e.publish("orders", 10)
	if first := e.trim("1000"); first <= p {
		t.Errorf("the first position is %d: the checker sees nothing wrong", first)
	}
}

// What a trim cannot free because somebody reads it, maintenance frees later, whatever the policy.
func TestMaintenanceFreesWhatIsBelowTheMark(t *testing.T) {
	t.Parallel()
	for _, policy := range []pgstream.RetentionPolicy{pgstream.RetentionLimits, pgstream.RetentionInterest, pgstream.RetentionWorkQueue} {
		t.Run(string(policy), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.retained(pgstream.Retention{Policy: policy})
			if policy != pgstream.RetentionWorkQueue {
				e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"}) // wants everything
			}
			e.fillRing()
			busy := e.begin()
			exec(e, busy, "select from millrace.orders limit 1")
			if p := e.trim("301"); p != 301 || e.stored() != 400 {
				t.Errorf("first position %d with %d messages stored; want 301 with 400", p, e.stored())
			}
			e.maintain(2)
			rollback(e, busy)
			e.maintain(1)
			if n := e.stored(); n != 100 {
				t.Errorf("%d messages are stored, want the 100 above the mark", n)
			}
		})
	}
}

// Whoever began to publish in a segment that is wholly below the mark, as far as the trim can see, commits while it waits for the segment.
func TestATrimLooksAgainWhenItHasTheSegment(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	late, p := e.publishLate()
	e.run("alter function millrace_engine.free_segments set lock_timeout = 0")
	conn := e.connect()
	done := e.blocked(conn.PgConn().PID(), func() error {
		_, err := pgstream.Trim(e.ctx, conn, "orders", pgstream.TrimLimits{Before: &p})
		return err
	})
	commit(e, late)
	must(t, <-done)
	got, err := e.read(e, fmt.Sprint(p))
	must(t, err)
	same(t, "left", got, []int64{p})
}

// Publishers go on in the next segment while a trim that frees the present one is not committed yet.
func TestPublishersDoNotWaitForATrim(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.publish("orders", 10)
	trim, publisher := e.begin(), e.begin()
	exec(e, trim, "select millrace.trim('orders', 11)")
	exec(e, publisher, "set local lock_timeout = '5s'")
	p := publishIn(e, publisher, "orders")
	commit(e, publisher)
	commit(e, trim)
	if n := e.stored(); n != 1 {
		t.Errorf("%d messages are stored, want the new one", n)
	}
	got, err := e.read(e, fmt.Sprint(p))
	must(t, err)
	same(t, "left", got, []int64{p})
}

// Each priority keeps as many as the limit says; a position is one of the stream itself.
func TestATrimCountsInEachPriority(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.prioritized(pgstream.ModeShared)
	for priority := range 3 {
		e.publishAt(priority, 1, 2, 3, 4)
	}
	marks := func(when string, want ...int64) {
		t.Helper()
		same(t, when, one[[]int64](e, "select array_agg(first_position order by priority) from millrace_engine.stream"), want)
	}
	e.trim("2")
	marks("by position", 2, 1, 1)
	e.trim("p_max_messages => 2")
	marks("by number", 3, 3, 3)
	e.trim("p_max_age_seconds => 0")
	marks("by age", 5, 5, 5)
}

// A trim counts in the priorities before it moves the mark of the stream, and takes the stream's row before theirs, as whoever resets a group does.
func TestATrimOfPrioritiesMeetsAReset(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.prioritized(pgstream.ModeShared)
	e.publishAt(2, 1, 2, 3)
	held, trimmer, operator := e.begin(), e.connect(), e.connect()
	exec(e, held, "select from millrace_engine.stream where name = 'orders.p2' for no key update")
	trimmed := e.waits(trimmer, "select millrace.trim('orders', p_max_messages => 1)")
	reset := e.waits(operator, "select millrace.reset_group('orders', 'g', 'Earliest')")
	rollback(e, held)
	must(t, <-trimmed)
	must(t, <-reset)
	same(t, "left", e.drainSQL("m", 10), []int{3})
}

// Also a trim that moves no mark frees segments and moves the ring on, which one does at a time: here maintenance, or whoever makes a group.
func TestATrimWaitsForTheStreamsRow(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"1", "11", "11, p_exact => false"} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.publish("orders", 10)
			maintenance, trimmer := e.begin(), e.connect()
			exec(e, maintenance, "select millrace_engine.maintain_stream(1)")
			trimmed := e.waits(trimmer, "select millrace.trim('orders', "+args+")")
			commit(e, maintenance)
			must(t, <-trimmed)
		})
	}
}

// A receive that finds nothing ends there; a claim with nothing left must not be what it finds.
func TestClaimsThatWereTrimmedHideNoOthers(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		want := e.publish("orders", 4)
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 2})
		claims := []*pgstream.Claim{mustReceive(e, c)}
		if mode == pgstream.ModeShared {
			claims = append(claims, mustReceive(e, c))
		}
		for _, claim := range claims {
			must(t, c.Release(e.ctx, claim.Token))
		}
		e.run("select millrace.trim('orders', $1)", want[3])
		same(t, "received", positions(receive(e, c)), want[3:])
	})
}
