package pgstream_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Claims of a backlog are made by one transaction and read by another; what comes out is what receive would have handed out.
func TestBacklogIsFetchedOnceByManyMembers(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeShared})
	var want []int64
	for i := range 20 { // with holes: single positions, and stretches longer than a claim
		want = append(want, e.publish("orders", 150)...)
		e.run(fmt.Sprintf("do $$ begin begin insert into millrace.orders (payload) select '{}' from generate_series(1, %d); raise 'no'; exception when raise_exception then null; end; end $$", 1+i*20))
	}
	want = append(want, e.publish("orders", 10)...)

	var mu sync.Mutex
	var got []int64
	fetched := 0
	var working sync.WaitGroup
	for range 3 {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 60})
		working.Go(func() {
			token := ""
			for {
				claim, err := c.AckAndTryReceive(e.ctx, token)
				if err != nil {
					t.Error(err)
					return
				}
				if claim == nil {
					return
				}
				token = claim.Token
				mu.Lock()
				for _, m := range claim.Messages {
					got = append(got, m.Position)
					if m.Attempt != 1 || m.CreatedAt.IsZero() || len(m.Payload) == 0 || m.Key == nil {
						t.Errorf("not whole: %+v", m)
					}
				}
				if pgstream.Fetches(c) {
					fetched++
				}
				mu.Unlock()
			}
		})
	}
	working.Wait()
	same(t, "received", sorted(got), want)
	if fetched == 0 {
		t.Error("nothing was fetched by a transaction of its own")
	}
	if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 || s.AckFloor != want[len(want)-1] {
		t.Errorf("at the end: %+v", s)
	}
}

// What a fetched message holds is what receive returns for it, for both payload types.
func TestFetchedMessagesAreEqualToReceivedOnes(t *testing.T) {
	t.Parallel()
	for _, payload := range []pgstream.PayloadType{pgstream.PayloadJSON, pgstream.PayloadBytes} {
		t.Run(string(payload), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			plan, err := pgstream.PlanStream(e.ctx, e.Pool, pgstream.StreamSpec{Name: "orders", PayloadType: payload})
			must(t, err)
			must(t, pgstream.ApplyStream(e.ctx, e.Pool, plan))
			value := `jsonb_build_object('n', i, 'text', 'ü "quoted"')`
			if payload == pgstream.PayloadBytes {
				value = `decode(lpad(to_hex(i), 8, '0') || '00ff', 'hex')`
			}
			e.run(fmt.Sprintf(`insert into millrace.orders (key, headers, payload)
				select case when i %% 3 > 0 then 'k' || i end, case when i %% 2 > 0 then jsonb_build_object('h', i) end, %s from generate_series(1, 300) i`, value))
			var all [2][]pgstream.Message
			for i, group := range []string{"small", "large"} {
				e.group(pgstream.GroupSpec{Stream: "orders", Name: group, Mode: pgstream.ModeShared})
				c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group, MaxMessages: []int{10, 100}[i]})
				for token := ""; ; {
					claim, err := c.AckAndTryReceive(e.ctx, token)
					must(t, err)
					if claim == nil {
						break
					}
					token = claim.Token
					all[i] = append(all[i], claim.Messages...)
				}
			}
			if len(all[0]) != 300 || len(all[1]) != 300 {
				t.Fatalf("%d and %d messages", len(all[0]), len(all[1]))
			}
			for n := range all[0] {
				a, b := all[0][n], all[1][n]
				if a.Position != b.Position || !a.CreatedAt.Equal(b.CreatedAt) || a.Attempt != b.Attempt || string(a.Payload) != string(b.Payload) ||
					string(a.Headers) != string(b.Headers) || (a.Headers == nil) != (b.Headers == nil) || (a.Key == nil) != (b.Key == nil) || a.Key != nil && *a.Key != *b.Key {
					t.Fatalf("received %+v\n fetched %+v", a, b)
				}
			}
		})
	}
}

