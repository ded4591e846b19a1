package pgstream_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// deadLetters is a group whose ten messages, keys k0 to k9, are all dead letters, at the engine's time of now.
func deadLetters(t *testing.T, mode pgstream.Mode) (e *engine, c *pgstream.Consumer) {
	t.Helper()
	e, c, _ = twoMembers(t, mode)
	claim := mustReceive(e, c)
	for _, p := range positions(claim) {
		must(t, c.DeadLetter(e.ctx, claim.Token, []int64{p}, fmt.Sprintf("error %d", p)))
	}
	same(t, "left", drain(e, c), nil)
	return e, c
}

func redrive(e *engine, o pgstream.RedriveOptions) int64 {
	e.t.Helper()
	n, err := pgstream.Redrive(e.ctx, e.Pool, "orders", "g", o)
	must(e.t, err)
	return n
}

func deadPositions(e *engine, filter pgstream.DeadLetterFilter) []int64 {
	e.t.Helper()
	all, err := pgstream.DeadLetters(e.ctx, e.Pool, "orders", "g", filter, 0)
	must(e.t, err)
	var dead []int64
	for _, d := range all {
		dead = append(dead, d.Position)
	}
	return dead
}

func TestDeadLettersGoBackToTheirGroup(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, c := deadLetters(t, mode)
		if n := redrive(e, pgstream.RedriveOptions{}); n != 10 {
			t.Errorf("%d were moved, want 10", n)
		}
		if n := redrive(e, pgstream.RedriveOptions{}); n != 0 {
			t.Errorf("%d were moved again", n)
		}
		claim := mustReceive(e, c)
		same(t, "delivered again", sorted(positions(claim)), []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
		for _, m := range claim.Messages {
			if m.Attempt != 1 || m.Key == nil || !json.Valid(m.Payload) {
				t.Errorf("attempt %d, key %v, payload %s", m.Attempt, m.Key, m.Payload)
			}
		}
		must(t, c.DeadLetter(e.ctx, claim.Token, []int64{4}, "still not"))
		must(t, c.Ack(e.ctx, claim.Token))
		dead, err := pgstream.DeadLetters(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{}, 0)
		must(t, err)
		if len(dead) != 1 || dead[0].Position != 4 || dead[0].Reason != "still not" || len(dead[0].Errors) != 2 ||
			dead[0].Errors[0].Error != "error 4" || dead[0].Errors[1].Error != "still not" || dead[0].Errors[1].Attempt != 1 {
			t.Errorf("dead letters at the end: %+v", dead)
		}
		e.jump(time.Hour)
		same(t, "left", drain(e, c), nil)
		if n := one[int](e, "select count(*) from millrace_engine.parked_key"); n != 0 {
			t.Errorf("%d keys stayed parked", n)
		}
	})
}

