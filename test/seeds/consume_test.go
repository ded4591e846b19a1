package seeds

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// never is a poll interval that a test does not live to see: what comes in time was announced.
const never = time.Hour

// listener is a running listener of the application; stop ends it and waits until it has.
func (d *database) listener(change ...func(*pgx.ConnConfig)) (l *pgstream.Listener, stop func()) {
	d.t.Helper()
	config, err := pgx.ParseConfig(d.appDSN)
	if err != nil {
		d.t.Fatal(err)
	}
	config.RuntimeParams["application_name"] = "listener"
	for _, f := range change {
		f(config)
	}
	l = pgstream.NewListener(config)
	ctx, cancel := context.WithCancel(d.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = l.Run(ctx) // ends with ctx only
	}()
	stop = func() {
		cancel()
		<-done
	}
	d.t.Cleanup(stop)
	d.eventually("the listener listens", func() (bool, string) { return l.Alive(), "" })
	return l, stop
}

func (d *database) consumer(pool *pgxpool.Pool, c pgstream.ConsumerConfig) *pgstream.Consumer {
	d.t.Helper()
	consumer, err := pgstream.NewConsumer(d.ctx, pool, c)
	if err != nil {
		d.t.Fatal(err)
	}
	return consumer
}

// consume handles what a consumer receives until its context or the test ends; payloads come out of the channel, and then it is closed.
func (d *database) consume(ctx context.Context, c *pgstream.Consumer) <-chan string {
	ctx, cancel := context.WithCancel(ctx)
	got := make(chan string, 100)
	ended := make(chan struct{})
	d.t.Cleanup(func() {
		cancel()
		<-ended
	})
	go func() {
		defer close(ended)
		defer close(got)
		for {
			claim, err := c.Receive(ctx)
			if err != nil {
				if ctx.Err() == nil {
					d.t.Error(err)
				}
				return
			}
			for _, m := range claim.Messages {
				got <- string(m.Payload)
			}
			if err := c.Ack(ctx, claim.Token); err != nil && ctx.Err() == nil {
				d.t.Error(err)
			}
		}
	}()
	return got
}

// next is the next payload, which comes within the test's time.
func (d *database) next(got <-chan string) string {
	d.t.Helper()
	select {
	case payload := <-got:
		return payload
	case <-d.ctx.Done():
		d.t.Fatal("nothing came")
		return ""
	}
}

// waiting returns when publishers know that somebody waits for messages of the stream.
func (d *database) waiting(stream string) {
	d.t.Helper()
	d.eventually("somebody is registered to wait", func() (bool, string) {
		return value[bool](d, "select to_timestamp(pg_sequence_last_value(format('millrace_engine.state_%s', millrace_engine.stream_id($1))::regclass) >> 4) > clock_timestamp()", stream), ""
	})
}

