package pgstream_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// twoMembers is a group with ten messages and two members, "old" and "new", whose claims last a second of the engine's clock.
func twoMembers(t *testing.T, mode pgstream.Mode) (e *engine, old, new *pgstream.Consumer) {
	t.Helper()
	e = newEngine(t)
	old, new = e.twoMembers("orders", mode)
	return e, old, new
}

func (e *engine) twoMembers(stream string, mode pgstream.Mode) (old, new *pgstream.Consumer) {
	e.t.Helper()
	e.stopClock()
	e.stream(stream)
	e.group(pgstream.GroupSpec{Stream: stream, Name: "g", Mode: mode, AckWait: time.Second})
	e.publish(stream, 10)
	old = e.consumer(pgstream.ConsumerConfig{Stream: stream, Group: "g", Member: "old"})
	new = e.consumer(pgstream.ConsumerConfig{Stream: stream, Group: "g", Member: "new"})
	return old, new
}

func inBothModes(t *testing.T, f func(t *testing.T, mode pgstream.Mode)) {
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			f(t, mode)
		})
	}
}

// verbs are all the ways to use a claim. Each must be refused when the claim has ended.
var verbs = []struct {
	name string
	use  func(e *engine, db pgstream.DB, token string) error
}{
	{"ack", func(e *engine, db pgstream.DB, token string) error {
		_, err := db.Exec(e.ctx, "select millrace.ack($1)", token)
		return err
	}},
	{"ack_messages", func(e *engine, db pgstream.DB, token string) error {
		_, err := db.Exec(e.ctx, "select millrace.ack_messages($1, array[1]::bigint[])", token)
		return err
	}},
	{"nack", func(e *engine, db pgstream.DB, token string) error {
		_, err := db.Exec(e.ctx, "select millrace.nack($1, array[1]::bigint[], 0, 'no')", token)
		return err
	}},
	{"dead_letter", func(e *engine, db pgstream.DB, token string) error {
		_, err := db.Exec(e.ctx, "select millrace.dead_letter($1, array[1]::bigint[], 'no')", token)
		return err
	}},
	{"extend", func(e *engine, db pgstream.DB, token string) error {
		_, err := db.Exec(e.ctx, "select millrace.extend($1, 60)", token)
		return err
	}},
	{"release", func(e *engine, db pgstream.DB, token string) error {
		_, err := db.Exec(e.ctx, "select millrace.release($1)", token)
		return err
	}},
}

// mustRefuseAll fails the test unless the token is good for nothing.
func mustRefuseAll(e *engine, token string) {
	e.t.Helper()
	for _, v := range verbs {
		if err := v.use(e, e, token); sqlState(err) != "MR001" {
			e.t.Errorf("%s with the token of an ended claim: %v; want MR001", v.name, err)
		}
	}
}

func TestAClaimThatWasTakenOverIsGoodForNothing(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		lost := mustReceive(e, old)
		if again := receive(e, new); again != nil {
			t.Fatalf("%v were handed out twice", positions(again))
		}
		e.jump(2 * time.Second)
		claim := mustReceive(e, new)
		same(t, "taken over", positions(claim), positions(lost))
		if a := claim.Messages[0].Attempt; a != 2 {
			t.Errorf("attempt %d, want 2", a)
		}
		mustRefuseAll(e, lost.Token)
		_, err := old.AckAndTryReceive(e.ctx, lost.Token)
		mustBeFenced(t, "AckAndTryReceive", err)
		mustBeFenced(t, "Ack", old.Ack(e.ctx, lost.Token))
		// None of it hurt the new owner.
		must(t, new.Ack(e.ctx, claim.Token))
		mustRefuseAll(e, claim.Token)
		same(t, "left", drain(e, new), nil)
	})
}

func TestAnExpiredClaimWorksUntilSomebodyTakesItOver(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		claim := mustReceive(e, old)
		e.jump(time.Hour)
		must(t, old.Ack(e.ctx, claim.Token))
		same(t, "left", drain(e, new), nil)
	})
}

