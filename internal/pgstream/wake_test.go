package pgstream_test

import (
	"context"
	"errors"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// listener runs a listener until the test ends.
func (e *engine) listener() *pgstream.Listener {
	e.t.Helper()
	cfg, err := pgx.ParseConfig(e.dsn)
	must(e.t, err)
	l := pgstream.NewListener(cfg)
	l.Report = func(err error) { e.t.Errorf("the listener reports: %v", err) }
	e.listen(l)
	e.eventually("the listener listens", l.Alive)
	return l
}

// listen runs l until the test ends.
func (e *engine) listen(l *pgstream.Listener) {
	e.t.Helper()
	ctx, cancel := context.WithCancel(e.ctx)
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	e.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			e.t.Errorf("Listener.Run: %v", err)
		}
	})
}

type received struct {
	claim *pgstream.Claim
	err   error
}

// waiting starts a Receive and returns when publishers know that somebody waits.
func (e *engine) waiting(c *pgstream.Consumer) <-chan received {
	e.t.Helper()
	done := make(chan received, 1)
	go func() {
		claim, err := c.Receive(e.ctx)
		done <- received{claim, err}
	}()
	e.eventually("somebody is registered to wait", func() bool {
		return one[bool](e, "select to_timestamp(pg_sequence_last_value('millrace_engine.state_1') >> 4) > clock_timestamp()")
	})
	return done
}

func (e *engine) mustWake(done <-chan received) *pgstream.Claim {
	e.t.Helper()
	select {
	case r := <-done:
		if r.err != nil {
			e.t.Fatal(r.err)
		}
		return r.claim
	case <-time.After(patience):
		e.t.Fatal("nothing woke the consumer")
		return nil
	}
}

// never is a poll interval that no test waits for. Whoever waits looks by itself nevertheless, after pauses that grow to four seconds (wait.go), so that what comes in the end
// need not have been announced: TestNotificationsWake tells.
const never = time.Hour

// mustBeWoken publishes until a notification, and not a timer, has ended a wait; a notification that comes between two waits wakes nobody.
func (e *engine) mustBeWoken(what string, wait func(context.Context) (bool, error), publish func()) {
	e.t.Helper()
	ctx, stop := context.WithCancel(e.ctx)
	defer stop()
	woken := make(chan error, 1)
	go func() {
		for {
			if yes, err := wait(ctx); yes || err != nil {
				woken <- err
				return
			}
		}
	}()
	e.eventually("a notification has woken "+what, func() bool {
		publish()
		select {
		case err := <-woken:
			must(e.t, err)
			return true
		default:
			return false
		}
	})
}

func TestNotificationsWake(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	e.run("select millrace.create_group('runs', 'g'), millrace.create_group('runs', 'o', 'Ordered')")
	l := e.listener()
	for _, group := range []string{"g", "o"} {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "runs", Group: group, PollInterval: never, Listener: l})
		wait := func(ctx context.Context) (bool, error) { return pgstream.WaitForMessages(ctx, c) }
		e.mustBeWoken(group, wait, func() { publishIn(e, e, "runs") })
		e.mustBeWoken(group+", by COPY", wait, func() {
			must(t, pgstream.PublishCopy(e.ctx, e, "runs", []pgstream.NewMessage{{Payload: []byte(`{}`)}}))
		})
	}
	c := e.consumer(pgstream.ConsumerConfig{Stream: "runs", Group: "g", PollInterval: never, Listener: l})
	e.run(`insert into millrace_engine.dead_letter (group_id, "position", key, payload, created_at, attempts, reason, dead_at)
		select g.id, n, 'k', '{}', now(), 1, 'no', now() from millrace_engine.consumer_group g, generate_series(1000001, 1010000) n where g.name = 'g'`)
	e.mustBeWoken("by a redrive", func(ctx context.Context) (bool, error) { return pgstream.WaitForMessages(ctx, c) }, func() {
		e.run("select millrace.redrive('runs', 'g', p_max => 1)")
	})
	tail := e.tail("a", "0", pgstream.TailOptions{Listener: l, Poll: never})
	for _, mode := range []pgstream.FrameMode{pgstream.FrameDurable, pgstream.FrameBestEffortLive} {
		e.mustBeWoken(string(mode), func(ctx context.Context) (bool, error) { return pgstream.WaitForFrames(ctx, tail) }, func() { e.frame(e, "a", mode, `{}`) })
	}
}

