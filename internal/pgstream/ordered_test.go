package pgstream_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func TestABlockedMessageIsRetriedInPlace(t *testing.T) {
	t.Parallel()
	e, c, new := twoMembers(t, pgstream.ModeOrdered)
	claim := mustReceive(e, c)
	must(t, c.AckMessages(e.ctx, claim.Token, []int64{1, 2, 7}))
	must(t, c.Nack(e.ctx, claim.Token, []int64{3}, 10*time.Second, "busy"))
	mustRefuseAll(e, claim.Token)
	e.jump(9 * time.Second)
	same(t, "before the delay is over", append(positions(receive(e, c)), positions(receive(e, new))...), nil)
	must(t, new.Leave(e.ctx))
	e.jump(time.Second)
	again := mustReceive(e, c)
	same(t, "after it, without what was acked", positions(again), []int64{3, 4, 5, 6, 8, 9, 10})
	if a := again.Messages[0].Attempt; a != 2 {
		t.Errorf("attempt %d, want 2", a)
	}
	must(t, c.Ack(e.ctx, again.Token))
	same(t, "left", drain(e, c), nil)
}

func TestSkipMakesADeadLetterAndGoesOn(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, MaxAttempts: 3, FailurePolicy: pgstream.FailureSkip})
	e.publish("orders", 6)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	var done []int64
	for {
		claim := receive(e, c)
		if claim == nil {
			break
		}
		good := positions(claim)
		if i := slices.Index(good, 3); i >= 0 {
			good = good[:i]
			must(t, c.AckMessages(e.ctx, claim.Token, good))
			must(t, c.Nack(e.ctx, claim.Token, []int64{3}, 0, "cannot"))
		} else {
			must(t, c.Ack(e.ctx, claim.Token))
		}
		done = append(done, good...)
	}
	same(t, "handled", done, []int64{1, 2, 4, 5, 6})
	if s := e.stats("orders", "g"); s.DeadLetters != 1 || s.Lag != 0 || s.InFlight != 0 {
		t.Errorf("%+v", s)
	}
	if a := one[int](e, `select attempts from millrace_engine.dead_letter where "position" = 3`); a != 3 {
		t.Errorf("%d attempts, want 3", a)
	}
}

func TestAPartitionHasOneOwner(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Partitions: 4}}))
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, AckWait: time.Minute})
	shares := func(members int) (sizes []int) {
		t.Helper()
		seen := map[int32]string{}
		s := e.stats("orders", "g")
		if len(s.Members) != members {
			t.Fatalf("%d members, want %d", len(s.Members), members)
		}
		for _, m := range s.Members {
			for _, p := range m.Partitions {
				if seen[p] != "" {
					t.Errorf("partition %d belongs to %s and %s", p, seen[p], m.Name)
				}
				seen[p] = m.Name
			}
			sizes = append(sizes, len(m.Partitions))
		}
		slices.Sort(sizes)
		return sizes
	}
	var members []*pgstream.Consumer
	join := func() {
		members = append(members, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: fmt.Sprintf("m%d", len(members))}))
	}
	settle := func() { // every member looks a few times, as it would while it polls
		for range 3 {
			for _, m := range members {
				if claim := receive(e, m); claim != nil {
					must(t, m.Ack(e.ctx, claim.Token))
				}
			}
		}
	}
	for n, want := range [][]int{{4}, {2, 2}, {1, 1, 2}, {1, 1, 1, 1}, {0, 1, 1, 1, 1}, {0, 0, 1, 1, 1, 1}} {
		join()
		settle()
		same(t, fmt.Sprintf("shares of %d members", n+1), shares(n+1), want)
		for i := range 20 {
			e.run("insert into millrace.orders (key, payload) values ($1, '{}')", fmt.Sprint(i))
		}
		settle()
		if s := e.stats("orders", "g"); s.Lag != 0 {
			t.Fatalf("%d messages were not handed to any of %d members", s.Lag, n+1)
		}
	}
	// Two leave, one dies; the others take all over.
	must(t, members[0].Leave(e.ctx))
	must(t, members[4].Leave(e.ctx))
	members = []*pgstream.Consumer{members[1], members[2], members[5]}
	for range 4 {
		e.jump(20 * time.Second)
		settle()
	}
	same(t, "shares after a death", shares(3), []int{1, 1, 2})

	// More partitions while everything runs.
	plan, err := pgstream.PlanStream(e.ctx, e, pgstream.StreamSpec{Name: "orders", Partitions: 12})
	must(t, err)
	must(t, pgstream.ApplyStream(e.ctx, e, plan))
	settle()
	same(t, "shares of twelve partitions", shares(3), []int{4, 4, 4})
	if n := one[int](e, "select count(*) from millrace_engine.lane"); n > 6 {
		t.Errorf("%d lanes for three members: idle neighbours were not merged", n)
	}
}