func TestARedriveTakesWhatItsFilterSays(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	for i := range 6 {
		e.run(`select millrace.publish('orders', '{}', $1, $2::jsonb)`, fmt.Sprintf("k%d", i%3), fmt.Sprintf(`{"tenant": "t%d", "n": %d}`, i%2, i))
	}
	e.run(`insert into millrace.orders (payload) values ('{}')`)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	claim := mustReceive(e, c)
	start := one[time.Time](e, "select millrace_engine.clock()")
	for _, p := range positions(claim) {
		must(t, c.DeadLetter(e.ctx, claim.Token, []int64{p}, fmt.Sprintf("broken as %c", 'a'+p)))
		e.jump(time.Second)
	}
	second := func(n int) time.Time { return start.Add(time.Duration(n) * time.Second) }
	for _, c := range []struct {
		name   string
		filter pgstream.DeadLetterFilter
		want   []int64
	}{
		{"everything", pgstream.DeadLetterFilter{}, []int64{1, 2, 3, 4, 5, 6, 7}},
		{"keys", pgstream.DeadLetterFilter{Keys: []string{"k0", "k2", "other"}}, []int64{1, 3, 4, 6}},
		{"headers", pgstream.DeadLetterFilter{Headers: map[string]any{"tenant": "t1"}}, []int64{2, 4, 6}},
		{"two headers", pgstream.DeadLetterFilter{Headers: map[string]any{"tenant": "t1", "n": 3}}, []int64{4}},
		{"reason", pgstream.DeadLetterFilter{Reason: "as c"}, []int64{2}},
		{"positions", pgstream.DeadLetterFilter{From: 3, To: 4}, []int64{3, 4}},
		{"positions from", pgstream.DeadLetterFilter{From: 6}, []int64{6, 7}},
		{"positions to", pgstream.DeadLetterFilter{To: 2}, []int64{1, 2}},
		{"dead since", pgstream.DeadLetterFilter{DeadAfter: second(5)}, []int64{6, 7}},
		{"dead before", pgstream.DeadLetterFilter{DeadUntil: second(1)}, []int64{1}},
		{"several parts", pgstream.DeadLetterFilter{Keys: []string{"k0"}, From: 2, Reason: "broken"}, []int64{4}},
		{"nothing", pgstream.DeadLetterFilter{Keys: []string{"'; drop table x"}}, nil},
	} {
		same(t, c.name, deadPositions(e, c.filter), c.want)
		tx := e.begin()
		n, err := pgstream.Redrive(e.ctx, tx, "orders", "g", pgstream.RedriveOptions{Filter: c.filter})
		must(t, err)
		if n != int64(len(c.want)) {
			t.Errorf("%s: %d were moved, want %d", c.name, n, len(c.want))
		}
		moved := one[int](e, `select count(*) from millrace_engine.delivery`)
		rollback(e, tx)
		if moved != 0 {
			t.Errorf("%s: %d were moved before the commit", c.name, moved)
		}
	}
	// Null stands for no key.
	if n := one[int64](e, `select millrace.redrive('orders', 'g', '{"keys": [null, "k1"]}')`); n != 3 {
		t.Errorf("%d without a key or with k1, want 3", n)
	}
	for _, bad := range []string{`[]`, `{"key": ["a"]}`, `{"keys": "a"}`, `{"positions": [1]}`, `{"positions": ["a", 2]}`, `{"positions": 1}`, `{"headers": []}`,
		`{"reason": 1}`, `{"dead_after": "soon"}`, `{"dead_before": 5}`} {
		for _, verb := range []string{"redrive", "purge_dead_letters", "purge_deliveries"} {
			_, err := e.Exec(e.ctx, "select millrace."+verb+"('orders', 'g', $1::jsonb)", bad)
			if sqlState(err) != "MR004" || hint(err) == "" {
				t.Errorf("%s with %s: %v", verb, bad, err)
			}
		}
	}
	if _, err := e.Exec(e.ctx, `select millrace.purge_deliveries('orders', 'g', '{"dead_after": "2026-01-01"}')`); sqlState(err) != "MR004" {
		t.Errorf("deliveries are not dead: %v", err)
	}
	for _, call := range []string{"redrive('orders', 'g', p_max => 0)", "redrive('orders', 'g', p_rate => 0)", "redrive('orders', 'g', p_rate => 'NaN')",
		"redrive('orders', 'g', p_rate => -1)"} {
		if _, err := e.Exec(e.ctx, "select millrace."+call); sqlState(err) != "MR004" {
			t.Errorf("%s: %v", call, err)
		}
	}
	for _, call := range []string{"redrive('orders', 'x')", "redrive('x', 'g')", "purge_dead_letters('orders', 'x')", "purge_deliveries('orders', 'x')",
		"dead_letters('orders', 'x')"} {
		if _, err := e.Exec(e.ctx, "select * from millrace."+call); sqlState(err) != "MR002" {
			t.Errorf("%s: %v", call, err)
		}
	}
}

func TestARedriveIsThrottledAndResumed(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, c := deadLetters(t, mode)
		for range 2 {
			if n := redrive(e, pgstream.RedriveOptions{Max: 4, Rate: 2}); n != 4 {
				t.Errorf("%d were moved, want 4", n)
			}
		}
		same(t, "still dead", deadPositions(e, pgstream.DeadLetterFilter{}), []int64{9, 10})
		var got [][]int64
		for range 4 {
			got = append(got, sorted(drain(e, c)))
			e.jump(500 * time.Millisecond)
		}
		for i, want := range [][]int64{{1, 5}, {2, 6}, {3, 7}, {4, 8}} {
			same(t, fmt.Sprintf("after %d half seconds", i), got[i], want)
		}
	})
}