func TestAReleasedClaimsTokenDoesNotWork(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		claim := mustReceive(e, old)
		must(t, old.Release(e.ctx, claim.Token))
		mustRefuseAll(e, claim.Token)
		must(t, old.Leave(e.ctx))
		again := mustReceive(e, new)
		same(t, "after the release", positions(again), positions(claim))
		if a := again.Messages[0].Attempt; a != 1 {
			t.Errorf("attempt %d, want 1: a release does not count", a)
		}
		mustRefuseAll(e, claim.Token)
		must(t, new.Ack(e.ctx, again.Token))
	})
}

// A transactional ack that has not committed yet stands against a take-over, whoever comes first.
func TestAckAndTakeoverExcludeEachOther(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		for _, v := range verbs[:4] {
			t.Run(v.name+" is open when another member receives", func(t *testing.T) {
				t.Parallel()
				e := newEngine(t)
				for _, end := range []string{"commit", "rollback"} {
					old, new := e.twoMembers("with_"+end, mode)
					claim := mustReceive(e, old)
					tx := e.begin()
					must(t, v.use(e, tx, claim.Token))
					e.jump(2 * time.Second)
					if again := receive(e, new); again != nil {
						t.Fatalf("%v were handed out while their claim was being settled", positions(again))
					}
					exec(e, tx, end)
					if end == "rollback" {
						same(t, "after the rollback", positions(mustReceive(e, new)), positions(claim))
						mustRefuseAll(e, claim.Token)
						continue
					}
					if v.name == "ack" {
						same(t, "left after the ack", drain(e, new), nil)
					}
				}
			})
		}
		t.Run("another member receives before the ack", func(t *testing.T) {
			t.Parallel()
			e, old, new := twoMembers(t, mode)
			claim := mustReceive(e, old)
			e.jump(2 * time.Second)
			taking := e.begin()
			rows, err := taking.Query(e.ctx, "select claim from millrace.receive('orders', 'g', 'new')")
			must(t, err)
			tokens, err := pgx.CollectRows(rows, pgx.RowTo[string])
			must(t, err)
			if len(tokens) != 10 {
				t.Fatalf("%d messages were taken over", len(tokens))
			}
			acking := e.begin()
			done := e.blocked(pid(acking), func() error { return old.AckTx(e.ctx, acking, claim.Token) }) // it must not decide before the take-over has
			commit(e, taking)
			mustBeFenced(t, "the ack that waited", <-done)
			must(t, new.Ack(e.ctx, tokens[0]))
		})
		t.Run("the take-over is rolled back", func(t *testing.T) {
			t.Parallel()
			e, old, _ := twoMembers(t, mode)
			claim := mustReceive(e, old)
			e.jump(2 * time.Second)
			taking := e.begin()
			exec(e, taking, "select claim from millrace.receive('orders', 'g', 'new')")
			acking := e.begin()
			done := e.blocked(pid(acking), func() error { return old.AckTx(e.ctx, acking, claim.Token) })
			rollback(e, taking)
			must(t, <-done)
			commit(e, acking)
		})
	})
}

// The sink's transaction may have begun, and have its snapshot, long before the ack.
func TestATransactionalAckSeesATakeoverThatItsSnapshotDoesNot(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		for _, level := range []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable} {
			t.Run(string(level), func(t *testing.T) {
				t.Parallel()
				e := newEngine(t)
				e.run("create table public.sink (token text)")
				for _, v := range verbs {
					old, new := e.twoMembers(v.name, mode)
					claim := mustReceive(e, old)
					tx := e.beginAs(pgx.TxOptions{IsoLevel: level})
					exec(e, tx, "insert into public.sink values ($1)", claim.Token)
					e.jump(2 * time.Second)
					again := mustReceive(e, new)
					err := v.use(e, tx, claim.Token)
					if err == nil {
						err = tx.Commit(e.ctx)
					}
					if err == nil {
						t.Errorf("%s took effect after another member had taken the messages over", v.name)
					}
					must(t, new.Ack(e.ctx, again.Token))
				}
			})
		}
	})
}