func TestAckedAheadStaysAckedWhenLanesAreSplit(t *testing.T) {
	t.Parallel()
	want := []int64{2, 3, 7, 8, 10}
	same(t, "delivered", ackedAhead(newEngine(t)), want)
	e := newEngine(t)
	e.mutate("millrace_engine.split_lane", "p_member end, p_settled)", "p_member end)")
	if got := ackedAhead(e); len(got) <= len(want) {
		t.Errorf("lanes that forget what was acked ahead: delivered %v, and nobody noticed", got)
	}
}

// ackedAhead acks messages beyond the place where the lane stands, lets members split and merge it, and returns what is delivered then.
func ackedAhead(e *engine) []int64 {
	t := e.t
	t.Helper()
	c, _ := e.twoMembers("orders", pgstream.ModeOrdered)
	claim := mustReceive(e, c)
	must(t, c.AckMessages(e.ctx, claim.Token, []int64{4, 5, 6, 9}))
	must(t, c.Nack(e.ctx, claim.Token, []int64{1}, 0, "no"))
	must(t, c.Nack(e.ctx, mustReceive(e, c).Token, []int64{1}, 0, "no"))
	alone := mustReceive(e, c) // one message at a time by now
	same(t, "cut down", positions(alone), []int64{1})
	must(t, c.Ack(e.ctx, alone.Token))
	// The lane is idle with some of its future settled. Others join and split it, leave, and it is merged again.
	var got []int64
	for round := range 6 {
		for i := range 4 {
			m := c
			if i < 3 {
				m = e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: fmt.Sprintf("m%d", i)})
			}
			if claim := receive(e, m); claim != nil {
				got = append(got, positions(claim)...)
				must(t, m.Ack(e.ctx, claim.Token))
			}
			if m != c && round%3 == 2 {
				must(t, m.Leave(e.ctx))
			}
		}
	}
	must(t, c.Leave(e.ctx))
	got = append(got, drain(e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "last"}))...)
	return sorted(got)
}

func TestAZombieOwnerCannotSettle(t *testing.T) {
	t.Parallel()
	e, old, new := twoMembers(t, pgstream.ModeOrdered)
	e.run("create table public.sink (position bigint primary key)")
	claim := mustReceive(e, old)
	zombie := e.begin()
	exec(e, zombie, "insert into public.sink select unnest($1::bigint[])", positions(claim)[:5])
	// It stops here, for longer than its lease and its membership.
	e.jump(time.Minute)
	taken := mustReceive(e, new)
	same(t, "taken over", positions(taken), positions(claim))
	mustBeFenced(t, "the zombie's ack", old.AckTx(e.ctx, zombie, claim.Token))
	rollback(e, zombie)
	tx := e.begin()
	exec(e, tx, "insert into public.sink select unnest($1::bigint[])", positions(taken))
	must(t, new.AckTx(e.ctx, tx, taken.Token))
	commit(e, tx)
	// It may join again and go on with what is new.
	e.publish("orders", 40)
	got := append(drain(e, old), drain(e, new)...)
	got = append(got, drain(e, old)...)
	got = append(got, drain(e, new)...)
	if len(got) != 40 {
		t.Errorf("%d messages after that, want 40", len(got))
	}
}

// keyOrder checks invariant 2: what is acked of a key is acked in position order, and nobody handles a key while another one does.
type keyOrder struct {
	mu      sync.Mutex
	done    map[string]int64 // by key: the last position that was handled
	handled map[int64]int
	holder  map[string]string
	broken  []string
}

func newKeyOrder() *keyOrder {
	return &keyOrder{done: map[string]int64{}, handled: map[int64]int{}, holder: map[string]string{}}
}

// handle is called for every message just before its claim is acked; begin and end frame a claim.
func (o *keyOrder) begin(member string, claim *pgstream.Claim) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, m := range claim.Messages {
		if h := o.holder[*m.Key]; h != "" && h != member {
			o.broken = append(o.broken, fmt.Sprintf("key %s is held by %s and by %s", *m.Key, h, member))
		}
		o.holder[*m.Key] = member
	}
}

func (o *keyOrder) end(claim *pgstream.Claim, acked bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, m := range claim.Messages {
		o.holder[*m.Key] = ""
		if !acked {
			continue
		}
		if last := o.done[*m.Key]; m.Position <= last {
			o.broken = append(o.broken, fmt.Sprintf("position %d of key %s was handled after %d", m.Position, *m.Key, last))
		}
		o.done[*m.Key] = m.Position
		o.handled[m.Position]++
	}
}

