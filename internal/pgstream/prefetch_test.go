package pgstream_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// next returns the next prefetched message.
func next(e *engine, m *pgstream.Messages) *pgstream.Delivery {
	e.t.Helper()
	d, err := m.Next(e.ctx)
	must(e.t, err)
	return d
}

func TestPrefetchedMessagesAreHandledOnceByManyHandlers(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		want := e.publish("orders", 3000)
		m := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 100}).Prefetch(pgstream.PrefetchConfig{})
		handlers := 8
		if mode == pgstream.ModeOrdered {
			handlers = 1 // one goroutine keeps the order
		}
		var mu sync.Mutex
		var got []int64
		ctx, cancel := context.WithCancel(e.ctx)
		var working sync.WaitGroup
		for range handlers {
			working.Go(func() {
				for {
					d, err := m.Next(ctx)
					if err != nil {
						return
					}
					mu.Lock()
					got = append(got, d.Position)
					enough := len(got) == len(want)
					mu.Unlock()
					d.Ack()
					if enough {
						cancel()
					}
				}
			})
		}
		working.Wait()
		cancel()
		must(t, m.Stop(e.ctx))
		if mode == pgstream.ModeShared {
			got = sorted(got)
		}
		same(t, "handled", got, want)
		if m.Fenced() != 0 {
			t.Errorf("%d claims were fenced", m.Fenced())
		}
		if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 || s.AckFloor != want[len(want)-1] {
			t.Errorf("at the end: %+v", s)
		}
	})
}

func TestStoppingGivesBackWhatWasNotHandled(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		want := e.publish("orders", 10)
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 10})
		m := c.Prefetch(pgstream.PrefetchConfig{FlushInterval: time.Hour})
		for range 4 {
			next(e, m).Ack()
		}
		next(e, m) // never settled
		must(t, m.Stop(e.ctx))
		if _, err := m.Next(e.ctx); err == nil {
			t.Error("a message after the stop")
		}
		claim := mustReceive(e, c)
		same(t, "given back", positions(claim), want[4:])
		if claim.Messages[0].Attempt != 1 {
			t.Errorf("attempt %d: giving back counted", claim.Messages[0].Attempt)
		}
	})
}

// Whether an ack that was cut short has happened is not known, and acking again would look like a claim that was lost.
func TestStoppingWaitsForAcksThatAreUnderWay(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.publish("orders", 1)
	m := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"}).Prefetch(pgstream.PrefetchConfig{FlushInterval: time.Millisecond})
	d := next(e, m)
	tx := e.begin()
	_, err := tx.Exec(e.ctx, "lock table millrace_engine.settlement in exclusive mode")
	must(t, err)
	d.Ack()
	e.eventually("the ack waits", func() bool {
		return one[bool](e, "select exists (select from pg_locks where relation = 'millrace_engine.settlement'::regclass and not granted)")
	})
	ended, end := context.WithCancel(e.ctx)
	end() // so that Stop itself cannot ack
	stopped := make(chan error, 1)
	go func() { stopped <- m.Stop(ended) }()
	for err = nil; err == nil; _, err = m.Next(e.ctx) {
	}
	rollback(e, tx)
	must(t, <-stopped)
	if s := e.stats("orders", "g"); s.InFlight != 0 || s.AckFloor != 1 || m.Fenced() != 0 {
		t.Errorf("after the stop: %+v, %d fenced", s, m.Fenced())
	}
}

func TestWhatIsAckedIsFlushedWhileOthersAreAtWork(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		e.publish("orders", 10)
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 10})
		m := c.Prefetch(pgstream.PrefetchConfig{FlushInterval: time.Millisecond})
		for range 4 {
			next(e, m).Ack()
		}
		slow := next(e, m)
		e.eventually("the four acks are in the database", func() bool { return e.stats("orders", "g").InFlight == 6 })
		slow.Ack()
		for range 5 {
			next(e, m).Ack()
		}
		e.eventually("everything is settled", func() bool {
			s := e.stats("orders", "g")
			return s.InFlight == 0 && s.Lag == 0 && s.AckFloor == 10
		})
		more := e.publish("orders", 1) // and it goes on
		if d := next(e, m); d.Position != more[0] {
			t.Errorf("position %d, want %d", d.Position, more[0])
		}
		must(t, m.Stop(e.ctx))
	})
}

func TestANackedPrefetchedMessageComesAgain(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		e.publish("orders", 4)
		m := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 4, PollInterval: 10 * time.Millisecond}).Prefetch(pgstream.PrefetchConfig{})
		handled := map[int64]int{}
		for len(handled) < 4 || handled[2] < 2 {
			d := next(e, m)
			if handled[d.Position]++; d.Position == 2 && handled[2] == 1 {
				must(t, d.Nack(e.ctx, 0, "not yet"))
				continue
			}
			d.Ack()
		}
		must(t, m.Stop(e.ctx))
		if handled[1] != 1 || handled[2] != 2 {
			t.Errorf("handled %v", handled)
		}
		if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 || s.Retrying != 0 {
			t.Errorf("at the end: %+v", s)
		}
	})
}

func TestPrefetchedClaimsAreExtendedAndAFencedOneIsForgotten(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: 5 * time.Second}) // it is extended at half of that, and a busy machine has as long
		e.publish("orders", 3)
		m := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "slow", MaxMessages: 3}).
			Prefetch(pgstream.PrefetchConfig{FlushInterval: 10 * time.Millisecond})
		slow := next(e, m)
		other := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "other"})
		before := one[int](e, "select count(*) from millrace_engine.settlement where kind = 'E'")
		e.eventually("the claim was extended twice", func() bool {
			if claim := receive(e, other); claim != nil {
				t.Fatalf("%v was taken from a member that is alive", positions(claim))
			}
			return one[int](e, "select count(*) from millrace_engine.settlement where kind = 'E'") >= before+2
		})
		// An operator's reset ends every claim.
		e.run("select millrace.reset_group('orders', 'g', 'Earliest')")
		e.eventually("the end of the claim is noticed", func() bool { return m.Fenced() == 1 })
		slow.Ack() // too late, and harmless
		got := map[int64]bool{}
		for len(got) < 3 {
			d := next(e, m)
			got[d.Position] = true
			d.Ack()
		}
		must(t, m.Stop(e.ctx))
	})
}

func TestPrefetchReportsTroubleOfTheDatabaseAndGoesOn(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	m := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"}).Prefetch(pgstream.PrefetchConfig{})
	e.run("alter function millrace_engine.receive_shared_1(text, text, integer, bigint, text) rename to receive_away")
	if _, err := m.Next(e.ctx); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("without its function: %v", err)
	}
	e.run("alter function millrace_engine.receive_away rename to receive_shared_1")
	want := e.publish("orders", 1)
	for {
		d, err := m.Next(e.ctx)
		if err != nil {
			continue // the fetch that was under way
		}
		if d.Position != want[0] {
			t.Errorf("position %d, want %d", d.Position, want[0])
		}
		d.Ack()
		break
	}
	must(t, m.Stop(e.ctx))
}