// Consumption by events: the first fetch is at once, without an announcement; then the consumer waits, is woken by the commit, fetches and handles. The same
// with nothing but a driver.
func TestSeed_H04_ConsumeByEvents(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_group('orders', 'billing'), millrace.create_group('orders', 'shipping')")
	d.rows(`select millrace.publish('orders', '1')`)
	l, _ := d.listener()
	got := d.consume(d.ctx, d.consumer(d.app, pgstream.ConsumerConfig{Stream: "orders", Group: "billing", Listener: l, PollInterval: never}))
	if first := d.next(got); first != "1" {
		t.Errorf("first %s", first)
	}
	for n := 2; n <= 4; n++ {
		d.waiting("orders")
		d.rows("select millrace.publish('orders', to_jsonb($1::int))", n)
		if payload := d.next(got); payload != strconv.Itoa(n) {
			t.Errorf("woken for %s, want %d", payload, n)
		}
	}

	conn := d.connect(d.appDSN)
	d.rowsOf(conn, "listen millrace")
	d.rowsOf(conn, "select millrace_engine.wait_for(array[millrace_engine.stream_id('orders')])")
	for range 4 { // what was there before
		claim := valueOf[string](d, conn, "select claim from millrace.receive('orders', 'shipping', 'm', p_max => 1)")
		d.rowsOf(conn, "select millrace.ack($1)", claim)
	}
	d.rows("select millrace.publish('orders', '5')")
	for {
		n, err := conn.WaitForNotification(d.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if n.Payload == strconv.Itoa(value[int](d, "select millrace_engine.stream_id('orders')")) {
			break
		}
	}
	if payload := valueOf[string](d, conn, "select payload::text from millrace.receive('orders', 'shipping', 'm')"); payload != "5" {
		t.Errorf("woken for %s", payload)
	}
}

// Consumption by polling: batch size, how long to block, auto-ack, how long messages are reserved, backoff between deliveries, and how many there are.
func TestSeed_H05_ConsumeByPolling(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_group('orders', 'quick')")
	d.rows("select * from millrace.publish_batch('orders', array['1', '2', '3', '4', '5']::jsonb[])")

	// Batch size and auto-ack.
	d.same("two at once, settled", []string{"1", "2"}, "select payload::text from millrace.receive('orders', 'quick', 'a', p_max => 2, p_auto_ack => true)")
	d.same("in flight", []string{"0|3"}, `select in_flight, lag from millrace.stats('orders') where "group" = 'quick'`)
	// The reservation: nobody else is given them before it ends, and then somebody is.
	begin := value[time.Time](d, "select clock_timestamp()")
	d.same("reserved", []string{"3", "4", "5"}, "select payload::text from millrace.receive('orders', 'quick', 'a', p_lease_seconds => 3)")
	d.same("others get nothing meanwhile", []string{}, "select position from millrace.receive('orders', 'quick', 'b')")
	d.eventually("the reservation ends", func() (bool, string) {
		rows := d.rows("select payload::text || ' ' || attempt from millrace.receive('orders', 'quick', 'b', p_auto_ack => true)")
		return slices.Equal(rows, []string{"3 2", "4 2", "5 2"}), fmt.Sprint(rows)
	})
	if took := value[time.Time](d, "select clock_timestamp()").Sub(begin); took < 3*time.Second {
		t.Errorf("taken over after %s", took)
	}
	// Blocking, for so long and no longer; without a notification it finds what comes.
	c := d.consumer(d.app, pgstream.ConsumerConfig{Stream: "orders", Group: "quick", Member: "c", PollInterval: 20 * time.Millisecond})
	short, cancel := context.WithTimeout(d.ctx, 100*time.Millisecond)
	defer cancel()
	if claim, err := c.Receive(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("claim %v, error %v", claim, err)
	}
	got := d.consume(d.ctx, c)
	d.rows("select millrace.publish('orders', '6')")
	if payload := d.next(got); payload != "6" {
		t.Errorf("polled %s", payload)
	}

	// Backoff from its first value to its greatest, and no more deliveries than allowed.
	err := pgstream.ApplyGroup(d.ctx, d.owner, pgstream.GroupSpec{Stream: "orders", Name: "tough", StartFrom: pgstream.StartLatest,
		BackoffInitial: 20 * time.Millisecond, BackoffMax: 40 * time.Millisecond, MaxAttempts: 4})
	if err != nil {
		t.Fatal(err)
	}
	d.rows("select millrace.publish('orders', '7')")
	failed := time.Time{}
	for attempt := 1; attempt <= 4; attempt++ {
		var claim string
		var position int64
		var at time.Time
		d.eventually(fmt.Sprintf("delivery %d", attempt), func() (bool, string) {
			var n int
			err := d.app.QueryRow(d.ctx, "select claim, position, attempt, clock_timestamp() from millrace.receive('orders', 'tough', 'm')").Scan(&claim, &position, &n, &at)
			return n == attempt, fmt.Sprint(n, err)
		})
		// Half of the backoff is at random.
		if least := min(20<<max(0, attempt-2), 40) / 2; attempt > 1 && at.Sub(failed) < time.Duration(least)*time.Millisecond {
			t.Errorf("delivery %d came after %s", attempt, at.Sub(failed))
		}
		failed = value[time.Time](d, "select clock_timestamp()")
		d.rows("select millrace.nack($1, array[$2::bigint], null, 'no')", claim, position)
	}
	d.same("dead letters", []string{"7|4|no"}, "select payload::text, attempts, reason from millrace.dead_letters('orders', 'tough')")
}

// A delayed message is not announced when it is published. It arrives when it is due, announced, and not before.
func TestSeed_H06_DelayedMessage(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_group('orders', 'g')")
	d.scout(pgstream.ScoutConfig{})
	conn := d.connect(d.appDSN)
	d.rowsOf(conn, "listen millrace")
	d.rowsOf(conn, "select millrace_engine.wait_for(array[millrace_engine.stream_id('orders')])")

	due := value[time.Time](d, "select clock_timestamp() + interval '500 ms'")
	d.rows("select millrace.publish('orders', '1', p_deliver_at => $1)", due)
	// Notifications are in the order of commits: this one would come after the message's own.
	d.rows("select pg_notify('millrace', 'after the publish')")
	n, err := conn.WaitForNotification(d.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if n.Payload != "after the publish" && value[bool](d, "select clock_timestamp() < $1", due) {
		t.Errorf("a delayed message was announced with its publish: %q", n.Payload)
	}
	for n.Payload == "after the publish" {
		if n, err = conn.WaitForNotification(d.ctx); err != nil {
			t.Fatal(err)
		}
	}
	if early := due.Sub(value[time.Time](d, "select clock_timestamp()")); early > 0 {
		t.Errorf("announced %s too early", early)
	}
	d.eventually("it is delivered", func() (bool, string) {
		rows := d.rows("select payload::text from millrace.receive('orders', 'g', 'm')")
		return slices.Equal(rows, []string{"1"}), fmt.Sprint(rows)
	})
}

// scout runs a scout until the test ends, or stop is called. It has a connection of its own, because the first look of a connection takes longer than
// those after it, and a scout rests in proportion.
func (d *database) scout(c pgstream.ScoutConfig) (stop func()) {
	conn := d.connect(d.appDSN)
	ctx, cancel := context.WithCancel(d.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		pgstream.RunScout(ctx, conn, c, func(err error) { d.t.Errorf("the scout reports: %v", err) })
	}()
	stop = func() {
		cancel()
		<-done
	}
	d.t.Cleanup(stop)
	return stop
}

// One scout at a time leads, by a lease. It looks every tenth of a second while somebody waits, and wakes whom a message has become due for. Those that do not lead
// sleep longer, and each has its turn.
func TestSeed_H07_Scout(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_group('orders', 'g')")
	first, second := pgstream.NewScout(pgstream.ScoutConfig{Holder: "first"}, nil), pgstream.NewScout(pgstream.ScoutConfig{Holder: "second"}, nil)
	// A look that was slow, on a busy machine, is followed by a longer pause.
	conn := d.connect(d.appDSN)
	d.eventually("the first leads and looks again in a tenth of a second", func() (bool, string) {
		d.rows("select millrace_engine.wait_for(array[millrace_engine.stream_id('orders')])")
		pause, err := first.Round(d.ctx, conn)
		if err != nil {
			t.Fatal(err)
		}
		return first.Leads() && pause > 0 && pause <= 100*time.Millisecond, pause.String()
	})
	follows, err := second.Round(d.ctx, d.app)
	if err != nil || second.Leads() || follows < time.Second {
		t.Errorf("the second leads: %v, asks again in %s, error %v", second.Leads(), follows, err)
	}
	first.Leave(d.ctx, d.app)

	// In turns, with everybody's place known in the database.
	var stops []func()
	for _, name := range []string{"a", "b", "c"} {
		stops = append(stops, d.scout(pgstream.ScoutConfig{Holder: name, Lease: 5 * time.Second, Term: 300 * time.Millisecond, FollowInterval: 50 * time.Millisecond}))
	}
	seen := map[string]bool{}
	epoch := int64(0)
	d.eventually("each has led", func() (bool, string) {
		var holder string
		var now int64
		if err := d.app.QueryRow(d.ctx, "select coalesce(holder, ''), epoch from millrace_engine.scout").Scan(&holder, &now); err != nil {
			t.Fatal(err)
		}
		if now < epoch {
			t.Errorf("epoch %d after %d", now, epoch)
		}
		epoch = now
		seen[holder] = true
		return seen["a"] && seen["b"] && seen["c"], fmt.Sprint(seen)
	})

	for _, stop := range stops {
		stop()
	}
	d.scout(pgstream.ScoutConfig{Holder: "alone"})
	l, _ := d.listener()
	got := d.consume(d.ctx, d.consumer(d.app, pgstream.ConsumerConfig{Stream: "orders", Group: "g", Listener: l, PollInterval: never}))
	d.rows("select millrace.publish('orders', '1', p_delay_seconds => 0.2)")
	if payload := d.next(got); payload != "1" {
		t.Errorf("woken for %s", payload)
	}
}

// What nobody announces is found by looking now and then, also while LISTEN works.
func TestSeed_H08_FallbackPoll(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_group('orders', 'g')")
	l, _ := d.listener()
	got := d.consume(d.ctx, d.consumer(d.app, pgstream.ConsumerConfig{Stream: "orders", Group: "g", Listener: l, PollInterval: 200 * time.Millisecond}))
	d.waiting("orders")
	quiet := d.connect(d.appDSN)
	d.rowsOf(quiet, "set millrace.notify = off")
	other := d.connect(d.appDSN)
	d.rowsOf(other, "listen millrace")
	for n := range 3 {
		d.rowsOf(quiet, "select millrace.publish('orders', to_jsonb($1::int))", n)
		if payload := d.next(got); payload != strconv.Itoa(n) {
			t.Errorf("found %s, want %d", payload, n)
		}
	}
	d.rows("select pg_notify('millrace', 'end')")
	id := strconv.Itoa(value[int](d, "select millrace_engine.stream_id('orders')"))
	for {
		n, err := other.WaitForNotification(d.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if n.Payload == id {
			t.Error("the publisher announced it")
		}
		if n.Payload == "end" {
			break
		}
	}
}

// All consumers of a process share one LISTEN, whatever streams they are of. With the listener it goes: nobody listens any more.
func TestSeed_H09_OneListenForAll(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	l, stop := d.listener()
	ctx, cancel := context.WithCancel(d.ctx)
	var all []<-chan string
	for _, stream := range []string{"orders", "parcels", "letters"} {
		d.admin("select millrace.create_stream($1)", stream)
		for _, group := range []string{"g", "h"} {
			d.admin("select millrace.create_group($1, $2)", stream, group)
			all = append(all, d.consume(ctx, d.consumer(d.app, pgstream.ConsumerConfig{Stream: stream, Group: group, Listener: l, PollInterval: never})))
		}
		d.waiting(stream)
	}
	const sessions = "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'listener'"
	if n := valueOf[int](d, d.owner, sessions); n != 1 {
		t.Errorf("%d sessions listen for six consumers", n)
	}
	// The others hold no LISTEN: the sessions that they share are free for anybody.
	for range 8 {
		d.same("channels of a shared session", []string{"0"}, "select count(*) from pg_listening_channels()")
	}
	for _, stream := range []string{"orders", "parcels", "letters"} {
		d.rows("select millrace.publish($1, to_jsonb($1::text))", stream)
	}
	for i, got := range all {
		if want := fmt.Sprintf("%q", []string{"orders", "parcels", "letters"}[i/2]); d.next(got) != want {
			t.Errorf("consumer %d did not get %s", i, want)
		}
	}
	cancel()
	for _, got := range all {
		for range got { // until it has stopped
		}
	}
	stop()
	d.eventually("nobody listens", func() (bool, string) {
		n := valueOf[int](d, d.owner, sessions)
		return n == 0, strconv.Itoa(n)
	})
}

// When LISTEN fails, consumers poll; when it works again they are woken again. Nobody has to do anything.
func TestSeed_H10_WithoutListen(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_group('orders', 'polls'), millrace.create_group('orders', 'waits')")
	// A role of its own, which is locked out.
	role := "seeds_listener_" + value[string](d, "select substr(md5(random()::text), 1, 12)")
	d.admin("create role " + role + " login password 'secret' in role " + runtimeRole)
	t.Cleanup(func() {
		if _, err := d.owner.Exec(context.Background(), "drop role "+role); err != nil {
			t.Error(err)
		}
	})
	l, _ := d.listener(func(c *pgx.ConnConfig) { c.User, c.Password = role, "secret" })
	polls := d.consume(d.ctx, d.consumer(d.app, pgstream.ConsumerConfig{Stream: "orders", Group: "polls", Listener: l, PollInterval: 50 * time.Millisecond}))
	d.waiting("orders")

	d.admin("alter role " + role + " nologin")
	d.admin("select pg_terminate_backend(pid) from pg_stat_activity where usename = $1", role)
	d.eventually("the listener is lost", func() (bool, string) { return !l.Alive(), "" })
	for n := range 3 {
		d.rows("select millrace.publish('orders', to_jsonb($1::int))", n)
		if payload := d.next(polls); payload != strconv.Itoa(n) {
			t.Errorf("polled %s, want %d", payload, n)
		}
	}
	if l.Alive() {
		t.Error("it listened meanwhile")
	}
	d.admin("alter role " + role + " login")
	d.eventually("the listener is back", func() (bool, string) { return l.Alive(), "" })
	waits := d.consume(d.ctx, d.consumer(d.app, pgstream.ConsumerConfig{Stream: "orders", Group: "waits", Listener: l, PollInterval: never}))
	for range 3 {
		d.next(waits) // those from before, whose first fetch is at once
	}
	d.waiting("orders")
	d.rows("select millrace.publish('orders', '3')")
	if payload := d.next(waits); payload != "3" {
		t.Errorf("woken for %s", payload)
	}
}

// Consumers that fetch at the same time never share a message, and miss none.
func TestSeed_H11_NoMessageIsShared(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('orders'), millrace.create_group('orders', 'shared'), millrace.create_group('orders', 'ordered', 'Ordered')")
	const messages = 2000
	d.rows("insert into millrace.orders (key, payload) select 'k' || n % 50, to_jsonb(n) from generate_series(1, $1) n", messages)
	for _, group := range []string{"shared", "ordered"} {
		var mu sync.Mutex
		times := map[int64]int{}
		var members sync.WaitGroup
		for m := range 8 {
			members.Go(func() {
				member := fmt.Sprintf("m%d", m)
				for d.ctx.Err() == nil {
					mu.Lock()
					done := len(times) == messages
					mu.Unlock()
					if done {
						return
					}
					rows, err := d.app.Query(d.ctx, "select claim, position from millrace.receive('orders', $1, $2, p_max => 7)", group, member)
					if err != nil {
						t.Error(err)
						return
					}
					claim := ""
					var position int64
					_, err = pgx.ForEachRow(rows, []any{&claim, &position}, func() error {
						mu.Lock()
						defer mu.Unlock()
						times[position]++
						return nil
					})
					if err == nil && claim != "" {
						_, err = d.app.Exec(d.ctx, "select millrace.ack($1)", claim)
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		members.Wait()
		for position, n := range times {
			if n != 1 {
				t.Errorf("%s: position %d was delivered %d times", group, position, n)
			}
		}
		if len(times) != messages {
			t.Errorf("%s: %d messages were delivered", group, len(times))
		}
	}
}
