package pgstream_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func (e *engine) maintain(times int) {
	e.t.Helper()
	for range times {
		if _, err := pgstream.Maintain(e.ctx, e); err != nil {
			e.t.Fatal(err)
		}
	}
}

// kept returns how many messages the stream still has.
func (e *engine) kept() int {
	e.t.Helper()
	return one[int](e, "select count(*) from millrace.orders")
}

func (e *engine) retained(r pgstream.Retention) {
	e.t.Helper()
	must(e.t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Retention: r}}))
}

func TestLimitsRemoveTheOldestMessages(t *testing.T) {
	t.Parallel()
	t.Run("by count", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		e.retained(pgstream.Retention{MaxMessages: 1000})
		for range 40 {
			e.publish("orders", 100)
			e.maintain(2)
		}
		if n := e.kept(); n < 1000 || n > 2000 {
			t.Errorf("%d messages are kept, want 1,000 and at most a few segments more", n)
		}
		info, err := pgstream.DescribeStream(e.ctx, e, "orders")
		must(t, err)
		if low := one[int64](e, "select min(position) from millrace.orders"); info.FirstPosition != low {
			t.Errorf("first position %d, the lowest is %d", info.FirstPosition, low)
		}
	})
	t.Run("by size", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		const limit = 2 << 20
		e.retained(pgstream.Retention{MaxBytes: limit})
		for range 40 {
			e.run(`insert into millrace.orders (payload) select to_jsonb(repeat(md5(n::text), 30)) from generate_series(1, 200) n`)
			e.maintain(2)
		}
		info, err := pgstream.DescribeStream(e.ctx, e, "orders")
		must(t, err)
		if info.Bytes > limit*3/2 || e.kept() < 200 {
			t.Errorf("%d bytes and %d messages are kept; the limit is %d", info.Bytes, e.kept(), limit)
		}
	})
	t.Run("by age", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		e.retained(pgstream.Retention{MaxAge: time.Hour})
		for range 4 {
			e.publish("orders", 10)
			e.run("update millrace_engine.stream set segment_started_at = segment_started_at - interval '30 minutes'")
			e.maintain(1)
		}
		e.maintain(5)
		if n := e.kept(); n != 40 {
			t.Errorf("%d messages are kept of 40 young ones", n)
		}
		e.run("update millrace.orders set created_at = created_at - interval '2 hours' where position <= 20")
		e.maintain(5)
		if n, low := e.kept(), one[int64](e, "select min(position) from millrace.orders"); n != 20 || low != 21 {
			t.Errorf("%d messages from %d on are kept, want 20 from 21 on", n, low)
		}
	})
}

func TestInterestKeepsWhatAGroupStillNeeds(t *testing.T) {
	t.Parallel()
	for _, policy := range []pgstream.RetentionPolicy{pgstream.RetentionInterest, pgstream.RetentionWorkQueue} {
		t.Run(string(policy), func(t *testing.T) {
			t.Parallel()
			inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
				e := newEngine(t)
				e.retained(pgstream.Retention{Policy: policy})
				groups := []string{"one"}
				if policy == pgstream.RetentionInterest {
					groups = append(groups, "two")
				} else {
					e.fillRing()
					e.maintain(10)
					if n := e.kept(); n != 400 {
						t.Errorf("%d messages are kept before anybody has worked, want 400", n)
					}
				}
				for _, g := range groups {
					e.group(pgstream.GroupSpec{Stream: "orders", Name: g, Mode: mode})
				}
				if policy == pgstream.RetentionInterest {
					e.fillRing()
				}
				e.maintain(10)
				if n := e.kept(); n != 400 {
					t.Fatalf("%d messages are kept before the first ack, want 400", n)
				}
				for i, g := range groups {
					c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: g, MaxMessages: 10})
					held := mustReceive(e, c) // keeps the first segment
					must(t, c.AckMessages(e.ctx, held.Token, positions(held)[1:]))
					for {
						claim := receive(e, c)
						if claim == nil {
							break
						}
						must(t, c.Ack(e.ctx, claim.Token))
					}
					e.maintain(10)
					if n := e.kept(); n != 400 {
						t.Fatalf("group %s: %d messages are kept while the first is held, want 400", g, n)
					}
					must(t, c.Ack(e.ctx, held.Token))
					drain(e, c)
					e.maintain(10)
					want := 400
					if i == len(groups)-1 {
						want = 100 // the segment that is being written
					}
					if n := e.kept(); n != want {
						t.Errorf("group %s: %d messages are kept after its last ack, want %d", g, n, want)
					}
				}
			})
		})
	}
}