// Single acks settle a fetched claim that has empty positions: the claim knows of them.
func TestFetchedClaimWithHolesIsSettledBySingleAcks(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeShared})
	e.publish("orders", 100)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 100})
	first, err := c.TryReceive(e.ctx)
	must(t, err)
	e.publish("orders", 40)
	e.run("do $$ begin begin insert into millrace.orders (payload) values ('{}'); raise 'no'; exception when raise_exception then null; end; end $$")
	e.publish("orders", 40)
	if !pgstream.Fetches(c) {
		t.Fatal("the next claim would not be fetched")
	}
	claim, err := c.AckAndTryReceive(e.ctx, first.Token)
	must(t, err)
	if len(claim.Messages) != 80 {
		t.Fatalf("%d messages", len(claim.Messages))
	}
	positions := make([]int64, len(claim.Messages))
	for i, m := range claim.Messages {
		positions[i] = m.Position
	}
	must(t, c.AckMessages(e.ctx, claim.Token, positions[:79]))
	if s := e.stats("orders", "g"); s.InFlight != 1 {
		t.Errorf("in flight: %+v", s)
	}
	must(t, c.AckMessages(e.ctx, claim.Token, positions[79:]))
	if s := e.stats("orders", "g"); s.InFlight != 0 || s.Lag != 0 {
		t.Errorf("at the end: %+v", s)
	}
	if err := c.Ack(e.ctx, claim.Token); err == nil {
		t.Error("a settled claim could be acked again")
	}
}

// A client of this release works with the functions of the previous one, which have no hot path, and with a statement that has become stale.
func TestFetchingFallsBackToReceive(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		mode   pgstream.Mode
		hot    string
		claims string
		args   string
	}{
		{pgstream.ModeShared, "receive_shared", "claim_next", "integer, regclass, text, text, integer, bigint, text, bigint"},
		{pgstream.ModeOrdered, "receive_ordered", "claim_ordered_1", "text, text, integer, bigint, text, bigint, bigint, boolean"},
	} {
		for _, when := range []string{"before", "meanwhile"} {
			t.Run(string(c.mode)+"/"+when, func(t *testing.T) {
				t.Parallel()
				e := newEngine(t)
				e.stream("orders")
				e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: c.mode})
				if when == "before" {
					e.run("drop function millrace_engine.receive_shared_1, millrace_engine.receive_ordered_1, millrace_engine." + c.claims)
				}
				want := e.publish("orders", 500)
				consumer := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 100})
				var got []int64
				token := ""
				for i := 0; ; i++ {
					claim, err := consumer.AckAndTryReceive(e.ctx, token)
					must(t, err)
					if claim == nil {
						break
					}
					for _, m := range claim.Messages {
						got = append(got, m.Position)
					}
					token = claim.Token
					if when == "meanwhile" && i == 1 { // it has fetched once; the statement that it has prepared is stale now
						e.mutate("millrace_engine."+c.hot+"_1", "millrace_engine."+c.claims+"(", "millrace_engine.claimed(")
						e.run(fmt.Sprintf("alter function millrace_engine.%s(%s) rename to claimed", c.claims, c.args))
					}
				}
				same(t, "received", got, want)
			})
		}
	}
}

// The connection ends after the claim was made and before it was read: the messages come again, also when the pool has no other connection.
func TestConnectionCutBetweenClaimAndFetchLosesNothing(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeShared})
	want := e.publish("orders", 300)
	config := e.Config()
	config.MaxConns = 1
	pool, err := pgxpool.NewWithConfig(e.ctx, config)
	must(t, err)
	t.Cleanup(pool.Close)
	c, err := pgstream.NewConsumer(e.ctx, pool, pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 100})
	must(t, err)
	var got []int64
	token := ""
	for range 2 { // the second claim prepares what the third one runs: preparing would wait for the lock as well, before anything is claimed
		claim, err := c.AckAndTryReceive(e.ctx, token)
		must(t, err)
		token = claim.Token
		got = append(got, positions(claim)...)
	}
	// The reading transaction waits here, behind the lock, and is terminated.
	blocker := e.begin()
	exec(e, blocker, "lock table millrace.orders in access exclusive mode")
	failed := make(chan error, 1)
	go func() {
		_, err := c.AckAndTryReceive(e.ctx, token)
		failed <- err
	}()
	e.eventually("the reading transaction waits and is terminated", func() bool {
		return one[bool](e, `select coalesce(bool_or(pg_terminate_backend(pid)), false) from pg_stat_activity
			where datname = current_database() and wait_event_type = 'Lock' and pid <> pg_backend_pid() and query like '%lateral%'`)
	})
	if err := <-failed; err == nil {
		t.Fatal("the cut was not noticed")
	}
	rollback(e, blocker)
	if n := one[int](e, "select count(*) from millrace_engine.claim where messages > 0"); n != 3 {
		t.Errorf("%d claims were made, not 3: the test proves nothing", n)
	}
	e.jump(time.Minute) // to the end of the claim, if it could not be given back
	same(t, "received", append(got, drain(e, c)...), want)
}