// Those of one key wait for each other and for their time.
func TestAThrottledRedriveOfOneKeyKeepsItsRate(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	c, _ := e.parking("aaaa")
	claim := mustReceive(e, c)
	must(t, c.DeadLetter(e.ctx, claim.Token, positions(claim), "no"))
	redrive(e, pgstream.RedriveOptions{Rate: 2})
	if n := one[int](e, "select count(*) from millrace_engine.delivery where visible_at < 'infinity'"); n != 1 {
		t.Errorf("a receive looks at %d messages of one key", n)
	}
	for i := range int64(4) {
		same(t, "due", drain(e, c), []int64{i + 1})
		e.jump(500 * time.Millisecond)
	}
	e.nothingIsParked()
}

func TestDeadLettersGoToAnotherStream(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.stream("other")
	e.run("select millrace.create_stream('raw', p_payload_type => 'Bytes')")
	e.run("select millrace.create_stream('raw_other', p_payload_type => 'Bytes')")
	for _, s := range []string{"orders", "raw"} {
		e.group(pgstream.GroupSpec{Stream: s, Name: "g"})
		for i := range 3 {
			publish := `insert into millrace.orders (key, headers, payload) values ($1, '{"trace": 7}', '{"n": 1}')`
			if s == "raw" {
				publish = `insert into millrace.raw (key, headers, payload) values ($1, null, '\x00ff')`
			}
			e.run(publish, fmt.Sprint("k", i))
		}
		c := e.consumer(pgstream.ConsumerConfig{Stream: s, Group: "g"})
		claim := mustReceive(e, c)
		must(t, c.DeadLetter(e.ctx, claim.Token, positions(claim), "no"))
	}
	for _, refused := range [][2]string{{"orders", "raw"}, {"raw", "orders"}} {
		_, err := pgstream.Redrive(e.ctx, e.Pool, refused[0], "g", pgstream.RedriveOptions{To: refused[1]})
		if !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("from %s to %s: %v", refused[0], refused[1], err)
		}
	}
	if _, err := pgstream.Redrive(e.ctx, e.Pool, "orders", "g", pgstream.RedriveOptions{To: "missing"}); !errors.Is(err, pgstream.ErrNotFound) {
		t.Errorf("to a stream that does not exist: %v", err)
	}
	for from, to := range map[string]string{"orders": "other", "raw": "raw_other"} {
		// What is rolled back has not happened.
		tx := e.begin()
		_, err := pgstream.Redrive(e.ctx, tx, from, "g", pgstream.RedriveOptions{To: to})
		must(t, err)
		rollback(e, tx)
		for _, want := range []int64{2, 1, 0} {
			n, err := pgstream.Redrive(e.ctx, e.Pool, from, "g", pgstream.RedriveOptions{To: to, Max: 2})
			must(t, err)
			if n != want {
				t.Errorf("%d were moved to %s, want %d", n, to, want)
			}
		}
		e.group(pgstream.GroupSpec{Stream: to, Name: "new"})
		claim := mustReceive(e, e.consumer(pgstream.ConsumerConfig{Stream: to, Group: "new"}))
		if len(claim.Messages) != 3 {
			t.Fatalf("%d messages in %s, want 3", len(claim.Messages), to)
		}
		for i, m := range claim.Messages {
			var h struct {
				Trace  *int
				Origin struct {
					Stream, Group string
					Position      int64
				} `json:"millrace_origin"`
			}
			must(t, json.Unmarshal(m.Headers, &h))
			if *m.Key != fmt.Sprint("k", i) || h.Origin.Stream != from || h.Origin.Group != "g" || h.Origin.Position != int64(i+1) ||
				(h.Trace != nil) != (from == "orders") {
				t.Errorf("key %s, headers %s", *m.Key, m.Headers)
			}
			if want := map[string]string{"orders": `{"n": 1}`, "raw": "\x00\xff"}[from]; string(m.Payload) != want {
				t.Errorf("payload %q, want %q", m.Payload, want)
			}
		}
	}
	e.run(`insert into millrace.orders (payload) values (to_jsonb(repeat('x', 100)))`)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	claim := mustReceive(e, c)
	must(t, c.DeadLetter(e.ctx, claim.Token, positions(claim), "no"))
	e.run("update millrace_engine.stream set max_message_bytes = 50 where name = 'other'")
	if _, err := pgstream.Redrive(e.ctx, e.Pool, "orders", "g", pgstream.RedriveOptions{To: "other"}); !errors.Is(err, pgstream.ErrRefused) ||
		strings.Contains(err.Error(), "xxx") {
		t.Errorf("a message that is too large: %v", err)
	}
}