// Nobody is interested where there are no groups; a queue waits for its first (TestInterestKeepsWhatAGroupStillNeeds). A group that is paused goes on where it
// stands.
func TestInterestOfGroupsThatDoNotReceive(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		groups []pgstream.GroupSpec
		want   int
	}{
		"none":   {nil, 100}, // the current segment
		"paused": {[]pgstream.GroupSpec{{Stream: "orders", Name: "g", Paused: true}}, 400},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.retained(pgstream.Retention{Policy: pgstream.RetentionInterest})
			for _, g := range c.groups {
				e.group(g)
			}
			e.fillRing()
			e.maintain(5)
			if n := e.kept(); n != c.want {
				t.Errorf("%d messages are kept, want %d", n, c.want)
			}
		})
	}
}

// A group cannot begin at messages of which maintenance is finding out that nobody needs them.
func TestInterestOfANewGroup(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.retained(pgstream.Retention{Policy: pgstream.RetentionInterest})
	e.fillRing()
	e.run("alter function millrace_engine.newest(integer, integer, boolean) rename to read_newest")
	e.run(`create function millrace_engine.newest(s integer, k integer, youngest boolean, out "position" bigint, out created_at timestamptz) language plpgsql
		set lock_timeout = 0 as $$ begin
			` + pass + `;
			select * into "position", created_at from millrace_engine.read_newest(s, k, youngest); end $$`)
	reached, open := e.gate()
	maintained, created := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := pgstream.Maintain(e.ctx, e)
		maintained <- err
	}()
	reached()
	conn := e.connect()
	go func() {
		created <- pgstream.ApplyGroup(e.ctx, conn, pgstream.GroupSpec{Stream: "orders", Name: "g"})
	}()
	e.eventually("the group waits, or is created", func() bool {
		return len(created) == 1 || one[bool](e, `select exists (select from pg_stat_activity where pid = $1 and wait_event_type = 'Lock')`, conn.PgConn().PID())
	})
	lag := int64(300) // when it begins after a segment was removed
	if len(created) == 1 {
		lag = 400
	}
	open()
	must(t, <-maintained)
	must(t, <-created)
	if got := drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})); int64(len(got)) != lag {
		t.Errorf("the group began with %d messages and got %d", lag, len(got))
	}
}

// fillRing puts a hundred messages into each segment, the oldest into the first.
func (e *engine) fillRing() {
	e.t.Helper()
	for k := range 4 {
		e.run("select millrace_engine.set_state(1, $1, null)", k)
		e.publish("orders", 100)
	}
}

// publishLate fills the first segment, has a publisher in it that is still open, and goes on to the next. It returns the publisher and its position.
func (e *engine) publishLate() (pgx.Tx, int64) {
	e.t.Helper()
	e.run("select millrace_engine.set_state(1, 0, null)")
	e.publish("orders", 10)
	late := e.begin()
	p := publishIn(e, late, "orders")
	e.run("select millrace_engine.set_state(1, 1, null)")
	return late, p
}

// A publisher whose transaction began in a segment that is now the oldest must not lose its message to a truncation.
func TestATruncationWaitsForLatePublishers(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.retained(pgstream.Retention{Policy: pgstream.RetentionInterest})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	late, p := e.publishLate()
	e.publish("orders", 10)
	drain(e, c)
	e.maintain(3) // cannot have the lock, and that is no error
	commit(e, late)
	e.maintain(3) // may remove nothing now: the late message is not settled
	got := drain(e, c)
	if len(got) != 11 || got[0] != p {
		t.Errorf("got %v, want the late message %d and ten more", got, p)
	}
	e.maintain(3)
	if n := e.kept(); n != 10 {
		t.Errorf("%d messages are kept, want the ten of the current segment", n)
	}
}

// The same when it commits while the truncation waits for it.
func TestATruncationLooksAgainWhenItHasTheSegment(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.retained(pgstream.Retention{Policy: pgstream.RetentionInterest})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	late, p := e.publishLate()
	drain(e, c)
	e.run("alter function millrace_engine.maintain_stream set lock_timeout = 0")
	conn := e.connect()
	done := e.waits(conn, "select millrace_engine.maintain_stream(1)")
	commit(e, late)
	must(t, <-done)
	same(t, "the late message", drain(e, c), []int64{p})
}

