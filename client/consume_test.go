package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/client"
)

// queue is a database with a stream and a group.
func newQueue(t testing.TB, group string) *database {
	t.Helper()
	d := newDatabase(t)
	d.run("select millrace.create_stream('q')")
	d.run("select millrace.create_group('q', 'g'" + group + ")")
	return d
}

// publish publishes n messages, whose keys are k0 to k<keys-1> in turn.
func (d *database) publish(n, keys int) {
	d.t.Helper()
	d.run(`select millrace.publish_batch('q', array_agg(to_jsonb(i)), array_agg('k' || i % $2)) from generate_series(0, $1 - 1) i`, n, keys)
}

const state = `select concat_ws(' ', lag, in_flight, retrying, dead_letters) from millrace.stats('q')`

// recorder notes what handlers got.
type recorder struct {
	mu   sync.Mutex
	seen []string
}

func (r *recorder) add(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, text)
}

func (r *recorder) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.seen)
}

func (r *recorder) count(text string) int {
	n := 0
	for _, s := range r.all() {
		if s == text {
			n++
		}
	}
	return n
}

// Every message is handled once, by as many handlers as are allowed, and settled.
func TestMessagesAreHandledConcurrentlyAndSettled(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"Shared", "Ordered"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			d := newQueue(t, ", '"+mode+"'")
			d.publish(1000, 40)
			var r recorder
			var mu sync.Mutex
			order := map[string][]int64{}
			var at, most atomic.Int32
			gate := make(chan struct{})
			var open sync.Once
			c := d.consume(d.client(client.Options{}), "q", "g", func(ctx context.Context, m *client.Delivery) error {
				if now := at.Add(1); now == 5 {
					open.Do(func() { close(gate) }) // five are at work at the same time
				} else if now > most.Load() {
					most.Store(now)
				}
				defer at.Add(-1)
				select {
				case <-gate:
				case <-ctx.Done():
					return ctx.Err()
				}
				r.add(string(m.Payload))
				mu.Lock()
				defer mu.Unlock()
				order[m.Key] = append(order[m.Key], m.Position)
				return nil
			}, client.ConsumeOptions{Concurrency: 5, Batch: 64})
			d.becomes("0 0 0 0", state)
			if err := c.ends(); err != nil {
				t.Fatal(err)
			}
			if seen := r.all(); len(seen) != 1000 || len(unique(seen)) != 1000 || most.Load() > 5 {
				t.Errorf("%d messages were handled, %d different ones, %d at a time", len(seen), len(unique(seen)), most.Load())
			}
			for key, positions := range order {
				if mode == "Ordered" && !slices.IsSorted(positions) {
					t.Errorf("key %s was handled in the order %v", key, positions)
				}
			}
			if n := one[int](d, "select count(*) from millrace_engine.member"); n != 0 {
				t.Error("the consumer did not leave its group")
			}
		})
	}
}

func unique(texts []string) map[string]bool {
	set := map[string]bool{}
	for _, text := range texts {
		set[text] = true
	}
	return set
}