func TestARedriveToAnotherStreamIsThrottledByDelays(t *testing.T) {
	t.Parallel()
	e, _ := deadLetters(t, pgstream.ModeShared)
	e.stream("other")
	if n := redrive(e, pgstream.RedriveOptions{To: "other", Rate: 2, Max: 5}); n != 5 {
		t.Errorf("%d were moved, want 5", n)
	}
	same(t, "still dead", deadPositions(e, pgstream.DeadLetterFilter{}), []int64{6, 7, 8, 9, 10})
	if n := one[int](e, `select count(*) from millrace_engine.delayed d join millrace_engine.stream s on s.id = d.stream_id
		where s.name = 'other' and d.headers -> 'millrace_origin' ->> 'group' = 'g'`); n < 4 {
		t.Errorf("%d messages are delayed, want at least 4", n)
	}
	if span := one[float64](e, `select extract(epoch from max(due_at) - millrace_engine.clock())::float8 from millrace_engine.delayed`); span != 2 {
		t.Errorf("the last is due after %v seconds, want 2", span)
	}
}

// The rate is that of the whole call, whatever the priorities.
func TestARedriveOfPrioritiesKeepsItsRate(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.run("select millrace.create_stream('orders', p_priorities => 2)")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.stream("other")
	for to, due := range map[string]string{
		"":      "select visible_at as at from millrace_engine.delivery",
		"other": "select due_at as at from millrace_engine.delayed union all select millrace_engine.clock() from millrace.other",
	} {
		e.run(`insert into millrace_engine.dead_letter (group_id, "position", payload, created_at, attempts, reason, dead_at)
			select g.id, n, '{}', now(), 1, 'no', now() from millrace_engine.consumer_group g, generate_series(1, 2) n`)
		if n := redrive(e, pgstream.RedriveOptions{To: to, Rate: 2}); n != 4 {
			t.Errorf("to %q: %d were moved, want 4", to, n)
		}
		got := one[[]float64](e, "select array_agg(extract(epoch from x.at - millrace_engine.clock())::float8 order by x.at) from ("+due+") x")
		if !slices.Equal(got, []float64{0, 0.5, 1, 1.5}) {
			t.Errorf("to %q: due after %v seconds, want one each half second", to, got)
		}
	}
}

// After a reset a message can be a dead letter from before and a delivery at once.
func TestAMessageThatIsBeingDeliveredIsNotDoubledByARedrive(t *testing.T) {
	t.Parallel()
	for _, held := range []bool{false, true} {
		e, c := deadLetters(t, pgstream.ModeShared)
		e.run(`insert into millrace_engine.delivery (group_id, "position", key, payload, created_at, attempt, visible_at)
			select group_id, "position", key, payload, created_at, 1, millrace_engine.clock() from millrace_engine.dead_letter where "position" in (3, 4)`)
		var claim *pgstream.Claim
		if held {
			claim = mustReceive(e, c)
			same(t, "held", sorted(positions(claim)), []int64{3, 4})
		}
		if n := redrive(e, pgstream.RedriveOptions{}); n != 10 {
			t.Errorf("%d were moved, want 10", n)
		}
		if held {
			must(t, c.Ack(e.ctx, claim.Token))
		}
		want := []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
		if held {
			want = []int64{1, 2, 5, 6, 7, 8, 9, 10}
		}
		same(t, "delivered", sorted(drain(e, c)), want)
		same(t, "dead", deadPositions(e, pgstream.DeadLetterFilter{}), nil)
	}
}