// Finding out how old a segment's youngest message is means reading all of it, which may be a gigabyte.
func TestNobodyWaitsWhileMaintenanceReadsASegment(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.retained(pgstream.Retention{MaxAge: time.Second})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	e.run("select millrace_engine.set_state(1, 0, null)")
	e.publish("orders", 10)
	e.run("update millrace.orders set created_at = created_at - interval '1 hour'")
	e.run("select millrace_engine.set_state(1, 1, null)")

	// Reading takes as long as the test holds the lock.
	e.run("alter function millrace_engine.newest(integer, integer, boolean) rename to read_newest")
	e.run(`create function millrace_engine.newest(s integer, k integer, youngest boolean, out "position" bigint, out created_at timestamptz) language plpgsql set lock_timeout = 0 as $$ begin
		if youngest then ` + pass + `; end if;
		select * into "position", created_at from millrace_engine.read_newest(s, k, youngest); end $$`)
	reached, open := e.gate()
	maintained := make(chan error, 1)
	go func() {
		_, err := pgstream.Maintain(e.ctx, e)
		maintained <- err
	}()
	reached()
	tx := e.begin()
	_, err := tx.Exec(e.ctx, "set local lock_timeout = '5s'")
	must(t, err)
	publishIn(e, tx, "orders")
	if _, err := tx.Exec(e.ctx, "select from millrace.orders"); err != nil {
		t.Fatalf("a reader: %v", err)
	}
	commit(e, tx)
	if got := drain(e, c); len(got) != 11 {
		t.Errorf("%d messages, want 11", len(got))
	}
	open()
	must(t, <-maintained)
	if n := e.kept(); n != 1 {
		t.Errorf("%d messages are kept, want the one of the current segment", n)
	}
}

func TestMaintenanceNeedsReadCommitted(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	for _, sql := range []string{"select millrace_engine.maintain_stream(1)", "select millrace_engine.carry_over(1)", "select millrace_engine.truncate_ledger()"} {
		tx := e.beginAs(pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
		if _, err := tx.Exec(e.ctx, sql); sqlState(err) != "MR003" {
			t.Errorf("%s: %v; want MR003", sql, err)
		}
	}
}

// A group that lags beyond the limits goes on with what is left.
func TestAGroupBehindTheLimitsGoesOnWithTheRest(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.retained(pgstream.Retention{MaxMessages: 50})
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Second})
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 10})
		e.publish("orders", 10)
		lost := mustReceive(e, c)
		for range 20 {
			e.publish("orders", 10)
			e.maintain(2)
		}
		first := one[int64](e, "select min(position) from millrace.orders")
		if first < 50 {
			t.Fatalf("the first position is %d", first)
		}
		if s := e.stats("orders", "g"); s.Lag != 211-first {
			t.Errorf("lag %d, want %d", s.Lag, 211-first)
		}
		e.jump(time.Minute)
		got := drain(e, c)
		if len(got) == 0 || got[0] != first || len(got) != int(211-first) {
			t.Errorf("got %d messages, the first is %v; want %d from %d on", len(got), got[:min(1, len(got))], 211-first, first)
		}
		mustBeFenced(t, "ack of what was removed", c.Ack(e.ctx, lost.Token))
	})
}