func TestEffectAndAckCommitTogether(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, c, _ := twoMembers(t, mode)
		e.run("create table public.sink (position bigint primary key)")
		claim := mustReceive(e, c)
		apply := func() pgx.Tx {
			tx := e.begin()
			for _, p := range positions(claim) {
				exec(e, tx, "insert into public.sink values ($1)", p)
			}
			must(t, c.AckTx(e.ctx, tx, claim.Token))
			return tx
		}
		rollback(e, apply())
		if n := one[int](e, "select count(*) from public.sink"); n != 0 {
			t.Fatalf("%d rows after the rollback", n)
		}
		commit(e, apply())
		if n := one[int](e, "select count(*) from public.sink"); n != 10 {
			t.Fatalf("%d rows after the commit", n)
		}
		mustBeFenced(t, "a second ack", c.Ack(e.ctx, claim.Token))
		same(t, "left", drain(e, c), nil)
	})
}

// After a crash the newest claims, committed asynchronously, may be lost and their numbers given to others. The holder of a lost claim
// must not settle the claim that has its number now.
func TestTheHolderOfALostClaimCannotSettleItsSuccessor(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		lost := mustReceive(e, old)
		e.forget(lost.Token)
		if mode == pgstream.ModeOrdered {
			e.run("update millrace_engine.lane set member = null")
			e.run("delete from millrace_engine.member")
		}
		claim := mustReceive(e, new)
		same(t, "delivered again", positions(claim), positions(lost))
		var number [2]string
		for i, token := range []string{lost.Token, claim.Token} {
			number[i] = one[string](e, "select string_agg(x, '.' order by n) from unnest(string_to_array($1, '.')) with ordinality u(x, n) where n < 4", token)
		}
		if number[0] != number[1] || lost.Token == claim.Token {
			t.Fatalf("tokens %s and %s: the number was to be used again with another nonce", lost.Token, claim.Token)
		}
		mustRefuseAll(e, lost.Token)
		must(t, new.Ack(e.ctx, claim.Token))
		same(t, "left", drain(e, new), nil)
	})
}

func TestTheLastPartialAckSettlesTheClaim(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		gap := e.begin()
		publishIn(e, gap, "orders")
		rollback(e, gap) // position 11 does not exist
		e.publish("orders", 5)
		claim := mustReceive(e, old)
		all := positions(claim)
		if len(all) != 15 {
			t.Fatalf("claimed %v", all)
		}
		must(t, old.AckMessages(e.ctx, claim.Token, all[3:9]))
		mustBeFenced(t, "a second ack of the same messages", old.AckMessages(e.ctx, claim.Token, all[8:10]))
		must(t, old.AckMessages(e.ctx, claim.Token, nil))
		if s := e.stats("orders", "g"); s.InFlight != 9 || s.Lag != 0 {
			t.Errorf("in flight %d, lag %d; want 9, 0", s.InFlight, s.Lag)
		}
		must(t, old.AckMessages(e.ctx, claim.Token, append(all[9:], all[:3]...)))
		mustRefuseAll(e, claim.Token)
		if s := e.stats("orders", "g"); s.InFlight != 0 || s.AckFloor != 16 {
			t.Errorf("in flight %d, ack floor %d; want 0, 16", s.InFlight, s.AckFloor)
		}
		e.jump(time.Hour)
		same(t, "left", drain(e, new), nil)
	})
}