// A session keeps what it has called once. What it keeps for another stream, however long it receives from it, are the two functions and the statements that read messages; a copy of
// the claim, too, made that 1.2 MB, and a receive that found nothing or looked for expired claims 1.9.
func TestASessionServesManyStreams(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	conn := e.connect()
	const streams, claims, most = 10, 20, 800_000
	receive := func(stream string) {
		e.stream(stream)
		e.group(pgstream.GroupSpec{Stream: stream, Name: "g", AckWait: time.Second})
		e.publish(stream, claims)
		token := ""
		receive := func() error {
			return conn.QueryRow(e.ctx, "select claim from millrace.receive($1, 'g', 'm', 1, p_ack => nullif($2, ''))", stream, token).Scan(&token)
		}
		for range claims {
			must(t, receive())
		}
		for range 3 { // to the end of the log, and past the end of the lease
			if err := receive(); !errors.Is(err, pgx.ErrNoRows) {
				t.Fatal(err)
			}
			token = ""
			e.jump(2 * time.Second)
		}
	}
	memory := func() int {
		t.Helper()
		var n int
		must(t, conn.QueryRow(e.ctx, "select sum(total_bytes) from pg_backend_memory_contexts").Scan(&n))
		return n
	}
	receive("first")
	before := memory()
	for i := range streams {
		receive(fmt.Sprintf("other%d", i))
	}
	if each := (memory() - before) / streams; each > most {
		t.Errorf("each stream that a session receives from costs it %d bytes, want at most %d", each, most)
	}
}

// What claim_next checks of the claim to ack is needed: without each check, a claim that has ended is acked by the call that makes the next, or that finds nothing.
func TestHotPathIsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		needs    int                                                   // how many messages that takes, with the first, which other has acked
		ended    func(e *engine, old, other *pgstream.Consumer) string // the token of a claim of old that has ended
		old, new string
	}{
		{"the nonce", 2, func(e *engine, old, other *pgstream.Consumer) string {
			lost := mustReceive(e, old)
			e.forget(lost.Token)
			mustReceive(e, other)
			return lost.Token
		}, "y.nonce = nonce_", "true"},
		{"the settlement of a takeover", 2, func(e *engine, old, other *pgstream.Consumer) string {
			claim := mustReceive(e, old)
			e.jump(2 * time.Second)
			mustReceive(e, other)
			return claim.Token
		}, "y.kind in ('A', 'T', 'R')", "y.kind in ('A', 'R')"},
		{"the claim that settles", 3, func(e *engine, old, _ *pgstream.Consumer) string {
			claim := mustReceive(e, old)
			if _, err := old.AckAndTryReceive(e.ctx, claim.Token); err != nil {
				e.t.Fatal(err)
			}
			return claim.Token
		}, "y.settles is distinct from acked", "true"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			acksEnded := func(e *engine, n int) bool {
				e.stopClock()
				e.stream("orders")
				e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeShared, AckWait: time.Second})
				e.publish("orders", n)
				old := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "old", MaxMessages: 1})
				other := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "other", MaxMessages: 1})
				must(t, other.Ack(e.ctx, mustReceive(e, other).Token)) // the hint of the segment is learned
				_, err := old.AckAndTryReceive(e.ctx, c.ended(e, old, other))
				return err == nil
			}
			for _, n := range []int{10, c.needs} {
				if acksEnded(newEngine(t), n) {
					t.Fatalf("of %d messages a claim that had ended was acked", n)
				}
				e := newEngine(t)
				e.mutate("millrace_engine.claim_next", c.old, c.new)
				if !acksEnded(e, n) {
					t.Errorf("of %d messages nothing was seen without it", n)
				}
			}
		})
	}
}