// After a reset the first message of a key is at work, and dead from before, as a later one is. A redrive of both beside an ack of the first does not wait for
// it, delivers the first once, and leaves the others behind it, where nothing keeps them for ever.
func TestARedriveMeetsTheAckOfItsKeysFirstMessage(t *testing.T) {
	t.Parallel()
	for _, undone := range []bool{false, true} {
		t.Run(fmt.Sprintf("the ack undone %t", undone), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.parking("aaa")
			c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "c", MaxMessages: 2})
			for _, want := range [][]int64{{1, 2}, {3}} {
				claim := mustReceive(e, c)
				same(t, "to be dead", positions(claim), want)
				must(t, c.DeadLetter(e.ctx, claim.Token, want[:1], "no"))
				if len(want) > 1 {
					must(t, c.Ack(e.ctx, claim.Token))
				}
			}
			e.run("select millrace.reset_group('orders', 'g', 'Earliest')")
			must(t, c.Nack(e.ctx, mustReceive(e, c).Token, []int64{1}, 0, "again"))
			first := mustReceive(e, c)
			same(t, "at work", positions(first), []int64{1})

			ack := e.begin()
			must(t, c.AckTx(e.ctx, ack, first.Token))
			e.run("alter function millrace.redrive set lock_timeout = '5s'")
			if n := redrive(e, pgstream.RedriveOptions{}); n != 2 {
				t.Errorf("%d were moved, want 2", n)
			}
			same(t, "while the first is at work", positions(receive(e, c)), nil)
			if undone {
				rollback(e, ack)
				same(t, "after the ack was undone", positions(receive(e, c)), nil)
				must(t, c.Ack(e.ctx, first.Token))
			} else {
				commit(e, ack)
			}
			var got []int64
			for range 3 { // a receive that only moves messages returns none
				got = append(got, drain(e, c)...)
			}
			same(t, "then", got, []int64{2, 3})
			e.nothingIsParked()
		})
	}
}

func TestTwoRedrivesShareTheDeadLetters(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, c := deadLetters(t, mode)
		redrive(e, pgstream.RedriveOptions{Max: 1}) // the first of an Ordered group marks the group, and others wait for that
		tx := e.begin()
		n, err := pgstream.Redrive(e.ctx, tx, "orders", "g", pgstream.RedriveOptions{Max: 3})
		must(t, err)
		if m := redrive(e, pgstream.RedriveOptions{}); n != 3 || m != 6 {
			t.Errorf("%d and %d were moved, want 3 and 6", n, m)
		}
		commit(e, tx)
		same(t, "delivered", sorted(drain(e, c)), []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
	})
}

func TestPurgeRemovesOnlyWhatNobodyHolds(t *testing.T) {
	t.Parallel()
	e, c, other := twoMembers(t, pgstream.ModeShared)
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1, 2, 3}, 0, "first"))
	must(t, c.Nack(e.ctx, claim.Token, []int64{4, 5, 6}, time.Hour, "second"))
	must(t, c.DeadLetter(e.ctx, claim.Token, []int64{7, 8, 9, 10}, "third"))
	held := mustReceive(e, other)
	same(t, "held", sorted(positions(held)), []int64{1, 2, 3})
	for _, step := range []struct {
		filter pgstream.DeadLetterFilter
		want   int64
	}{{pgstream.DeadLetterFilter{Reason: "first"}, 0}, {pgstream.DeadLetterFilter{From: 6, Reason: "second"}, 1}, {pgstream.DeadLetterFilter{}, 2}, {pgstream.DeadLetterFilter{}, 0}} {
		n, err := pgstream.PurgeDeliveries(e.ctx, e.Pool, "orders", "g", step.filter)
		must(t, err)
		if n != step.want {
			t.Errorf("%d deliveries were removed by %+v, want %d", n, step.filter, step.want)
		}
	}
	must(t, other.AckMessages(e.ctx, held.Token, []int64{1}))
	// A lease that has ended holds nothing, though nobody has asked for its messages yet; one that is being settled does.
	e.jump(2 * time.Second)
	tx := e.begin()
	must(t, other.AckMessagesTx(e.ctx, tx, held.Token, []int64{2}))
	if n, err := pgstream.PurgeDeliveries(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{}); err != nil || n != 0 {
		t.Errorf("%d were removed beside an ack: %v", n, err)
	}
	commit(e, tx)
	if n, err := pgstream.PurgeDeliveries(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{}); err != nil || n != 1 {
		t.Errorf("%d were removed, want 1: %v", n, err)
	}
	mustBeFenced(t, "an ack of what was removed", other.Ack(e.ctx, held.Token))
	for _, want := range []int64{1, 3, 0} {
		filter := pgstream.DeadLetterFilter{}
		if want == 1 {
			filter.To = 7
		}
		n, err := pgstream.PurgeDeadLetters(e.ctx, e.Pool, "orders", "g", filter)
		must(t, err)
		if n != want {
			t.Errorf("%d dead letters were removed, want %d", n, want)
		}
	}
	e.jump(2 * time.Hour)
	same(t, "left", drain(e, c), nil)
}

