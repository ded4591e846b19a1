package pgstream_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func retry(e *engine, arguments string) []string {
	e.t.Helper()
	rows, err := e.Query(e.ctx, "select position || case when due_at is null then ' dead' else '' end from millrace.retry('orders', 'g'"+arguments+")")
	must(e.t, err)
	var got []string
	for rows.Next() {
		var one string
		must(e.t, rows.Scan(&one))
		got = append(got, one)
	}
	must(e.t, rows.Err())
	return got
}

// Whoever settles at the moment of a retry has its messages, or has lost them all: never some of them.
func TestARetryLeavesAloneWhatIsBeingSettled(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, _, _ := twoMembers(t, mode)
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "holder", MaxMessages: 10})
		claim := mustReceive(e, c)
		tx := e.begin()
		must(t, c.AckMessagesTx(e.ctx, tx, claim.Token, []int64{claim.Messages[0].Position}))
		if got := retry(e, ""); len(got) > 0 {
			t.Errorf("taken from under a transaction that acks: %v", got)
		}
		commit(e, tx)
		if got := retry(e, ""); len(got) != len(claim.Messages)-1 {
			t.Errorf("%v was taken of %d messages that are left", got, len(claim.Messages)-1)
		}
		if err := c.Ack(e.ctx, claim.Token); !errors.Is(err, pgstream.ErrFenced) {
			t.Errorf("the ack of a claim that was taken back: %v", err)
		}
	})
}

// Messages that are held for another time are taken back with their claim, too, and those of a parked key stay in order.
func TestARetryOfRetriedMessages(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", MaxAttempts: 3})
	e.publish("orders", 4)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m"})
	must(t, c.Nack(e.ctx, mustReceive(e, c).Token, []int64{1, 2, 3, 4}, 0, "no"))
	claim := mustReceive(e, c)
	if got := retry(e, ", 'm', p_positions => '{2, 3}', p_max => 1"); !slices.Equal(got, []string{"2"}) {
		t.Errorf("taken: %v", got)
	}
	if err := c.AckMessages(e.ctx, claim.Token, []int64{1}); !errors.Is(err, pgstream.ErrFenced) {
		t.Errorf("the ack of a claim that was taken back: %v", err)
	}
	// The second delivery of 2 counts; that of the others does not.
	attempts := map[int64]int{}
	claim = mustReceive(e, c)
	for _, m := range claim.Messages {
		attempts[m.Position] = m.Attempt
	}
	if len(attempts) != 4 || attempts[1] != 2 || attempts[2] != 3 || attempts[4] != 2 {
		t.Errorf("attempts %v", attempts)
	}
	if got := retry(e, ", 'm', p_positions => '{2}'"); !slices.Equal(got, []string{"2 dead"}) {
		t.Errorf("after its last attempt: %v", got)
	}
	if s := e.stats("orders", "g"); s.DeadLetters != 1 || s.Retrying+s.InFlight != 3 {
		t.Errorf("%+v", s)
	}
}

func TestARetryKeepsTheOrderOfAParkedKey(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, FailurePolicy: pgstream.FailurePark})
	e.run("insert into millrace.orders (key, payload) select 'k', to_jsonb(n) from generate_series(1, 3) n")
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "m"})
	must(t, c.Nack(e.ctx, mustReceive(e, c).Token, []int64{1}, never, "no"))
	if got := retry(e, ""); !slices.Equal(got, []string{"1"}) {
		t.Errorf("taken: %v", got)
	}
	for want := int64(1); want <= 3; want++ {
		claim := mustReceive(e, c)
		if got := positions(claim); !slices.Equal(got, []int64{want}) {
			t.Fatalf("delivered %v, want %d", got, want)
		}
		must(t, c.Ack(e.ctx, claim.Token))
	}
}

func TestMessagesOfAHistoryAreNotDeleted(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.accounts()
	e.group(pgstream.GroupSpec{Stream: "accounts", Name: "g"})
	_, err := pgstream.Append(e.ctx, e.Pool, "accounts", "a", 0, events(1, 2))
	must(t, err)
	claim := mustReceive(e, e.consumer(pgstream.ConsumerConfig{Stream: "accounts", Group: "g"}))
	if _, err := e.Exec(e.ctx, "select millrace.delete_messages($1)", claim.Token); sqlState(err) != "MR004" {
		t.Errorf("deleted from a history: %v", err)
	}
	if n := one[int](e, "select count(*) from millrace.accounts"); n != 2 {
		t.Errorf("%d messages are left", n)
	}
}

// A retried message that is deleted goes from the log, too, and from that priority only.
func TestARetriedMessageIsDeletedFromItsLane(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run("select millrace.create_stream('orders', p_priorities => 2), millrace.create_group('orders', 'g')")
	e.run("select millrace.publish('orders', '0'), millrace.publish('orders', '1', p_priority => 1)")
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	must(t, c.Nack(e.ctx, mustReceive(e, c).Token, []int64{1}, 0, "no"))
	claim := mustReceive(e, c)
	if claim.Messages[0].Attempt != 2 || string(claim.Messages[0].Payload) != "1" {
		t.Fatalf("%+v", claim.Messages[0])
	}
	e.run("select millrace.delete_messages($1)", claim.Token)
	if got := one[string](e, `select (select count(*) from millrace.orders) || ' ' || (select count(*) from millrace."orders.p1")`); got != "1 0" {
		t.Errorf("left in the lanes: %s", got)
	}
}