// PostgreSQL lets one notifying transaction of the server commit at a time. Whoever publishes beside one that is to notify leaves it at that.
func TestOneOpenPublisherNotifiesForAll(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run("select millrace.create_stream('orders', p_priorities => 2)")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.await(1)
	conn := e.connect()
	exec(e, conn, "listen millrace")
	notifications := func() (n int) {
		t.Helper()
		exec(e, conn, "notify millrace, 'all'")
		for {
			got, err := conn.WaitForNotification(e.ctx)
			must(t, err)
			if got.Payload == "all" {
				return n
			}
			if got.Payload != "1" {
				t.Errorf("a notification of %q", got.Payload)
			}
			n++
		}
	}
	publish := func(db pgstream.DB, priority int) {
		t.Helper()
		e.run("select setval('millrace_engine.notified_1', 1)") // or nobody notifies who comes within the same millisecond
		exec(e, db, "select millrace.publish('orders', '{}', p_priority => $1)", priority)
	}
	for _, c := range []struct {
		begin, end string
		want       []int // beside it; of another priority beside it; at its end; of the next one
	}{
		{"begin", "commit", []int{0, 1, 1, 1}},
		{"begin", "rollback", []int{0, 1, 0, 1}},
		{"begin; savepoint a", "rollback to a", []int{0, 1, 0, 1}},
		{"begin; set local millrace.notify = off", "commit", []int{1, 1, 0, 1}},
	} {
		var got []int
		open := e.connect()
		exec(e, open, c.begin)
		publish(open, 0)
		publish(e, 0)
		got = append(got, notifications())
		publish(e, 1)
		got = append(got, notifications())
		exec(e, open, c.end)
		got = append(got, notifications())
		publish(e, 0)
		got = append(got, notifications())
		same(t, c.begin+", "+c.end, got, c.want)
	}
}

func TestAWaitingConsumerIsWokenByEveryPublisher(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "o", Mode: pgstream.ModeOrdered})
	l := e.listener()
	for _, group := range []string{"g", "o"} {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group, PollInterval: never, Listener: l})
		must(t, c.Leave(e.ctx))
		drain(e, c)
		for _, p := range []struct {
			name    string
			publish func()
		}{
			{"Publish", func() { publishIn(e, e, "orders") }},
			{"COPY", func() {
				must(t, pgstream.PublishCopy(e.ctx, e, "orders", []pgstream.NewMessage{{Payload: []byte(`{}`)}}))
			}},
			{"millrace.publish", func() { e.run("select millrace.publish('orders', '{}')") }},
			{"INSERT into a segment", func() { e.run("insert into millrace_engine.segment_1_3 (payload) values ('{}')") }},
			{"a long transaction, at its end", func() {
				tx := e.begin()
				publishIn(e, tx, "orders")
				commit(e, tx)
			}},
		} {
			done := e.waiting(c)
			p.publish()
			claim := e.mustWake(done)
			if len(claim.Messages) != 1 {
				t.Errorf("%s: %v", p.name, positions(claim))
			}
			must(t, c.Ack(e.ctx, claim.Token))
		}
	}
}

// Who publishes while consumers are busy and about to wait must not be missed, however the two meet.
func TestNoWakeUpIsMissedBetweenLookingAndWaiting(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: e.listener(), MaxMessages: 1})
	const n = 300
	failed := make(chan error, 1)
	next := make(chan struct{}, 1)
	next <- struct{}{}
	go func() {
		for range n {
			<-next // one at a time: no later message can cover for a missed one
			if _, err := pgstream.Publish(e.ctx, e.Pool, "orders", pgstream.NewMessage{Payload: []byte(`{}`)}); err != nil {
				failed <- err
				return
			}
		}
	}()
	token := ""
	for range n {
		ctx, cancel := context.WithTimeout(e.ctx, patience)
		claim, err := c.AckAndReceive(ctx, token)
		cancel()
		if err != nil {
			t.Fatalf("receive: %v", err)
		}
		token = claim.Token
		next <- struct{}{}
	}
	select {
	case err := <-failed:
		t.Error(err)
	default:
	}
}

// Who waits is subscribed before it looks: what is heard in between ends the wait at once, and not when a timer does.
func TestWhatIsHeardWhileLookingWakes(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: e.listener()})
	woken := []bool{}
	for range 2 { // the first asks publishers to notify, and looks again
		yes, err := pgstream.WaitWhileHeard(e.ctx, c)
		must(t, err)
		woken = append(woken, yes)
	}
	same(t, "woken", woken, []bool{false, true})
}