// Publishers and readers run while segments rotate and are truncated; what the policy keeps is never lost.
func TestNothingIsLostWhileSegmentsTurn(t *testing.T) {
	t.Parallel()
	length := soak(t, 2*time.Second)
	e := newEngine(t)
	e.extendDeadline(length)
	e.retained(pgstream.Retention{Policy: pgstream.RetentionInterest})
	groups := []string{"shared", "ordered"}
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "shared", AckWait: 10 * time.Minute})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "ordered", Mode: pgstream.ModeOrdered, AckWait: 10 * time.Minute})
	h := newHistory()
	ctx, cancel := context.WithTimeout(e.ctx, length)
	defer cancel()
	failed := make(chan error, 100)
	var publishers, readers, upkeep sync.WaitGroup
	r := random(t)
	for range 3 {
		conn, own := e.connect(), newRand(r)
		publishers.Go(func() {
			for ctx.Err() == nil {
				if err := h.publishAndPause(e.ctx, conn, own); err != nil {
					failed <- fmt.Errorf("publish: %w", err)
					return
				}
			}
		})
	}
	var quiet, done atomic.Bool
	for i, group := range []string{"shared", "shared", "ordered", "ordered"} {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group, Member: fmt.Sprintf("m%d", i), MaxMessages: 30})
		readers.Go(func() {
			token := ""
			for {
				last := quiet.Load()
				claim, err := c.AckAndTryReceive(e.ctx, token)
				if err != nil && pgstream.IsTransient(err) && !errors.Is(err, context.Canceled) {
					continue // told that messages went while it read
				}
				if err != nil {
					failed <- err
					return
				}
				token = ""
				if claim != nil {
					h.received(group, positions(claim))
					token = claim.Token
				} else if last {
					return
				}
			}
		})
	}
	truncated := 0
	upkeep.Go(func() {
		for segment := 0; !done.Load(); segment++ {
			// As if every segment were large at once.
			if _, err := e.Exec(e.ctx, "select millrace_engine.set_state(1, $1, null)", segment%4); err != nil {
				failed <- err
				return
			}
			did, err := pgstream.MaintainWithRing(e.ctx, e.Pool, 1)
			if err != nil {
				failed <- err
				return
			}
			truncated += len(did)
		}
	})
	publishers.Wait()
	quiet.Store(true)
	readers.Wait()
	done.Store(true)
	upkeep.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	for _, g := range groups {
		h.received(g, drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: g, Member: "m3"})))
	}
	if truncated == 0 {
		t.Error("nothing was truncated: the run proves nothing")
	}
	mustHold(t, h.broken(groups...))
	t.Logf("%d committed, %d rolled back, %d turns", len(h.committed), len(h.gone), truncated)
}

// What retention truncates, receive passes over at once; a transaction that holds the group's row does not keep it from truncating.
func TestGroupsFollowTheMarkOfRetention(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.retained(pgstream.Retention{MaxMessages: 150})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "busy"})
	e.fillRing()
	tx := e.begin()
	exec(e, tx, "select from millrace_engine.consumer_group where name = 'busy' for no key update")
	e.maintain(1)
	if n := e.kept(); n != 300 {
		t.Errorf("%d messages are kept after the first round, want 300", n)
	}
	if p := one[int64](e, "select first_position from millrace_engine.consumer_group where name = 'g'"); p != 101 {
		t.Errorf("the group begins at %d, want 101", p)
	}
	rollback(e, tx)
	for _, g := range []string{"g", "busy"} {
		got := drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: g}))
		if len(got) != 300 || got[0] != 101 {
			t.Errorf("group %s got %d messages", g, len(got))
		}
	}
}

// Streams at rest cost maintenance one question together, and those that may need it are found.
func TestMaintenanceAsksOnlyForStreamsThatMayNeedIt(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	due := func(when string, want ...string) {
		t.Helper()
		got := one[[]string](e, "select coalesce(array_agg(name order by name), '{}') from millrace_engine.streams_to_maintain()")
		same(t, when, got, append([]string{}, want...))
	}
	e.retained(pgstream.Retention{})
	due("nothing was ever published")
	e.publish("orders", 100)
	due("messages are kept without a limit")
	e.retained(pgstream.Retention{MaxAge: time.Hour})
	due("a segment is young")
	e.run("update millrace_engine.stream set segment_started_at = now() - interval '21 minutes'") // of 4 segments, one covers a third of the limit
	due("a segment is old", "orders")
	e.maintain(1)
	due("an old segment may have to be removed", "orders")
	e.retained(pgstream.Retention{MaxMessages: 1000})
	e.run("select millrace.trim('orders', p_max_messages => 0)")
	e.maintain(2)
	due("all is removed, and there is a limit of messages that nothing is near")
	e.publish("orders", 1)
	due("a limit of messages is looked at while there are any", "orders")
	e.retained(pgstream.Retention{})
	due("without it not")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", LapseAfter: time.Hour})
	due("a group may lapse", "orders")

	groups := func(when string, want int) {
		t.Helper()
		if got := one[int](e, "select count(*) from millrace_engine.groups_to_carry()"); got != want {
			t.Errorf("%s: %d groups have something to carry over, want %d", when, got, want)
		}
	}
	groups("in the current ring", 0)
	e.run("select setval('millrace_engine.ring', 1)")
	groups("after a rotation", 1)
	e.maintain(1)
	groups("after maintenance", 0)
}
