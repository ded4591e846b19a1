package pgstream_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// reset moves the group "g" of the stream "orders" and returns the number of deliveries that it removed.
func (e *engine) reset(to pgstream.Place) int64 {
	e.t.Helper()
	removed, err := pgstream.ResetGroup(e.ctx, e, "orders", "g", to)
	must(e.t, err)
	return removed
}

func TestAResetGroupGoesOnWhereItIsTold(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		e.run("update millrace.orders set created_at = '2020-01-01' where position <= 3")
		all := []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
		for _, c := range []struct {
			name string
			to   pgstream.Place
			want []int64
		}{
			{"earliest", pgstream.Place{From: pgstream.StartEarliest}, all},
			{"earliest by default", pgstream.Place{}, all},
			{"latest", pgstream.Place{From: pgstream.StartLatest}, nil},
			{"a position", pgstream.Place{From: pgstream.StartPosition, Position: 4}, all[3:]},
			{"the next position", pgstream.Place{From: pgstream.StartPosition, Position: 11}, nil},
			{"a time", pgstream.Place{From: pgstream.StartTime, Time: time.Date(2021, 1, 1, 0, 0, 0, 0, time.UTC)}, all[3:]},
			{"a time in the future", pgstream.Place{From: pgstream.StartTime, Time: time.Now().Add(time.Hour)}, nil},
		} {
			e.reset(c.to)
			got := drain(e, old)
			e.jump(time.Second) // Ordered: the lanes of the member that has stopped asking are free
			got = append(got, drain(e, new)...)
			same(t, c.name, sorted(got), c.want)
			if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 || s.AckFloor != 10 {
				t.Errorf("%s: %+v", c.name, s)
			}
		}
		e.reset(pgstream.Place{From: pgstream.StartPosition, Position: 13})
		e.publish("orders", 5)
		e.jump(2 * time.Second)
		same(t, "a position ahead", drain(e, old), []int64{13, 14, 15})
		// The ledgers can be moved on as ever.
		e.reset(pgstream.Place{From: pgstream.StartPosition, Position: 12})
		for range 4 {
			e.turnLedger()
		}
		same(t, "after the ledgers moved on", drain(e, old), []int64{12, 13, 14, 15})
	})
}

func TestAResetEndsEveryClaim(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		claims := openClaims(e, old, new)
		dead := int64(1)
		if removed := e.reset(pgstream.Place{}); removed != map[pgstream.Mode]int64{pgstream.ModeShared: 2}[mode] {
			t.Errorf("%d deliveries were removed", removed)
		}
		for _, token := range claims {
			mustRefuseAll(e, token)
		}
		if s := e.stats("orders", "g"); s.DeadLetters != dead || s.InFlight != 0 || s.Retrying != 0 || s.Lag != 10 {
			t.Errorf("after the reset: %+v", s)
		}
		e.jump(time.Hour) // no old claim or delivery comes back when its time has come
		got := drain(e, old)
		e.jump(time.Second)
		got = append(got, drain(e, new)...)
		same(t, "delivered", sorted(got), []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
		for _, token := range claims {
			mustRefuseAll(e, token)
		}
	})
}

// openClaims leaves claims of every kind open: fresh, with progress, given back, of single deliveries. One message is a dead letter.
func openClaims(e *engine, old, new *pgstream.Consumer) (tokens []string) {
	e.t.Helper()
	small := func(c *pgstream.Consumer) parcel {
		e.t.Helper()
		p := parcel{}
		rows, err := e.Query(e.ctx, `select claim, "position" from millrace.receive('orders', 'g', $1, 2, 30)`, c.Member())
		must(e.t, err)
		var position int64
		_, err = pgx.ForEachRow(rows, []any{&p.token, &position}, func() error {
			p.positions = append(p.positions, position)
			return nil
		})
		must(e.t, err)
		return p
	}
	first := small(old)
	tokens = append(tokens, first.token)
	must(e.t, old.DeadLetter(e.ctx, first.token, first.positions[:1], "bad"))
	if second := small(new); second.token != "" { // Ordered: there is one lane yet
		tokens = append(tokens, second.token)
		must(e.t, new.AckMessages(e.ctx, second.token, second.positions[:1]))
		third := small(new)
		tokens = append(tokens, third.token)
		must(e.t, new.Nack(e.ctx, third.token, third.positions, 0, "again"))
		retry := small(new)
		tokens = append(tokens, retry.token)
		given := small(new)
		tokens = append(tokens, given.token)
		must(e.t, new.Release(e.ctx, given.token))
	}
	return tokens
}