// Who is not announced is found soon after somebody who was, and whoever waits for long registers again before publishers forget it.
func TestPausesGrow(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		listener          *pgstream.Listener
		poll, since, want time.Duration
	}{
		{nil, time.Second, 0, time.Millisecond},
		{nil, time.Second, 20 * time.Millisecond, 20 * time.Millisecond},
		{nil, time.Second, time.Hour, time.Second},
		{&pgstream.Listener{}, never, 0, time.Millisecond},
		{&pgstream.Listener{}, never, 20 * time.Millisecond, 20 * time.Millisecond},
		{&pgstream.Listener{}, never, time.Hour, 4 * time.Second},
	} {
		if got := pgstream.Pause(c.listener, c.poll, c.since); got != c.want {
			t.Errorf("%s after a reason to look, polling every %s, with a listener %t: a pause of %s, not %s", c.since, c.poll, c.listener != nil, got, c.want)
		}
	}
}

// All who wait share one subscription: who gives up leaves it to the others, and the last takes it along.
func TestWhoStopsWaitingLeavesOthersSubscribed(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	cfg, err := pgx.ParseConfig(e.dsn)
	must(t, err)
	l := pgstream.NewListener(cfg) // does not run: nothing else wakes them
	type ended struct {
		woken bool
		err   error
	}
	wait := func(ctx context.Context) <-chan ended {
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: l})
		done := make(chan ended, 1)
		go func() {
			woken, err := pgstream.WaitForMessages(ctx, c)
			done <- ended{woken, err}
		}()
		return done
	}
	waiting := func(want int) {
		t.Helper()
		e.eventually("all wait", func() bool {
			_, n := pgstream.Waiting(l)
			return n == want
		})
	}
	ctx, stop := context.WithCancel(e.ctx)
	defer stop()
	impatient := wait(ctx)
	waiting(1)
	first, second := wait(e.ctx), wait(e.ctx)
	waiting(3)
	stop()
	if r := <-impatient; !errors.Is(r.err, context.Canceled) {
		t.Errorf("%v", r.err)
	}
	pgstream.Hear(l, "1")
	for _, done := range []<-chan ended{first, second} {
		if r := <-done; !r.woken || r.err != nil {
			t.Errorf("woken %t, %v", r.woken, r.err)
		}
	}
	ctx, stop = context.WithCancel(e.ctx)
	defer stop()
	last := wait(ctx)
	waiting(1)
	stop()
	<-last
	if payloads, _ := pgstream.Waiting(l); payloads != 0 {
		t.Errorf("%d subscriptions are left of nobody", payloads)
	}
}

func TestAListenerThatLosesItsConnectionWakesEverybody(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: e.listener()})
	e.mustBeWoken("who waits", func(ctx context.Context) (bool, error) { return pgstream.WaitForMessages(ctx, c) }, func() {
		e.run("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and query like 'notify millrace%'")
	})
}

func TestAReconnectedListenerWakesEverybody(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	l := e.listener()
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: l})
	e.publish("orders", 1)
	must(t, c.Ack(e.ctx, mustReceive(e, c).Token)) // its connection is open
	done := e.waiting(c)

	// The listener loses its connection and cannot have another one.
	u, err := url.Parse(e.dsn)
	must(t, err)
	name := pgx.Identifier{u.Path[1:]}.Sanitize()
	u.Path = "/postgres"
	outside, err := pgx.Connect(e.ctx, u.String())
	must(t, err)
	defer func() { _ = outside.Close(context.Background()) }()
	exec(e, outside, "alter database "+name+" allow_connections false")
	if n := one[int](e, "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database() and query like 'notify millrace%'"); n != 1 {
		t.Fatalf("%d listeners were stopped", n)
	}
	e.eventually("the listener knows", func() bool { return !l.Alive() })
	publishIn(e, e, "orders") // nobody hears of it
	exec(e, outside, "alter database "+name+" allow_connections true")
	same(t, "after the reconnection", positions(e.mustWake(done)), []int64{2})
	e.eventually("the listener listens again", l.Alive)
}

func TestWithoutAListenerConsumersPoll(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: 10 * time.Millisecond})
	done := make(chan received, 1)
	go func() {
		claim, err := c.Receive(e.ctx)
		done <- received{claim, err}
	}()
	publishIn(e, e, "orders")
	same(t, "polled", positions(e.mustWake(done)), []int64{1})
	if one[int64](e, "select pg_sequence_last_value('millrace_engine.state_1') >> 4") != 0 {
		t.Error("a consumer without a listener asked publishers to notify")
	}
}