// What handlers return decides what becomes of a message.
func TestErrorsOfHandlers(t *testing.T) {
	t.Parallel()
	d := newQueue(t, ", p_max_attempts => 3")
	for _, payload := range []string{`"fine"`, `"permanent"`, `"panic"`, `"twice"`, `"hopeless"`} {
		d.run("select millrace.publish('q', $1)", payload)
	}
	var r recorder
	var log logs
	d.consume(d.client(client.Options{Logger: log.logger()}), "q", "g", func(_ context.Context, m *client.Delivery) error {
		r.add(string(m.Payload))
		switch string(m.Payload) {
		case `"permanent"`:
			return fmt.Errorf("outer: %w", client.Permanent(errors.New("a \x00 in the text")))
		case `"panic"`:
			if m.Attempt < 2 {
				panic("at the disco")
			}
		case `"twice"`:
			if m.Attempt < 2 {
				return client.RetryAfter(errors.New("not yet"), time.Millisecond)
			}
		case `"hopeless"`:
			return client.RetryAfter(errors.New("never"), 0)
		}
		return nil
	}, client.ConsumeOptions{})
	d.becomes("0 0 0 2", state)
	for payload, want := range map[string]int{`"fine"`: 1, `"permanent"`: 1, `"panic"`: 2, `"twice"`: 2, `"hopeless"`: 3} {
		if got := r.count(payload); got != want {
			t.Errorf("%s was handled %d times, want %d", payload, got, want)
		}
	}
	got := one[string](d, "select string_agg(payload #>> '{}' || ': ' || reason || ' after ' || attempts, ', ' order by position) from millrace.dead_letters('q', 'g')")
	if want := "permanent: outer: a  in the text after 1, hopeless: never after 3"; got != want {
		t.Errorf("the dead letters are %q, want %q", got, want)
	}
	if text := log.String(); !strings.Contains(text, "at the disco") || !strings.Contains(text, "consume_test.go") {
		t.Errorf("the log does not tell where the handler panicked:\n%s", text)
	}
}

// A handler's transaction, the ack and what it publishes are one. What fails or loses its claim leaves nothing behind.
func TestEffectsInTheDeliverysTransactionHappenOnce(t *testing.T) {
	t.Parallel()
	d := newQueue(t, "")
	d.run("select millrace.create_stream('out')")
	d.run("create table effect (n text not null)") // nothing but Millrace prevents a second one
	d.publish(60, 7)
	cl := d.client(client.Options{Pool: client.PoolOptions{MaxConns: 4}}) // fewer connections than handlers
	const member = "thief's victim"
	var stolen atomic.Bool
	c := d.consume(cl, "q", "g", func(ctx context.Context, m *client.Delivery) error {
		tx, err := m.Tx(ctx)
		if err != nil {
			return err
		}
		if again, err := m.Tx(ctx); err != nil || again != tx {
			return client.Permanent(errors.New("another transaction"))
		}
		if _, err := tx.Exec(ctx, "insert into effect values ($1)", string(m.Payload)); err != nil {
			return err
		}
		if _, err := cl.In(tx).Publish(ctx, "out", client.NewMessage{Payload: m.Payload}); err != nil {
			return err
		}
		if err := tx.Commit(ctx); err == nil {
			return client.Permanent(errors.New("a handler could commit by itself"))
		}
		switch {
		case m.Attempt == 1 && m.Position%10 == 0:
			return client.RetryAfter(errors.New("once more"), 0)
		case m.Position == 33 && stolen.CompareAndSwap(false, true):
			// As if this process had been away for longer than its lease.
			if _, err := d.Exec(d.ctx, "select millrace.leave('q', 'g', $1)", member); err != nil {
				return client.Permanent(err)
			}
		}
		return nil
	}, client.ConsumeOptions{Member: member, Concurrency: 20, Batch: 20})
	d.becomes("0 0 0 0", state)
	if err := c.ends(); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"effect", "(select payload as n from millrace.out)"} {
		if got := one[string](d, "select count(*) || ' ' || count(distinct n) from "+table+" e"); got != "60 60" {
			t.Errorf("%s has %s effects and different ones, want 60 60", table, got)
		}
	}
}

// A handler that ends its goroutine, as FailNow of a test does, must not keep the connection of its transaction: Close would wait for ever.
func TestAHandlerThatNeverReturnsGivesItsConnectionBack(t *testing.T) {
	t.Parallel()
	d := newQueue(t, "")
	d.publish(1, 1)
	cl := d.client(client.Options{})
	left := make(chan struct{})
	c := d.consume(cl, "q", "g", func(ctx context.Context, m *client.Delivery) error {
		defer close(left)
		if _, err := m.Tx(ctx); err != nil {
			return err
		}
		runtime.Goexit()
		return nil
	}, client.ConsumeOptions{})
	<-left
	if err := c.ends(); err != nil {
		t.Fatal(err)
	}
	cl.Close()
	if got := one[string](d, state); got != "1 0 0 0" {
		t.Errorf("lag, in flight, retrying and dead letters: %s, want the message to wait", got)
	}
}