func TestAResetThatDoesNotEndClaimsIsSeen(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, _ := twoMembers(t, mode)
		e.mutate("millrace_engine.move_group", "from millrace_engine.open_claims(l.id, last.floor, last.stragglers) o",
			"from millrace_engine.open_claims(l.id, last.floor, last.stragglers) o where false")
		claim := mustReceive(e, old)
		e.reset(pgstream.Place{})
		if err := old.Ack(e.ctx, claim.Token); err != nil {
			t.Errorf("ack of an old claim: %v; this test proves nothing", err)
		}
	})
}

// Of an ack and a reset that meet, the reset comes second: it waits for the transaction that acks.
func TestAResetWaitsForWhoeverSettles(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		for _, commits := range []bool{true, false} {
			t.Run(fmt.Sprintf("commits %v", commits), func(t *testing.T) {
				t.Parallel()
				e, old, new := twoMembers(t, mode)
				claim := mustReceive(e, old)
				settling, resetting := e.begin(), e.begin()
				must(t, old.AckTx(e.ctx, settling, claim.Token))
				done := e.blocked(pid(resetting), func() error {
					_, err := pgstream.ResetGroup(e.ctx, resetting, "orders", "g", pgstream.Place{From: pgstream.StartLatest})
					return err
				})
				// Meanwhile the group goes on.
				e.publish("orders", 1)
				receive(e, new)
				if commits {
					commit(e, settling)
				} else {
					rollback(e, settling)
				}
				must(t, <-done)
				commit(e, resetting)
				mustRefuseAll(e, claim.Token)
				e.jump(time.Hour)
				same(t, "left", drain(e, new), nil)
			})
		}
	})
}

// And an ack that meets a reset that is under way waits for it, and is refused.
func TestAnAckWaitsForTheReset(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		claim := mustReceive(e, old)
		resetting, settling := e.begin(), e.begin()
		_, err := pgstream.ResetGroup(e.ctx, resetting, "orders", "g", pgstream.Place{})
		must(t, err)
		done := e.blocked(pid(settling), func() error { return old.AckTx(e.ctx, settling, claim.Token) })
		commit(e, resetting)
		mustBeFenced(t, "the ack", <-done)
		rollback(e, settling)
		e.jump(2 * time.Second)
		same(t, "delivered again", drain(e, new), []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
	})
}

func TestAResetThatDoesNotLockClaimsIsSeen(t *testing.T) {
	t.Parallel()
	e, old, _ := twoMembers(t, pgstream.ModeShared)
	e.mutate("millrace_engine.claim_locks", "where g.id = p_group or g.parent_id = p_group", "where false")
	claim := mustReceive(e, old)
	settling, resetting := e.begin(), e.begin()
	must(t, old.AckTx(e.ctx, settling, claim.Token))
	_, err := pgstream.ResetGroup(e.ctx, resetting, "orders", "g", pgstream.Place{})
	must(t, err)
	commit(e, resetting)
	commit(e, settling) // both took effect
}

// Members that ack and receive in one call hold a claim while they wait for the receive lock; a reset must neither meet them in a deadlock
// nor starve. After the last reset everything is delivered exactly once by claims that are younger than it.
func TestResetsAmongBusyMembers(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Minute})
		const messages = 3000
		e.publish("orders", messages)
		var mu sync.Mutex
		acked := map[string][]int64{} // by token
		stop := make(chan struct{})
		var all sync.WaitGroup
		work := func(c *pgstream.Consumer, until func() bool) {
			var held *pgstream.Claim
			for {
				token := ""
				if held != nil {
					token = held.Token
				}
				next, err := c.AckAndTryReceive(e.ctx, token)
				switch {
				case errors.Is(err, pgstream.ErrFenced):
					held = nil
					continue
				case err != nil:
					t.Errorf("%s: %v", c.Member(), err)
					return
				}
				if held != nil {
					mu.Lock()
					acked[held.Token] = positions(held)
					mu.Unlock()
				}
				if held = next; held == nil && until() {
					return
				}
			}
		}
		for i := range 4 {
			c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: fmt.Sprint(i), MaxMessages: 20})
			all.Go(func() {
				work(c, func() bool {
					select {
					case <-stop:
						return true
					default:
						return false
					}
				})
				_ = c.Leave(e.ctx)
			})
		}
		for i := range 14 {
			e.reset(pgstream.Place{From: pgstream.StartPosition, Position: int64(1 + 10*i)})
		}
		// The last one notes, while nobody can claim, which claims of which lanes are old. Lanes with a higher number are made later.
		last := e.begin()
		_, err := pgstream.ResetGroup(e.ctx, last, "orders", "g", pgstream.Place{From: pgstream.StartPosition, Position: 141})
		must(t, err)
		var lane, claim, highest int64
		must(t, last.QueryRow(e.ctx, "select last_value from millrace_engine.lane_id_seq").Scan(&highest))
		old := map[int64]int64{}
		rows, err := last.Query(e.ctx, "select l.id, max(c.claim) from millrace_engine.lane l join millrace_engine.claim c on c.lane_id = l.id group by l.id")
		must(t, err)
		_, err = pgx.ForEachRow(rows, []any{&lane, &claim}, func() error { old[lane] = claim; return nil })
		must(t, err)
		commit(e, last)
		close(stop)
		all.Wait()
		rest := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "last"})
		work(rest, func() bool { return true })
		var got []int64
		for token, ps := range acked {
			lane, number := tokenParts(token)
			if after, known := old[lane]; lane > highest || (known && number > after) {
				got = append(got, ps...)
			}
		}
		want := make([]int64, 0, messages)
		for p := int64(141); p <= messages; p++ {
			want = append(want, p)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%d messages were settled by claims after the last reset, want each of %d once", len(got), len(want))
		}
	})
}