// A purge waits neither for a member whose receive is not committed yet, nor for an ack that is making the next message of a key due, nor for a redrive.
func TestPurgeDoesNotWait(t *testing.T) {
	t.Parallel()
	purged := func(e *engine, when string, want int64) {
		e.t.Helper()
		n, err := pgstream.PurgeDeliveries(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{})
		must(e.t, err)
		if n != want {
			e.t.Errorf("%s: %d were removed, want %d", when, n, want)
		}
	}
	t.Run("for a receive", func(t *testing.T) {
		t.Parallel()
		e, c, _ := twoMembers(t, pgstream.ModeShared)
		e.run("alter function millrace.purge_deliveries set lock_timeout = '5s'")
		claim := mustReceive(e, c)
		must(t, c.Nack(e.ctx, claim.Token, []int64{1, 2}, 0, "no"))
		must(t, c.Ack(e.ctx, claim.Token))
		tx := e.begin()
		exec(e, tx, "select millrace.receive('orders', 'g', 'new', 1)")
		purged(e, "beside a receive", 1)
		rollback(e, tx)
		purged(e, "after it was undone", 1)
	})
	t.Run("for an ack", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		c, _ := e.parking("aaabb")
		e.run("alter function millrace.purge_deliveries set lock_timeout = '5s'")
		claim := mustReceive(e, c)
		must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
		must(t, c.Nack(e.ctx, claim.Token, []int64{4}, time.Hour, "no"))
		first := mustReceive(e, c)
		same(t, "at work", positions(first), []int64{1})
		tx := e.begin()
		must(t, c.AckTx(e.ctx, tx, first.Token))
		purged(e, "beside an ack", 2)
		commit(e, tx)
		purged(e, "after it", 2)
		e.nothingIsParked()
	})
	t.Run("for a redrive", func(t *testing.T) {
		t.Parallel()
		e, c, _ := twoMembers(t, pgstream.ModeShared)
		e.run("alter function millrace.purge_dead_letters set lock_timeout = '5s'")
		claim := mustReceive(e, c)
		must(t, c.DeadLetter(e.ctx, claim.Token, []int64{1, 2}, "no"))
		tx := e.begin()
		exec(e, tx, "select millrace.redrive('orders', 'g', p_max => 1)")
		for i, want := range []int64{1, 0, 1} {
			if i == 2 {
				rollback(e, tx)
			}
			if n, err := pgstream.PurgeDeadLetters(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{}); err != nil || n != want {
				t.Errorf("purge %d: %d dead letters were removed, want %d: %v", i+1, n, want, err)
			}
		}
	})
}