// Members join, leave and die by chance while messages with few keys are published, the partitions are raised, and upkeep runs.
func TestAKeysOrderOutlivesEveryRebalance(t *testing.T) {
	t.Parallel()
	r := random(t)
	length := soak(t, 2*time.Second)
	e := newEngine(t)
	e.extendDeadline(length)
	must(t, pgstream.ApplyStream(e.ctx, e, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Partitions: 3}}))
	// Leases are long: whoever dies leaves its claim behind and is declared dead by a jump of the clock, below.
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: pgstream.ModeOrdered, AckWait: 10 * time.Minute})
	ctx, cancel := context.WithTimeout(e.ctx, length)
	defer cancel()
	failed := make(chan error, 100)
	order := newKeyOrder()
	var published atomic.Int64
	var publishers, members sync.WaitGroup
	for range 2 {
		own := rand.New(rand.NewPCG(r.Uint64(), r.Uint64()))
		publishers.Go(func() {
			for ctx.Err() == nil {
				ms := make([]pgstream.NewMessage, 1+own.IntN(20))
				for i := range ms {
					key := fmt.Sprintf("k%d", own.IntN(12))
					ms[i] = pgstream.NewMessage{Key: &key, Payload: []byte(`{}`)}
				}
				if _, err := pgstream.PublishBatch(e.ctx, e.Pool, "orders", ms); err != nil {
					failed <- err
					return
				}
				published.Add(int64(len(ms)))
			}
		})
	}
	partitions := 3
	publishers.Go(func() {
		for ctx.Err() == nil && partitions < 64 {
			partitions += 1 + partitions/3
			if err := pgstream.ApplyStream(e.ctx, e.Pool, pgstream.Plan{Spec: pgstream.StreamSpec{Name: "orders", Partitions: partitions}}); err != nil {
				failed <- err
				return
			}
			if _, err := pgstream.MaintainWithRing(e.ctx, e.Pool, 1); err != nil {
				failed <- err
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(length / 8):
			}
		}
	})
	// live runs one member until chance ends it: it leaves, or it just stops with its claim open.
	live := func(name string, own *rand.Rand, last bool) (died bool, err error) {
		c, err := pgstream.NewConsumer(e.ctx, e.Pool, pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: name, MaxMessages: 1 + own.IntN(30)})
		if err != nil {
			return false, err
		}
		idle := 0
		for {
			claim, err := c.TryReceive(e.ctx)
			if err != nil {
				return false, err
			}
			if claim == nil {
				if idle++; last && idle > 20 || !last && (ctx.Err() != nil || own.IntN(30) == 0) {
					return false, c.Leave(e.ctx)
				}
				continue
			}
			idle = 0
			order.begin(name, claim)
			switch chance := own.IntN(30); {
			case chance == 0 && !last: // dies; what it holds stays held until its lease ends
				order.end(claim, false)
				_, err := e.Exec(e.ctx, `update millrace_engine.member set expires_at = '-infinity' where name = $1`, name)
				if err == nil {
					// Its lease ends: as an extension that ended long ago.
					_, err = e.Exec(e.ctx, "select millrace.extend($1, 0.000001)", claim.Token)
				}
				return true, err
			case chance < 4:
				order.end(claim, false)
				if err := c.Nack(e.ctx, claim.Token, positions(claim)[:1], 0, "no"); err != nil {
					return false, err
				}
			case chance < 7:
				order.end(claim, false)
				if err := c.Release(e.ctx, claim.Token); err != nil {
					return false, err
				}
			default:
				order.end(claim, true)
				if err := c.Ack(e.ctx, claim.Token); err != nil {
					return false, err
				}
			}
		}
	}
	for i := range 6 {
		own := rand.New(rand.NewPCG(r.Uint64(), r.Uint64()))
		members.Go(func() {
			for life := 0; ctx.Err() == nil; life++ {
				if _, err := live(fmt.Sprintf("m%d.%d", i, life), own, false); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	publishers.Wait()
	members.Wait()
	if _, err := live("last", r, true); err != nil {
		t.Fatal(err)
	}
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	mustHold(t, order.broken)
	if int64(len(order.handled)) != published.Load() {
		t.Errorf("%d messages were handled of %d", len(order.handled), published.Load())
	}
	for p, n := range order.handled {
		if n != 1 {
			t.Errorf("position %d was acked %d times", p, n)
		}
	}
	t.Logf("%d messages, %d partitions at the end", published.Load(), partitions)
}

func TestInvariant2IsSeenBrokenWithout(t *testing.T) {
	t.Parallel()
	t.Run("lanes that wait while one of their claims is open", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t)
		e.mutate("millrace_engine.receive_template", "continue when g.mode = 'Ordered' and t.blocked and taken.claim is null", "continue when false")
		old, new := e.twoMembers("orders", pgstream.ModeOrdered)
		order := newKeyOrder()
		order.begin("old", mustReceive(e, old))
		e.publish("orders", 10)
		e.run("update millrace_engine.lane set member = 'new'")
		for range 3 {
			if claim := receive(e, new); claim != nil {
				order.begin("new", claim)
			}
		}
		mustBeBroken(t, order.broken)
	})
}