func TestAResetReachesEveryPriority(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stopClock()
		e.prioritized(mode)
		e.publishAt(0, 1, 2)
		e.publishAt(1, 11)
		e.publishAt(2, 21, 22)
		same(t, "at first", e.drainSQL("m", 10), []int{21, 22, 11, 1, 2})
		e.reset(pgstream.Place{})
		p := e.mustReceiveSQL("m", 1, "")
		same(t, "again", p.numbers, []int{21})
		e.reset(pgstream.Place{From: pgstream.StartPosition, Position: 2})
		mustRefuseAll(e, p.token)
		same(t, "by position", e.drainSQL("m", 10), []int{21, 22, 11, 2})
		e.reset(pgstream.Place{From: pgstream.StartLatest})
		same(t, "from now on", e.drainSQL("m", 10), nil)
		if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestAResetEndsALapse(t *testing.T) {
	t.Parallel()
	e, old, _ := twoMembers(t, pgstream.ModeShared)
	e.run("update millrace_engine.consumer_group set lapsed_at = now(), lapse_reason = 'too slow'")
	info, err := pgstream.DescribeGroup(e.ctx, e, "orders", "g")
	must(t, err)
	if info.LapsedAt.IsZero() || info.LapseReason != "too slow" {
		t.Errorf("described as %+v", info)
	}
	if _, err := old.TryReceive(e.ctx); !errors.Is(err, pgstream.ErrLapsed) {
		t.Errorf("receive: %v; want ErrLapsed", err)
	}
	e.reset(pgstream.Place{})
	if info, err = pgstream.DescribeGroup(e.ctx, e, "orders", "g"); err != nil || !info.LapsedAt.IsZero() || info.LapseReason != "" {
		t.Errorf("described as %+v, %v", info, err)
	}
	if got := drain(e, old); len(got) != 10 {
		t.Errorf("got %v", got)
	}
}

func TestAResetSaysWhatIsNotPossible(t *testing.T) {
	t.Parallel()
	e, _, _ := twoMembers(t, pgstream.ModeShared)
	e.run("update millrace_engine.stream set first_position = 4")
	for _, c := range []struct{ what, sql, state string }{
		{"an unknown stream", "select millrace.reset_group('nothing', 'g', 'Latest')", "MR002"},
		{"an unknown group", "select millrace.reset_group('orders', 'nothing', 'Latest')", "MR002"},
		{"an unknown place", "select millrace.reset_group('orders', 'g', 'Somewhere')", "MR004"},
		{"no place", "select millrace.reset_group('orders', 'g', null)", "MR004"},
		{"no position", "select millrace.reset_group('orders', 'g', 'Position')", "MR004"},
		{"no time", "select millrace.reset_group('orders', 'g', 'Time')", "MR004"},
		{"what was removed", "select millrace.reset_group('orders', 'g', 'Position', 3)", "MR008"},
	} {
		_, err := e.Exec(e.ctx, c.sql)
		if sqlState(err) != c.state || hint(err) == "" {
			t.Errorf("%s: %v, hint %q; want %s and a hint", c.what, err, hint(err), c.state)
		}
	}
	if _, err := pgstream.ResetGroup(e.ctx, e, "orders", "g", pgstream.Place{From: pgstream.StartPosition, Position: 3}); !errors.Is(err, pgstream.ErrOutOfRange) {
		t.Errorf("in Go: %v; want ErrOutOfRange", err)
	}
	tx := e.beginAs(pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if _, err := tx.Exec(e.ctx, "select millrace.reset_group('orders', 'g', 'Latest')"); sqlState(err) != "MR003" {
		t.Errorf("at repeatable read: %v; want MR003", err)
	}
	// What is left can be had, also of a group that a resource owns.
	e.run(`update millrace_engine.consumer_group set owner = '{"name": "somebody"}'`)
	e.reset(pgstream.Place{From: pgstream.StartPosition, Position: 4})
}