func TestPartialAcksOutliveTheClaim(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		claim := mustReceive(e, old)
		all := positions(claim)
		must(t, old.AckMessages(e.ctx, claim.Token, all[2:6]))
		e.jump(2 * time.Second)
		second := mustReceive(e, new)
		same(t, "after the first expiry", positions(second), append(append([]int64{}, all[:2]...), all[6:]...))
		if s := e.stats("orders", "g"); s.InFlight != 6 {
			t.Errorf("in flight %d, want 6", s.InFlight)
		}
		must(t, new.AckMessages(e.ctx, second.Token, all[:1]))
		if s := e.stats("orders", "g"); s.InFlight != 5 {
			t.Errorf("in flight %d, want 5", s.InFlight)
		}
		e.jump(2 * time.Second)
		must(t, new.Leave(e.ctx))
		same(t, "after the second", sorted(drain(e, old)), append(append([]int64{}, all[1:2]...), all[6:]...))
	})
}

func TestAMessageThatWasAckedCannotBeGivenBack(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, c, _ := twoMembers(t, mode)
		claim := mustReceive(e, c)
		all := positions(claim)
		must(t, c.AckMessages(e.ctx, claim.Token, all[:5]))
		// A careless client; what it acked stays acked.
		must(t, c.DeadLetter(e.ctx, claim.Token, all[4:5], "no"))
		must(t, c.Nack(e.ctx, claim.Token, all[:7], 0, "no"))
		var got []int64
		for {
			again, err := c.TryReceive(e.ctx)
			must(t, err)
			if again == nil {
				break
			}
			got = append(got, positions(again)...)
			must(t, c.Ack(e.ctx, again.Token))
		}
		want := all[5:]
		if mode == pgstream.ModeShared {
			want = all[5:7] // the rest is still held
		}
		same(t, "delivered again", got, want)
		if n := e.stats("orders", "g").DeadLetters; n != 0 {
			t.Errorf("%d acked messages became dead letters", n)
		}
	})
}

func TestWhatAClaimDoesNotHoldIsRefused(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, c, _ := twoMembers(t, mode)
		claim := mustReceive(e, c)
		for _, positions := range [][]int64{{0}, {11}, {1, 2, 11}, {-1}} {
			for what, err := range map[string]error{
				"AckMessages": c.AckMessages(e.ctx, claim.Token, positions),
				"DeadLetter":  c.DeadLetter(e.ctx, claim.Token, positions, "no"),
			} {
				if !errors.Is(err, pgstream.ErrRefused) {
					t.Errorf("%s of %v: %v; want ErrRefused", what, positions, err)
				}
			}
		}
		for _, token := range []string{"", "x", "1.2.3", "1.2.3.4.5", claim.Token + " ", "1.2.3.-4", "99999999999.1.1.1"} {
			if err := c.Ack(e.ctx, token); !errors.Is(err, pgstream.ErrRefused) {
				t.Errorf("token %q: %v; want ErrRefused", token, err)
			}
		}
		var g, l, n, nonce int64
		_, err := fmt.Sscanf(claim.Token, "%d.%d.%d.%d", &g, &l, &n, &nonce)
		must(t, err)
		// The rows that open a lane, and those that carry it over to the next ring, have nonce 0.
		if err := c.Ack(e.ctx, fmt.Sprintf("%d.%d.0.0", g, l)); !errors.Is(err, pgstream.ErrRefused) {
			t.Errorf("the row that opened the lane: %v; want ErrRefused", err)
		}
		for _, forged := range []string{
			fmt.Sprintf("%d.%d.%d.%d", g, l, n, nonce+1),
			fmt.Sprintf("%d.%d.%d.%d", g, l, n+1, nonce),
			fmt.Sprintf("%d.%d.%d.%d", g, l+1, n, nonce),
			fmt.Sprintf("%d.0.0.%d", g, nonce),
		} {
			mustRefuseAll(e, forged)
		}
		must(t, c.Ack(e.ctx, claim.Token))
	})
}