// In an Ordered group a message that fails holds up what its policy says, and the order of a key stays.
func TestOrderedGroupsKeepTheOrderOfAKeyWhenMessagesFail(t *testing.T) {
	t.Parallel()
	for _, policy := range []string{"Block", "Skip", "Park"} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			d := newQueue(t, ", 'Ordered', p_max_attempts => 3, p_failure_policy => '"+policy+"'")
			d.publish(200, 10)
			var mu sync.Mutex
			done := map[string][]int64{}
			c := d.consume(d.client(client.Options{}), "q", "g", func(_ context.Context, m *client.Delivery) error {
				mu.Lock()
				defer mu.Unlock()
				if m.Position%20 == 0 && m.Attempt == 1 {
					return client.RetryAfter(errors.New("fails at first"), time.Millisecond)
				}
				if last := done[m.Key]; len(last) == 0 || last[len(last)-1] < m.Position {
					done[m.Key] = append(last, m.Position)
				} else if !slices.Contains(last, m.Position) {
					t.Errorf("position %d of key %s was handled for the first time after %d", m.Position, m.Key, last[len(last)-1])
				}
				return nil
			}, client.ConsumeOptions{Concurrency: 4})
			d.becomes("0 0 0 0", state)
			if err := c.ends(); err != nil {
				t.Fatal(err)
			}
			for key, positions := range done {
				if len(positions) != 20 {
					t.Errorf("%d messages of key %s were handled, want 20", len(positions), key)
				}
			}
		})
	}
}

// A claim is kept for as long as its handlers take, and acks do not wait for the slowest of a claim.
func TestALeaseIsExtendedWhileAHandlerWorks(t *testing.T) {
	t.Parallel()
	d := newQueue(t, "")
	d.publish(3, 3)
	var r recorder
	release := make(chan struct{})
	c := d.consume(d.client(client.Options{}), "q", "g", func(ctx context.Context, m *client.Delivery) error {
		r.add(string(m.Payload))
		if string(m.Payload) != "1" {
			return nil
		}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}, client.ConsumeOptions{Lease: 4 * time.Second}) // it is extended at half of that, and a busy machine has as long
	d.becomes("0 1 0 0", state) // the two others are settled
	began := one[time.Time](d, "select clock_timestamp()")
	d.becomes("true", "select (clock_timestamp() > $1::timestamptz + interval '5 s')::text", began)
	if n := one[int](d, "select count(*) from millrace.receive('q', 'g', 'somebody else')"); n != 0 {
		t.Error("somebody else was given a message that is being handled")
	}
	close(release)
	d.becomes("0 0 0 0", state)
	if err := c.ends(); err != nil || r.count("1") != 1 {
		t.Errorf("%v, handled %d times", err, r.count("1"))
	}
}

// A handler learns that its messages are somebody else's, and nothing of it counts.
func TestAHandlerIsToldThatItsClaimIsLost(t *testing.T) {
	t.Parallel()
	d := newQueue(t, "")
	d.publish(1, 1)
	var causes recorder
	started := make(chan struct{}, 10)
	var again atomic.Bool
	c := d.consume(d.client(client.Options{}), "q", "g", func(ctx context.Context, _ *client.Delivery) error {
		started <- struct{}{}
		if again.Swap(true) {
			return nil
		}
		<-ctx.Done()
		causes.add(fmt.Sprint(context.Cause(ctx)))
		return ctx.Err()
	}, client.ConsumeOptions{Member: "m", Lease: time.Second})
	<-started
	d.run("select millrace.leave('q', 'g', 'm')")
	<-started
	d.becomes("0 0 0 0", state)
	if err := c.ends(); err != nil || !slices.Equal(causes.all(), []string{client.ErrClaimLost.Error()}) {
		t.Errorf("%v, the causes are %q", err, causes.all())
	}
}