// Every failure of a message leaves an entry, an expiry too; the last ten are kept, by a dead letter as well.
func TestEveryFailureIsInTheHistoryOfAMessage(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", MaxAttempts: 13, AckWait: time.Second})
	e.publish("orders", 1)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	for attempt := 1; attempt <= 13; attempt++ {
		claim := mustReceive(e, c)
		if attempt == 1 || attempt%2 == 0 {
			must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, fmt.Sprint("nack ", attempt)))
		} else {
			e.jump(2 * time.Second)
		}
	}
	same(t, "after the last attempt", drain(e, c), nil)
	dead, err := pgstream.DeadLetters(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{}, 5)
	must(t, err)
	if len(dead) != 1 || dead[0].Attempt != 13 || dead[0].Reason != "not settled within the ack wait" || len(dead[0].Errors) != 10 {
		t.Fatalf("dead letters: %+v", dead)
	}
	for i, entry := range dead[0].Errors {
		want := "not settled within the ack wait"
		if attempt := i + 4; attempt%2 == 0 {
			want = fmt.Sprint("nack ", attempt)
		}
		if entry.Attempt != i+4 || entry.Error != want || entry.At.IsZero() {
			t.Errorf("entry %d: %+v, want attempt %d, %q", i, entry, i+4, want)
		}
	}
}

func TestLeavingDoesNotWaitForAnAck(t *testing.T) {
	t.Parallel()
	e, c, other := twoMembers(t, pgstream.ModeShared)
	claim := mustReceive(e, c)
	must(t, c.Nack(e.ctx, claim.Token, []int64{1, 2}, 0, "no"))
	must(t, c.Ack(e.ctx, claim.Token))
	retry := mustReceive(e, c)
	tx := e.begin()
	must(t, c.AckMessagesTx(e.ctx, tx, retry.Token, []int64{1}))
	must(t, c.Leave(e.ctx))
	same(t, "while it is being settled", positions(receive(e, other)), nil)
	commit(e, tx)
	e.jump(2 * time.Second)
	same(t, "after the lease", drain(e, other), []int64{2})
}

// The verbs for operators cover the priority lanes of a stream.
func TestDeadLettersOfPrioritiesAreOneSet(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.run("select millrace.create_stream('orders', p_priorities => 3)")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		for i := range 6 {
			e.run(`select millrace.publish('orders', '{}', 'k', p_priority => $1)`, i%3)
		}
		receive := func() (token string, all []int64) {
			t.Helper()
			rows, err := e.Query(e.ctx, `select claim, "position" from millrace.receive('orders', 'g', 'm')`)
			must(t, err)
			var p int64
			_, err = pgx.ForEachRow(rows, []any{&token, &p}, func() error { all = append(all, p); return nil })
			must(t, err)
			return token, all
		}
		for range 3 {
			token, all := receive()
			e.run("select millrace.dead_letter($1, $2, 'no')", token, all)
		}
		dead, err := pgstream.DeadLetters(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{}, 0)
		must(t, err)
		for i, want := range [][2]int64{{2, 1}, {2, 2}, {1, 1}, {1, 2}, {0, 1}, {0, 2}} {
			if len(dead) != 6 || int64(dead[i].Priority) != want[0] || dead[i].Position != want[1] {
				t.Fatalf("dead letter %d of %d: %+v", i, len(dead), dead[i])
			}
		}
		if n := redrive(e, pgstream.RedriveOptions{Max: 3}); n != 3 {
			t.Errorf("%d were moved, want 3", n)
		}
		if n, err := pgstream.PurgeDeadLetters(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{From: 2}); err != nil || n != 2 {
			t.Errorf("%d dead letters were removed, want 2: %v", n, err)
		}
		token, _ := receive()
		e.run("select millrace.leave('orders', 'g', 'm')")
		_, err = e.Exec(e.ctx, "select millrace.ack($1)", token)
		if sqlState(err) != "MR001" {
			t.Errorf("after the member left: %v", err)
		}
		if n, err := pgstream.PurgeDeliveries(e.ctx, e.Pool, "orders", "g", pgstream.DeadLetterFilter{}); err != nil || n != 3 {
			t.Errorf("%d deliveries were removed, want 3: %v", n, err)
		}
		if n := redrive(e, pgstream.RedriveOptions{}); n != 1 {
			t.Errorf("%d were moved, want 1", n)
		}
		if _, all := receive(); len(all) != 1 {
			t.Errorf("delivered %v, want one message", all)
		}
	})
}