func TestAckAndReceiveIsOneStep(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, new := twoMembers(t, mode)
		claim := mustReceive(e, old)
		e.publish("orders", 3)
		next, err := old.AckAndTryReceive(e.ctx, claim.Token)
		must(t, err)
		same(t, "next", positions(next), []int64{11, 12, 13})
		// An ack that fails takes the receive with it.
		e.publish("orders", 1)
		_, err = old.AckAndTryReceive(e.ctx, claim.Token)
		mustBeFenced(t, "a second ack", err)
		// Being fenced is normal, so it must not cost a connection.
		before := e.Stat().NewConnsCount()
		for range 5 {
			_, err = old.AckAndTryReceive(e.ctx, claim.Token)
			mustBeFenced(t, "the same again", err)
		}
		if n := e.Stat().NewConnsCount() - before; n > 0 {
			t.Errorf("five fenced acks cost %d connections", n)
		}
		must(t, old.Ack(e.ctx, next.Token))
		must(t, old.Leave(e.ctx))
		same(t, "left", drain(e, new), []int64{14})
	})
}

func TestASlowSinkDoesNotKeepOthersFromReceiving(t *testing.T) {
	t.Parallel()
	e, old, new := twoMembers(t, pgstream.ModeShared)
	claim := mustReceive(e, old)
	tx := e.begin()
	must(t, old.AckTx(e.ctx, tx, claim.Token))
	e.publish("orders", 3)
	e.jump(2 * time.Second) // the claim has expired and cannot be taken over now
	ctx, cancel := context.WithTimeout(e.ctx, patience)
	defer cancel()
	next, err := new.TryReceive(ctx)
	must(t, err)
	same(t, "meanwhile", positions(next), []int64{11, 12, 13})
	commit(e, tx)
	must(t, new.Ack(e.ctx, next.Token))
	e.jump(time.Hour)
	same(t, "left", drain(e, new), nil)
}

// A claim of messages that are retried is a unit too: whoever lost one of them must not commit the effects of all.
func TestAClaimOfRetriedMessagesIsLostAsAWhole(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	for _, v := range verbs {
		old, _ := e.twoMembers(v.name, pgstream.ModeShared)
		claim := mustReceive(e, old)
		must(t, old.Nack(e.ctx, claim.Token, []int64{1, 2, 3}, 0, "again"))
		must(t, old.Ack(e.ctx, claim.Token))
		lost := mustReceive(e, old)
		same(t, "retried", sorted(positions(lost)), []int64{1, 2, 3})

		one := e.consumer(pgstream.ConsumerConfig{Stream: v.name, Group: "g", Member: "new", MaxMessages: 1})
		tx := e.begin()
		must(t, v.use(e, tx, lost.Token))
		e.jump(2 * time.Second)
		same(t, "while the claim is being settled", positions(receive(e, one)), nil)
		rollback(e, tx)
		taken := mustReceive(e, one)
		if len(taken.Messages) != 1 {
			t.Fatalf("%s: took over %v", v.name, positions(taken))
		}
		mustRefuseAll(e, lost.Token)
		rest := mustReceive(e, old)
		if len(rest.Messages) != 2 || rest.Token == lost.Token {
			t.Errorf("%s: the others: %v", v.name, positions(rest))
		}
		must(t, old.Ack(e.ctx, rest.Token))
		must(t, one.Ack(e.ctx, taken.Token))
		e.jump(time.Minute)
		same(t, "left", drain(e, old), nil)
	}
}

// A commit whose answer was lost is tried again while the first transaction may still be open. Both hold the token; one effect may remain.
func TestTwoTransactionsOfOneMemberSettleAMessageOnce(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		for _, v := range verbs[:2] {
			t.Run(v.name, func(t *testing.T) {
				t.Parallel()
				e, member, _ := twoMembers(t, mode)
				claim := mustReceive(e, member)
				first, second := e.begin(), e.begin()
				must(t, v.use(e, first, claim.Token))
				waiting := e.blocked(pid(second), func() error { return v.use(e, second, claim.Token) })
				exec(e, first, "commit")
				if err := <-waiting; sqlState(err) != "MR001" {
					t.Errorf("the second settled the same messages: %v", err)
				}
			})
		}
	})
}