func TestWaitingHoldsNoConnection(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	cfg, err := pgxpool.ParseConfig(e.dsn)
	must(t, err)
	cfg.MaxConns = 1
	pool, err := pgxpool.NewWithConfig(e.ctx, cfg)
	must(t, err)
	defer pool.Close()
	var waiting []<-chan received
	l := e.listener()
	for range 5 {
		c, err := pgstream.NewConsumer(e.ctx, pool, pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: l, MaxMessages: 1})
		must(t, err)
		waiting = append(waiting, e.waiting(c))
	}
	ctx, cancel := context.WithTimeout(e.ctx, patience)
	defer cancel()
	for range 5 { // through the pool's only connection, while five consumers wait
		if _, err := pgstream.Publish(ctx, pool, "orders", pgstream.NewMessage{Payload: []byte(`{}`)}); err != nil {
			t.Fatal(err)
		}
	}
	got := map[int64]bool{}
	for _, done := range waiting {
		got[e.mustWake(done).Messages[0].Position] = true
	}
	if len(got) != 5 {
		t.Errorf("five consumers got %v", got)
	}
}

func TestReceiveEndsWithItsContext(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: e.listener()})
	ctx, cancel := context.WithCancel(e.ctx)
	done := make(chan error, 1)
	go func() {
		_, err := c.Receive(ctx)
		done <- err
	}()
	e.eventually("it is registered", func() bool { return one[int64](e, "select pg_sequence_last_value('millrace_engine.state_1') >> 4") > 0 })
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%v; want context.Canceled", err)
		}
	case <-time.After(patience):
		t.Error("Receive outlived its context")
	}
}

func TestAReleaseWakesOthers(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e := newEngine(t)
		e.stream("orders")
		e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
		publishIn(e, e, "orders")
		l := e.listener()
		holder := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "holder"})
		claim := mustReceive(e, holder)
		c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "waiting", PollInterval: never, Listener: l})
		done := e.waiting(c)
		must(t, holder.Release(e.ctx, claim.Token))
		must(t, holder.Leave(e.ctx))
		same(t, "woken", positions(e.mustWake(done)), []int64{1})
	})
}

// What SQL cannot announce, because time alone makes it due, is found by looking now and then: a consumer registers again before publishers
// forget it, and looks when it does.
func TestAConsumerThatWaitsForLongStaysRegistered(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes ten seconds")
	}
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: e.listener()})
	done := e.waiting(c)
	first := one[int64](e, "select pg_sequence_last_value('millrace_engine.state_1') >> 4")
	e.eventually("it registers again", func() bool {
		now := one[int64](e, "select pg_sequence_last_value('millrace_engine.state_1') >> 4")
		if now == first && one[bool](e, "select to_timestamp($1) < clock_timestamp()", first) {
			t.Fatal("its registration ended, and publishers have forgotten it")
		}
		return now > first
	})
	publishIn(e, e, "orders")
	same(t, "woken", positions(e.mustWake(done)), []int64{1})
}

// The wait for notifications is interrupted at every probe, and the connection stays.
func TestAListenerProbesWithoutLosingItsConnection(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	ear := e.connect()
	exec(e, ear, "listen millrace")
	cfg, err := pgx.ParseConfig(e.dsn)
	must(t, err)
	l := pgstream.NewListener(cfg)
	l.ProbeInterval = 2 * time.Millisecond
	l.Report = func(err error) { t.Errorf("the listener reports: %v", err) }
	e.listen(l)
	e.eventually("the listener listens", l.Alive)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: l})
	backends := map[uint32]int{}
	probes := 0
	for probes < 100 {
		done := e.waiting(c)
		for range 10 {
			n, err := ear.WaitForNotification(e.ctx)
			must(t, err)
			if strings.HasPrefix(n.Payload, "probe:") {
				backends[n.PID]++
				probes++
			}
		}
		publishIn(e, e, "orders")
		must(t, c.Ack(e.ctx, e.mustWake(done).Token))
	}
	if len(backends) != 1 {
		t.Errorf("probes came from the backends %v, want only one", backends)
	}
}

// blackhole swallows what comes from the server while it is closed, as a network that has lost the way back.
type blackhole struct {
	net.Conn
	closed *atomic.Bool
}

func (b blackhole) Read(p []byte) (int, error) {
	for {
		n, err := b.Conn.Read(p)
		if err != nil || !b.closed.Load() {
			return n, err
		}
	}
}

func TestAListenerNoticesADeadConnection(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	var closed atomic.Bool
	cfg, err := pgx.ParseConfig(e.dsn)
	must(t, err)
	cfg.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		return blackhole{conn, &closed}, err
	}
	l := pgstream.NewListener(cfg)
	l.ProbeInterval, l.ProbeTimeout = 10*time.Millisecond, 500*time.Millisecond
	e.listen(l)
	e.eventually("the listener listens", l.Alive)
	closed.Store(true)
	e.eventually("the listener knows", func() bool { return !l.Alive() })
	closed.Store(false)
	e.eventually("the listener listens again", l.Alive)
}