// A consumer that stops lets its handlers finish, and gives back what it has not begun, as if it had never been delivered.
func TestStoppingInOrder(t *testing.T) {
	t.Parallel()
	d := newQueue(t, "")
	d.publish(50, 5)
	var r recorder
	working, release := make(chan struct{}, 50), make(chan struct{})
	cl := d.client(client.Options{})
	c := d.consume(cl, "q", "g", func(ctx context.Context, m *client.Delivery) error {
		working <- struct{}{}
		<-release
		r.add(string(m.Payload))
		return ctx.Err()
	}, client.ConsumeOptions{Concurrency: 2})
	<-working
	<-working
	c.stop()
	select {
	case <-c.done:
		t.Fatal("Consume ended while handlers were at work")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	if err := c.ends(); err != nil || len(r.all()) != 2 {
		t.Errorf("%v, %d messages were handled, want 2", err, len(r.all()))
	}
	if got := one[string](d, `select count(*) || ' ' || max(attempt) from millrace.receive('q', 'g', 'next', 100)`); got != "48 1" {
		t.Errorf("the next member got %s messages and attempt, want 48 1", got)
	}
}

// Handlers that take too long to stop are told so, and their messages come again without having counted as a failure.
func TestStoppingHasALimit(t *testing.T) {
	t.Parallel()
	d := newQueue(t, "")
	d.publish(1, 1)
	working := make(chan struct{})
	var cause error
	c := d.consume(d.client(client.Options{}), "q", "g", func(ctx context.Context, _ *client.Delivery) error {
		close(working)
		<-ctx.Done()
		cause = context.Cause(ctx)
		return ctx.Err()
	}, client.ConsumeOptions{StopTimeout: 20 * time.Millisecond})
	<-working
	if err := c.ends(); !errors.Is(err, client.ErrStopTimeout) || !errors.Is(cause, client.ErrStopping) {
		t.Errorf("Consume ended with %v, its handler with %v", err, cause)
	}
	if got := one[int](d, `select attempt from millrace.receive('q', 'g', 'next')`); got != 1 {
		t.Errorf("the next member got attempt %d, want 1", got)
	}
}

// Connections that are cut are trouble that passes.
func TestConsumingGoesOnAfterTrouble(t *testing.T) {
	t.Parallel()
	d := newQueue(t, "")
	var r recorder
	d.consume(d.client(client.Options{Pool: client.PoolOptions{ApplicationName: "cut"}}), "q", "g", func(_ context.Context, m *client.Delivery) error {
		r.add(string(m.Payload))
		return nil
	}, client.ConsumeOptions{})
	for round := range 3 {
		d.run("select millrace.publish('q', to_jsonb($1::integer))", round)
		d.becomes("0 0 0 0", state)
		d.run("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'cut' and datname = current_database()")
	}
	d.run("select millrace.publish('q', '3')")
	d.becomes("0 0 0 0", state)
	if len(unique(r.all())) != 4 {
		t.Errorf("handled %v", r.all())
	}
}

// What cannot be consumed is said at once, and when it happens later.
func TestConsumeReturnsWhatNobodyButThePersonCanRepair(t *testing.T) {
	t.Parallel()
	d := newQueue(t, "")
	cl := d.client(client.Options{PollInterval: 10 * time.Millisecond})
	handler := func(context.Context, *client.Delivery) error { return nil }
	for _, missing := range [][2]string{{"nothing", "g"}, {"q", "nobody"}} {
		if err := cl.Consume(d.ctx, missing[0], missing[1], handler, client.ConsumeOptions{}); !errors.Is(err, client.ErrNotFound) {
			t.Errorf("%v: %v", missing, err)
		}
	}
	c := d.consume(cl, "q", "g", handler, client.ConsumeOptions{})
	d.publish(1, 1)
	d.becomes("0 0 0 0", state)
	d.run("select millrace_engine.drop_group('q', 'g')")
	select {
	case <-c.done:
		if !errors.Is(c.err, client.ErrNotFound) {
			t.Error(c.err)
		}
	case <-d.ctx.Done():
		t.Error("Consume goes on without its group")
	}
}

// Tail goes on where it was when its connections are cut, and ends with its context.
func TestTailWaitsAndGoesOn(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.run("select millrace.create_stream('s')")
	cl := d.client(client.Options{Pool: client.PoolOptions{ApplicationName: "tail"}})
	ctx, stop := context.WithCancel(d.ctx)
	got := make(chan client.Message)
	ended := make(chan error, 1)
	go func() {
		for m, err := range cl.Tail(ctx, "s", client.First) {
			if err != nil {
				ended <- err
				return
			}
			got <- m
		}
	}()
	for n := range 4 {
		d.run(`select millrace.publish('s', to_jsonb($1::integer), null, '{"large": 9007199254740993}')`, n)
		m := <-got
		if string(m.Payload) != fmt.Sprint(n) || fmt.Sprint(m.Headers["large"]) != "9007199254740993" || m.CreatedAt.IsZero() {
			t.Errorf("message %d is %+v", n, m)
		}
		d.run("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'tail' and datname = current_database()")
	}
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	// With connections of its own: those of the pool above have been cut.
	for _, err := range d.client(client.Options{}).Read(d.ctx, "nothing", client.First) {
		if !errors.Is(err, client.ErrNotFound) {
			t.Error(err)
		}
	}
}

// Publishing tells what is wrong, and takes part in the caller's transaction.
func TestPublishing(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.run("select millrace.create_stream('s', p_priorities => 2)")
	cl := d.client(client.Options{})
	rollback := errors.New("roll back")
	err := cl.Transaction(d.ctx, func(tx pgx.Tx) error {
		if _, err := cl.In(tx).Publish(d.ctx, "s", client.NewMessage{Payload: []byte("1")}); err != nil {
			return err
		}
		return rollback
	})
	if !errors.Is(err, rollback) || one[int](d, "select count(*) from millrace.s") != 0 {
		t.Errorf("%v; a message that was rolled back is there", err)
	}
	if p, err := cl.Publish(d.ctx, "s", client.NewMessage{Payload: []byte("2"), Delay: time.Hour}); err != nil || p != 0 {
		t.Errorf("a delayed message has position %d, %v", p, err)
	}
	twice := client.NewMessage{Key: "k", Headers: client.Headers{"a": 1}, Payload: []byte("3"), DedupeKey: "d", Priority: 1}
	first, err := cl.Publish(d.ctx, "s", twice)
	second, err2 := cl.Publish(d.ctx, "s", twice)
	if first != second || err != nil || err2 != nil || one[string](d, `select concat_ws(' ', count(*), max(key), max(headers::text)) from millrace."s.p1"`) != `1 k {"a": 1}` {
		t.Errorf("positions %d and %d, %v %v", first, second, err, err2)
	}
	for what, m := range map[string]client.NewMessage{"no payload": {}, "no JSON": {Payload: []byte("{")}, "a header that is no JSON": {Payload: []byte("1"), Headers: client.Headers{"f": func() {}}}} {
		if _, err := cl.Publish(d.ctx, "s", m); !errors.Is(err, client.ErrRefused) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := cl.Publish(d.ctx, "nothing", client.NewMessage{Payload: []byte("1")}); !errors.Is(err, client.ErrNotFound) {
		t.Error(err)
	}
	// A stream that was made anew with other payloads is noticed.
	d.run("select millrace_engine.drop_stream('s')")
	d.run("select millrace.create_stream('s', p_payload_type => 'Bytes')")
	for range 2 {
		_, err = cl.Publish(d.ctx, "s", client.NewMessage{Payload: []byte{0xff}, DedupeKey: "e"}) // the first may be refused
	}
	if err != nil {
		t.Error(err)
	}
}

// A history that is longer than one round trip is read whole, in parts, and within a transaction.
func TestHistories(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.run("select millrace.create_stream('e', p_versions => true)")
	cl := d.client(client.Options{})
	events := make([]client.NewEvent, 2500)
	for i := range events {
		events[i] = client.NewEvent{Payload: fmt.Append(nil, i)}
	}
	if a, err := cl.Append(d.ctx, "e", "k", client.NoVersion, events...); err != nil || a.Version != 2500 {
		t.Fatal(a, err)
	}
	count := func(n int, _ client.Event) (int, error) { return n + 1, nil }
	err := cl.Transaction(d.ctx, func(tx pgx.Tx) error {
		s := cl.In(tx)
		if _, err := s.Append(d.ctx, "e", "k", 2500, events[0]); err != nil {
			return err
		}
		n, version, err := client.Aggregate(d.ctx, s, "e", "k", 0, count)
		if n != 2501 || version != 2501 {
			t.Errorf("%d events up to version %d within the transaction", n, version)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	part, err := cl.ReadEntity(d.ctx, "e", "k", client.ReadOptions{From: 999, To: 2001})
	if err != nil || len(part) != 1003 || part[0].Version != 999 || part[1002].Version != 2001 {
		t.Errorf("%d events, %v", len(part), err)
	}
	if n, version, err := client.Aggregate(d.ctx, cl.Session, "e", "new", 7, count); n != 7 || version != 0 || err != nil {
		t.Error(n, version, err)
	}
	var conflict *client.VersionError
	if _, err := cl.Append(d.ctx, "e", "k", 5, events[0]); !errors.As(err, &conflict) || conflict.In != "e" || conflict.Present != 2501 || conflict.Expected != 5 || !strings.Contains(err.Error(), "2501") {
		t.Errorf("%v", err)
	}
	broken := errors.New("broken")
	if _, _, err := client.Aggregate(d.ctx, cl.Session, "e", "k", 0, func(int, client.Event) (int, error) { return 0, broken }); !errors.Is(err, broken) {
		t.Error(err)
	}
}

// logs is a slog.Handler's output.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *logs) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Workflows have versions, trees and locks, in the caller's transaction, too.
func TestWorkflows(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.run("select millrace.create_memory('m')")
	cl := d.client(client.Options{})
	if _, err := cl.OpenMemory(d.ctx, "nothing"); !errors.Is(err, client.ErrNotFound) {
		t.Error(err)
	}
	m, err := cl.OpenMemory(d.ctx, "m")
	if err != nil {
		t.Fatal(err)
	}
	write := func(m *client.Memory, subject string, w client.WorkflowWrite) error {
		w.State = []byte("{}")
		_, err := m.Write(d.ctx, subject, w)
		return err
	}
	rollback := errors.New("roll back")
	err = cl.Transaction(d.ctx, func(tx pgx.Tx) error {
		return errors.Join(write(m.In(tx), "never", client.WorkflowWrite{}), rollback)
	})
	if w, readErr := m.Read(d.ctx, "never"); !errors.Is(err, rollback) || w.Version != 0 || readErr != nil {
		t.Errorf("%v; a write that was rolled back is there: %+v %v", err, w, readErr)
	}
	if err := errors.Join(write(m, "root", client.WorkflowWrite{}), write(m, "root/a", client.WorkflowWrite{Parent: "root"}), write(m, "root/a/b", client.WorkflowWrite{Parent: "root/a", Completed: true})); err != nil {
		t.Fatal(err)
	}
	children, err := m.Children(d.ctx, "root")
	all, err2 := m.Descendants(d.ctx, "root")
	if len(children) != 1 || children[0].Subject != "root/a" || len(all) != 2 || all[1].CompletedAt.IsZero() || err != nil || err2 != nil {
		t.Errorf("%+v %v\n%+v %v", children, err, all, err2)
	}
	var conflict *client.VersionError
	if err := write(m, "root", client.WorkflowWrite{Expected: 7}); !errors.As(err, &conflict) || conflict.In != "m" || conflict.Key != "root" || conflict.Present != 1 || conflict.Expected != 7 {
		t.Errorf("%v", err)
	}
	lock, err := m.TryLock(d.ctx, "root", client.LockOptions{TTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Lock(d.ctx, "root", client.LockOptions{Retries: 1, InitialDelay: time.Millisecond}); !errors.Is(err, client.ErrLocked) {
		t.Error(err)
	}
	before := lock.Expires()
	if err := lock.Extend(d.ctx, time.Hour); err != nil || !lock.Expires().After(before) {
		t.Error(err, lock.Expires())
	}
	if err := write(m, "root", client.WorkflowWrite{Expected: 1}); !errors.Is(err, client.ErrLocked) {
		t.Error(err)
	}
	if err := errors.Join(write(m, "root", client.WorkflowWrite{Expected: 1, Lock: lock}), lock.Unlock(d.ctx)); err != nil {
		t.Error(err)
	}
	if err := lock.Unlock(d.ctx); !errors.Is(err, client.ErrLockEnded) {
		t.Error(err)
	}
	if n, err := m.Delete(d.ctx, "root", client.AnyVersion, nil); n != 3 || err != nil {
		t.Error(n, err)
	}
}

// Frames are appended with the stream's payload type, read by range, and tailed beyond connections that are cut.
func TestFrames(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.run("select millrace.create_stream('f', p_frames => '{}')")
	d.run("select millrace.create_stream('raw', p_frames => '{}', p_payload_type => 'Bytes')")
	d.run("select millrace.create_stream('none')")
	cl, tailing := d.client(client.Options{}), d.client(client.Options{Pool: client.PoolOptions{ApplicationName: "tail"}})
	if a, err := cl.AppendFrame(d.ctx, "raw", "k", client.NewFrame{Payload: []byte{0xff}, Fields: client.Headers{"n": 9007199254740993}, CorrelationID: "c"}); err != nil || a.Count != 1 || a.Position != 1 {
		t.Errorf("%+v %v", a, err)
	}
	raw, err := cl.ReadFrames(d.ctx, "raw", "k", client.FrameRange{})
	if err != nil || len(raw) != 1 || raw[0].Payload[0] != 0xff || fmt.Sprint(raw[0].Fields["n"]) != "9007199254740993" || raw[0].CorrelationID != "c" || raw[0].Mode != client.Durable {
		t.Errorf("%+v %v", raw, err)
	}
	for stream, want := range map[string]error{"none": client.ErrRefused, "nothing": client.ErrNotFound} {
		if _, err := cl.AppendFrame(d.ctx, stream, "k", client.NewFrame{Payload: []byte("1")}); !errors.Is(err, want) {
			t.Errorf("%s: %v", stream, err)
		}
	}
	if s, err := cl.ReadSummary(d.ctx, "f", "k"); s != nil || err != nil {
		t.Errorf("%+v %v", s, err)
	}
	ctx, stop := context.WithCancel(d.ctx)
	got, ended := make(chan client.Frame), make(chan error, 1)
	go func() {
		for f, err := range tailing.TailFrames(ctx, "f", "k", "0", client.TailOptions{DurableOnly: true}) {
			if err != nil {
				ended <- err
				return
			}
			got <- f
		}
	}()
	for n := range 4 {
		for _, mode := range []client.FrameMode{client.BestEffortLive, client.Durable} {
			if _, err := cl.AppendFrame(d.ctx, "f", "k", client.NewFrame{Mode: mode, Payload: fmt.Append(nil, n)}); err != nil {
				t.Fatal(err)
			}
		}
		if f := <-got; string(f.Payload) != fmt.Sprint(n) || f.Mode != client.Durable || f.Count != int64(2*n+2) {
			t.Errorf("frame %d is %+v", n, f)
		}
		d.run("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'tail' and datname = current_database()")
	}
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
