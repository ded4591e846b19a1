package seeds

import (
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// handler makes the group of a handler.
func (d *database) handler(name, filter string, options ...string) {
	d.t.Helper()
	more := ""
	for _, o := range options {
		more += ", " + o
	}
	d.admin("select millrace.create_group('events', '"+name+"', p_filter => $1"+more+")", filter)
}

// dispatch publishes an event to a destination, with more headers.
func (d *database) dispatch(to, payload, headers string) {
	d.t.Helper()
	d.rows(`select millrace.publish('events', $2, 'w-1', $3::jsonb || jsonb_build_object('to', $1::text))`, to, payload, headers)
}

// cut splits a row of two columns.
func cut(row string) (first, second string) {
	first, second, _ = strings.Cut(row, "|")
	return first, second
}

// clock makes the engine's clock stand still until a test moves it.
func (d *database) clock() {
	d.t.Helper()
	d.admin("create table public.test_clock as select clock_timestamp() as now")
	d.admin("grant select on public.test_clock to public")
	d.admin(`create or replace function millrace_engine.clock() returns timestamptz language sql volatile parallel safe as 'select now from public.test_clock'`)
}

// handle receives and acks until nothing comes, and returns the payloads in the order in which they came.
func (d *database) handle(group string) (payloads []string) {
	d.t.Helper()
	for {
		got := d.rows(`select payload, claim from millrace.receive('events', $1, 'worker') order by position`, group)
		if len(got) == 0 {
			return payloads
		}
		for _, row := range got {
			payload, _ := cut(row)
			payloads = append(payloads, payload)
		}
		_, claim := cut(got[0])
		d.rows("select millrace.ack($1)", claim)
	}
}

func (d *database) handled(group string, want ...string) {
	d.t.Helper()
	if got := d.handle(group); !slices.Equal(got, want) {
		d.t.Errorf("%s got %v, want %v", group, got, want)
	}
}

// Events go where `to` says, each handler has its own queue, and what one does is nothing to another.
func TestSeed_A01_RoutingByDestination(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('events')")
	d.handler("calculator", `{"headers": {"to": "calculator"}}`)
	d.handler("mailer", `{"headers": {"to": ["mailer", "newsletter"]}}`)
	d.dispatch("mailer", "1", "{}")
	d.dispatch("calculator", "2", "{}")
	d.dispatch("newsletter", "3", "{}")
	d.handled("calculator", "2")
	d.handled("mailer", "1", "3")
	d.handled("calculator")
	// A handler sends to the next one in the transaction that settles its own event.
	d.dispatch("calculator", "4", "{}")
	claim := value[string](d, "select claim from millrace.receive('events', 'calculator', 'worker')")
	tx, err := d.app.Begin(d.ctx)
	if err != nil {
		t.Fatal(err)
	}
	d.rowsOf(tx, "select millrace.ack($1)", claim)
	d.rowsOf(tx, `select millrace.publish('events', '5', null, '{"to": "mailer"}')`)
	d.handled("mailer")
	if err := tx.Commit(d.ctx); err != nil {
		t.Fatal(err)
	}
	d.handled("mailer", "5")
}

// A queue is there without its handler, and keeps what came meanwhile, retries and dead letters included.
func TestSeed_A02_PersistentQueuePerHandler(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('events')")
	d.handler("mailer", `{"headers": {"to": "mailer"}}`)
	d.dispatch("mailer", "1", "{}")
	d.dispatch("mailer", "2", "{}")
	first := d.connect(d.appDSN)
	claim := valueOf[string](d, first, "select claim from millrace.receive('events', 'mailer', 'worker-1', 1)")
	d.rowsOf(first, "select millrace.nack($1, array[1], 0, 'no')", claim)
	if err := first.Close(d.ctx); err != nil {
		t.Fatal(err)
	}
	d.dispatch("mailer", "3", "{}")
	d.handler("mailer", `{"headers": {"to": "mailer"}}`) // registering it again changes nothing
	d.handled("mailer", "1", "2", "3")
}

// Deliveries, first delay, backoff up to the longest delay, then a dead letter with its history, and back again.
func TestSeed_A03_RetriesAndDeadLetters(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('events')")
	err := pgstream.ApplyGroup(d.ctx, d.owner, pgstream.GroupSpec{Stream: "events", Name: "mailer", MaxAttempts: 4,
		BackoffInitial: 10e9, BackoffMax: 30e9, Filter: pgstream.Filter{Headers: map[string]any{"to": "mailer"}}})
	if err != nil {
		t.Fatal(err)
	}
	d.clock()
	d.dispatch("mailer", "1", "{}")
	for attempt, bounds := range [][2]float64{{5, 10}, {10, 20}, {15, 30}} {
		got := d.rows("select claim, attempt from millrace.receive('events', 'mailer', 'worker')")
		if len(got) != 1 {
			t.Fatalf("attempt %d: %v", attempt+1, got)
		}
		claim, _ := cut(got[0])
		d.rows("select millrace.nack($1, array[1], p_reason => 'no')", claim)
		wait := valueOf[float64](d, d.owner, "select extract(epoch from visible_at - millrace_engine.clock())::float8 from millrace_engine.delivery")
		if wait < bounds[0]-0.01 || wait > bounds[1]+0.01 {
			t.Errorf("attempt %d is followed after %v s, want %v", attempt+1, wait, bounds)
		}
		d.handled("mailer")
		d.admin("update public.test_clock set now = now + interval '30 seconds'")
	}
	claim := value[string](d, "select claim from millrace.receive('events', 'mailer', 'worker')")
	d.rows("select millrace.nack($1, array[1], p_reason => 'still no')", claim)
	d.same("dead letters", []string{"1|4|still no|4"}, "select position, attempts, reason, jsonb_array_length(errors) from millrace.dead_letters('events', 'mailer')")
	d.same("redriven", []string{"1"}, "select millrace.redrive('events', 'mailer')")
	d.handled("mailer", "1")
}

// The end of a workflow is an event to whoever began it, and a listener is a handler of that name.
func TestSeed_A04_WorkflowCompletion(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('events')")
	d.handler("workflow", `{"headers": {"to": "order.workflow"}}`)
	d.handler("listener", `{"headers": {"to": "shop.frontend"}}`)
	d.dispatch("order.workflow", `{"order": 7}`, `{"source": "shop.frontend"}`)
	row := d.rows("select claim, headers ->> 'source' from millrace.receive('events', 'workflow', 'worker')")[0]
	claim, source := cut(row)
	d.rows("select millrace.ack($1)", claim)
	d.handled("listener")
	d.rows(`select millrace.publish('events', '"done"', 'w-1', jsonb_build_object('to', $1::text, 'source', 'order.workflow'))`, source)
	d.handled("listener", "done")
	d.handled("workflow")
}

// Events with a domain wait for somebody outside, in a queue of their own, and not for the handler they are for; the answer comes back as an event.
func TestSeed_A05_DomainedEvents(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('events')")
	d.handler("refunds", `{"headers": {"to": "refunds"}, "without_headers": ["domain"]}`)
	d.handler("people", `{"headers": {"domain": "human.interaction"}}`)
	d.handler("apis", `{"headers": {"domain": ["external.api", "external.queue"]}}`)
	d.dispatch("refunds", "1", "{}")
	d.dispatch("refunds", "2", `{"domain": "human.interaction", "source": "order.workflow"}`)
	d.dispatch("refunds", "3", `{"domain": "external.api"}`)
	d.handled("refunds", "1")
	d.handled("apis", "3")
	row := d.rows("select claim, headers ->> 'to' from millrace.receive('events', 'people', 'desk')")[0]
	claim, to := cut(row)
	d.rows("select millrace.ack($1), millrace.publish('events', '4', 'w-1', jsonb_build_object('to', $2::text))", claim, to)
	d.handled("refunds", "4")
	d.handled("people")
}

// Active, queued and total of every queue in one call, of each its own messages.
func TestSeed_A07_CountsPerQueue(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('events')")
	for _, name := range []string{"a", "b", "c"} {
		d.handler(name, `{"headers": {"to": "`+name+`"}}`)
	}
	for i := range 30 {
		d.dispatch([]string{"a", "b", "a"}[i%3], "0", "{}")
	}
	claim := value[string](d, "select max(claim) from millrace.receive('events', 'a', 'worker', 5)")
	d.rows("select millrace.nack($1, array[1], 3600)", claim)
	d.same("counts", []string{"a|4|16|20", "b|0|10|10", "c|0|0|0"},
		`select "group", active, queued, active + queued from millrace.stats('events') order by 1`)
}

// What no handler takes is kept, counted and handled by whoever asks for it, also when a handler goes.
func TestSeed_A08_UnroutableEvents(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('events', p_max_messages => 10)")
	d.handler("a", `{"headers": {"to": "a"}}`)
	d.handler("b", `{"headers": {"to": "b"}}`)
	d.handler("nobody", `{"unrouted": true}`)
	d.dispatch("a", "1", "{}")
	d.dispatch("typo", "2", "{}")
	d.dispatch("b", "3", "{}")
	if _, err := pgstream.Maintain(d.ctx, d.owner); err != nil {
		t.Fatal(err)
	}
	d.same("counted", []string{"1|1"}, `select queued, lag from millrace.stats('events') where "group" = 'nobody'`)
	d.admin("select millrace_engine.drop_group('events', 'b')")
	d.admin("select millrace.trim('events', p_before => 4)") // what the log forgets is still there
	d.handled("nobody", "2", "3")
	d.handled("a")
}

// The options of a handler: priority, expiry, start-after, singleton by key and interval, queue policies. Concurrency and the warning size are shown by
// TestSeed_A09_Concurrency and by TestABacklogIsWarnedOfOnce in internal/controller.
func TestSeed_A09_HandlerOptions(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('urgent', p_priorities => 3)")
	d.admin("select millrace.create_group('urgent', 'g')")
	d.rows(`select millrace.publish('urgent', '"low"'), millrace.publish('urgent', '"high"', p_priority => 2)`)
	d.same("priority", []string{"high"}, "select payload from millrace.receive('urgent', 'g', 'worker', 1)")

	d.admin("select millrace.create_stream('events')")
	d.clock()
	d.handler("a", `{"headers": {"to": "a"}}`, "p_ack_wait_seconds => 900")
	d.rows(`select millrace.publish('events', '1', null, '{"to": "a"}', p_delay_seconds => 60),
		millrace.publish('events', '2', null, '{"to": "a"}', p_deliver_at => millrace_engine.clock() + interval '2 minutes')`)
	d.handled("a")
	d.admin("update public.test_clock set now = now + interval '1 minute'")
	d.rows("select millrace_engine.move_due(10)")
	d.same("after so many seconds", []string{"1"}, "select payload from millrace.receive('events', 'a', 'worker')")
	d.admin("update public.test_clock set now = now + interval '1 minute'")
	d.rows("select millrace_engine.move_due(10)")
	d.handled("a", "2")
	d.admin("update public.test_clock set now = now + interval '14 minutes'") // the first has expired
	d.handled("a", "1")

	d.admin("update public.test_clock set now = date_trunc('hour', now)")
	throttled := `select millrace.publish('events', $1, null, '{"to": "a"}', p_dedupe_key => 'k', p_throttle_seconds => 60, p_next_slot => $2)`
	d.same("the first of a slot", []string{"3"}, throttled, "3", false)
	d.admin("update public.test_clock set now = now + interval '30 seconds'") // in the same slot: it began with the minute, and not with the message
	d.same("throttled", []string{"3"}, throttled, "4", false)
	d.same("for the next slot", []string{"null"}, throttled, "5", true)
	d.same("which is taken", []string{"null"}, throttled, "6", true)
	d.handled("a", "3")
	d.admin("update public.test_clock set now = now + interval '29 seconds'")
	d.rows("select millrace_engine.move_due(10)")
	d.handled("a")
	d.admin("update public.test_clock set now = now + interval '1 second'")
	d.rows("select millrace_engine.move_due(10)")
	d.handled("a", "5")

	// Three of one key are published and received, then two more: how many wait at first, how many are handed out each time, how many wait and are active at last.
	for policy, want := range map[string][]string{
		"standard": {"3", "3", "2", "0|5"}, "short": {"1", "1", "1", "0|2"}, "singleton": {"3", "1", "0", "4|1"}, "stately": {"1", "1", "0", "1|1"},
	} {
		d.admin("select millrace.create_stream($1)", policy)
		d.admin("select millrace.create_group($1, 'g', p_queue_policy => initcap($1))", policy)
		publish := func(n int) {
			d.rows("select millrace.publish($1, '{}', 'k') from generate_series(1, $2)", policy, n)
			if _, err := pgstream.Maintain(d.ctx, d.owner); err != nil {
				t.Fatal(err)
			}
		}
		publish(3)
		d.same(policy+": queued", want[:1], "select queued from millrace.stats($1)", policy)
		d.same(policy+": handed out", want[1:2], "select count(*) from millrace.receive($1, 'g', 'worker')", policy)
		publish(2)
		d.same(policy+": handed out then", want[2:3], "select count(*) from millrace.receive($1, 'g', 'worker')", policy)
		d.same(policy+": in the end", want[3:], "select queued, active from millrace.stats($1)", policy)
	}
}

// Any number of workers handle one queue, each event by one of them.
func TestSeed_A09_Concurrency(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.admin("select millrace.create_stream('events')")
	d.handler("a", `{"headers": {"to": "a"}}`)
	for i := range 40 {
		d.dispatch([]string{"a", "b"}[i%2], "0", "{}")
	}
	var lock sync.Mutex
	seen := map[string]int{}
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for {
				got, err := query(d.ctx, d.app, "select position, claim from millrace.receive('events', 'a', gen_random_uuid()::text, 3)")
				if err != nil || len(got) == 0 {
					if err != nil {
						t.Error(err)
					}
					return
				}
				lock.Lock()
				for _, row := range got {
					position, _ := cut(row)
					seen[position]++
				}
				lock.Unlock()
				_, claim := cut(got[0])
				if _, err := query(d.ctx, d.app, "select millrace.ack($1)", claim); err != nil {
					t.Error(err)
				}
			}
		})
	}
	workers.Wait()
	if len(seen) != 20 {
		t.Errorf("%d of 20 events were handled", len(seen))
	}
	for position, n := range seen {
		if n != 1 {
			t.Errorf("position %s was handled %d times", position, n)
		}
	}
}
