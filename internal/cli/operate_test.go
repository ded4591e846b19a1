package cli_test

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"
)

// shop makes a stream with two groups. billing has settled the first message, holds the second as the member w1, retries the third and gave up on the fourth;
// three more have not been handed out.
func shop(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders'), millrace.create_group('orders', 'billing'), millrace.create_group('orders', 'projection', 'Ordered')")
	w.run("select millrace.publish('orders', jsonb_build_object('id', i), 'customer-' || i) from generate_series(1, 7) i")
	claim := func() string {
		return one[string](w, "select claim from millrace.receive('orders', 'billing', 'w1', p_max => 1, p_lease_seconds => 3600)")
	}
	w.run("select millrace.ack($1)", claim())
	claim()
	w.run("select millrace.nack($1, array[3], 3000, 'printer is out of paper')", claim())
	w.run("select millrace.dead_letter($1, array[4], 'no such customer')", claim())
	return w
}

func TestLag(t *testing.T) {
	t.Parallel()
	w := shop(t)
	w.want(0, `
STREAM   GROUP        LAG   IN-FLIGHT   RETRY   DEAD   OLDEST   STATE
orders   billing      3     1           1       1      …   Active
orders   projection   7     0           0       0      …   Active
`, "lag")
	w.want(0, `
STREAM   GROUP     LAG   IN-FLIGHT   RETRY   DEAD   OLDEST   STATE    MODE     ACK-FLOOR   MEMBERS   HOLDERS   ERROR
orders   billing   3     1           1       1      …   Active   Shared   1           <none>    w1 (1)    …
`, "lag", "orders", "billing", "-o", "wide")
	groups := decode[struct {
		Stream, Group string
		Lag           int
		InFlight      int `json:"in_flight"`
		Retrying      int
		DeadLetters   int `json:"dead_letters"`
		Holders       []struct {
			Name     string
			Messages int
		}
	}](t, w.ok("lag", "orders", "-o", "json"))
	if len(groups) != 2 || groups[0].Group != "billing" || groups[0].Lag != 3 || groups[0].InFlight != 1 || groups[0].Retrying != 1 || groups[0].DeadLetters != 1 ||
		len(groups[0].Holders) != 1 || groups[0].Holders[0].Name != "w1" {
		t.Errorf("lag -o json: %+v", groups)
	}
	watch := w.start(nil, "lag", "orders", "billing", "--watch", "--interval", "10ms", "-o", "json")
	for line := watch.line(); !strings.Contains(line, "settled_per_second"); line = watch.line() {
		if !strings.Contains(line, `"group":"billing"`) {
			t.Errorf("it shows %s", line)
		}
	}
	if code := watch.interrupt(); code != 0 {
		t.Errorf("after SIGINT: exit code %d", code)
	}
}

func TestInspectAStream(t *testing.T) {
	t.Parallel()
	w := shop(t)
	w.run(`update millrace_engine.stream set max_age_seconds = 7200, owner = '{"cluster": "c1", "namespace": "shop", "name": "orders", "uid": "u"}'`)
	tx, err := w.Begin(w.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(w.ctx) }()
	var pid int
	if err := tx.QueryRow(w.ctx, "select pg_backend_pid() from set_config('application_name', 'importer', true), millrace.publish('orders', '{}')").Scan(&pid); err != nil {
		t.Fatal(err)
	}
	w.want(0, fmt.Sprintf(`
Stream:        orders
Owner:         shop/orders in Kubernetes, cluster c1
Payload:       JSON, at most 1.0 MiB
Partitions:    8
Priorities:    1
Versions:      no
Dedupe:        for 2m
Retention:     Limits, at most 2h
Positions:     1 to 8, readable up to 7
Messages:      8, …
Published:     …/s over the last minute
Delayed:       0
Open transactions that readers wait for:
  HOLDER …   PRIORITY   SINCE   USER …   APPLICATION   CLIENT …   STATE
  pid %d…   0 …   importer …   idle in transaction
  Readers go on when it has ended. Ask its owner, or: select pg_terminate_backend(<pid>)
Segments:
  SEGMENT   PRIORITY   FIRST    LAST     SIZE …   CURRENT
  0         0          1        7        …   yes
  1         0          <none>   <none>   …   no
  2         0          <none>   <none>   …   no
  3         0          <none>   <none>   …   no
Groups:
  GROUP        LAG   IN-FLIGHT   RETRY   DEAD   OLDEST   STATE
  billing      4     1           1       1      …   Active
  projection   8     0           0       0      …   Active
`, pid), "inspect", "orders")
	streams := decode[struct {
		Stream   string
		Horizon  int
		Stallers []struct{ Holder, Application string }
		Segments []struct{ Current bool }
		Groups   []struct{ Group string }
		Owner    struct{ Namespace string }
	}](t, w.ok("inspect", "orders", "-o", "json"))
	if s := streams[0]; s.Horizon != 7 || len(s.Stallers) != 1 || s.Stallers[0].Application != "importer" || len(s.Segments) != 4 || len(s.Groups) != 2 || s.Owner.Namespace != "shop" {
		t.Errorf("inspect -o json: %+v", s)
	}
}

// Who receives in a transaction and leaves it open keeps everybody else of the group from receiving; nothing else tells that.
func TestInspectNamesWhoReceivedAndLeftTheTransactionOpen(t *testing.T) {
	t.Parallel()
	w := shop(t)
	tx, err := w.Begin(w.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(w.ctx) }()
	var pid int
	if err := tx.QueryRow(w.ctx, "select pg_backend_pid() from set_config('application_name', 'naive', true), millrace.receive('orders', 'billing', 'naive', 1)").Scan(&pid); err != nil {
		t.Fatal(err)
	}
	_, out, _ := strings.Cut(w.ok("inspect", "orders", "billing"), "\nReceived, ")
	out, _, _ = strings.Cut(out, "\nRetries:")
	if !like(out, fmt.Sprintf(`and left the transaction open:
  HOLDER …   PRIORITY   SINCE   USER …   APPLICATION   CLIENT …   STATE …   WAITING
  pid %d…   0 …   naive …   idle in transaction   0
  Nobody else of the group receives until it has ended. Receive in autocommit, or commit at once. End it: select pg_terminate_backend(<pid>)`, pid)) {
		t.Errorf("inspect shows: Received, %s", out)
	}
	groups := decode[struct {
		Receivers []struct {
			Holder, Application string
			Waiting             int
		}
	}](t, w.ok("inspect", "orders", "billing", "-o", "json"))
	if r := groups[0].Receivers; len(r) != 1 || r[0].Application != "naive" || r[0].Holder != fmt.Sprintf("pid %d", pid) {
		t.Errorf("inspect -o json: %+v", r)
	}
}

// Whoever is on call may have nothing but the role of the applications.
func TestTheRuntimeRoleMayLookAtEverything(t *testing.T) {
	t.Parallel()
	w := shop(t)
	role := "on_call_" + one[string](w, "select substr(md5(random()::text), 1, 12)") // roles belong to the server
	w.run("create role " + role + " login password 'secret'")
	t.Cleanup(func() {
		if _, err := w.Exec(context.Background(), "drop owned by "+role+"; drop role "+role); err != nil {
			t.Error(err)
		}
	})
	w.ok("migrate", "run", "--runtime-role", role)
	w.run("select millrace.create_stream('orders', p_priorities => 2)") // with segments that nobody has granted since
	_, want, _ := strings.Cut(w.ok("inspect", "orders"), "\nSegments:")
	want, _, _ = strings.Cut(want, "\nGroups:")
	u, err := url.Parse(w.dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, "secret")
	w.env = append(w.env, "MILLRACE_DATABASE_URL="+u.String())
	for _, args := range [][]string{
		{"lag", "-o", "wide"}, {"inspect", "orders"}, {"inspect", "orders", "billing"}, {"inspect", "orders", "--position", "4"},
		{"trim", "orders", "--keep", "1", "--dry-run"}, {"redrive", "orders", "billing", "--dry-run"},
	} {
		out := w.ok(args...)
		if _, got, ok := strings.Cut(out, "\nSegments:"); ok {
			if got, _, _ = strings.Cut(got, "\nGroups:"); got != want {
				t.Errorf("the role is shown the segments\n%s\nthe owner\n%s", got, want)
			}
		}
	}
}

// Delayed messages that nobody moves say that no scout runs.
func TestInspectTellsOfDelayedMessagesThatAreLate(t *testing.T) {
	t.Parallel()
	w := shop(t)
	delayed := func(want string) {
		t.Helper()
		for line := range strings.Lines(w.ok("inspect", "orders")) {
			if text, ok := strings.CutPrefix(line, "Delayed:"); ok && !like(text, want) {
				t.Errorf("inspect says %q, want %q", text, want)
			}
		}
	}
	w.run("select millrace.publish('orders', '{}', p_delay_seconds => 7200)")
	delayed("1, the first is due in …")
	w.run("update millrace_engine.delayed set due_at = now() - interval '5 minutes'")
	delayed("1, the first was due 5m… ago: no scout runs. Start the manager, a Processor, or: manager schema serve")
	w.run("select millrace_engine.scout_lease('somebody', 3600)")
	delayed("1, the first was due 5m… ago")
}

func TestInspectAGroup(t *testing.T) {
	t.Parallel()
	w := shop(t)
	w.want(0, `
Group:         billing of stream orders
Owner:         <none>
State:         Active
Mode:          Shared
Start:         Earliest
Filter:        <none>
Ack wait:      30s
Attempts:      at most 10, 1s to 5m apart
Lag:           3, settled up to position 1
In flight:     1
Oldest:        …
Error:         …
Members:       <none>
Holders:
  MEMBER   MESSAGES
  w1       1
Retries:
  POSITION   KEY          ATTEMPTS   STATE     DUE …   ERROR
  3          customer-3   1          waiting   in …   printer is out of paper
Dead letters:
  POSITION   KEY          ATTEMPTS   DEAD…REASON
  4          customer-4   1          …   no such customer
`, "inspect", "orders", "billing")
	w.run("select from millrace.receive('orders', 'projection', 'p1', p_max => 1)")
	if out := w.ok("inspect", "orders", "projection"); !strings.Contains(out, "Mode:          Ordered, failure policy Block\n") || !strings.Contains(out, "  p1       0-7          in ") {
		t.Errorf("an Ordered group:\n%s", out)
	}
	groups := decode[struct {
		FailurePolicy string `json:"failure_policy"`
		Waiting       []struct{ Position int }
		Dead          []struct{ Reason string }
	}](t, w.ok("inspect", "orders", "billing", "-o", "json"))
	if g := groups[0]; g.FailurePolicy != "Block" || len(g.Waiting) != 1 || g.Waiting[0].Position != 3 || len(g.Dead) != 1 || g.Dead[0].Reason != "no such customer" {
		t.Errorf("inspect -o json: %+v", g)
	}
}

func TestInspectAMessage(t *testing.T) {
	t.Parallel()
	w := shop(t)
	w.run("select millrace.create_group('orders', 'vip', p_filter => '{\"keys\": [\"customer-7\"]}')")
	w.run("select millrace.nack(claim, array[position], 3000, 'x') from millrace.receive('orders', 'vip', 'v1', p_max => 1)")
	where := func(position int) string {
		t.Helper()
		var all []string
		for _, g := range decode[struct {
			Groups []struct{ Group, State, Member string }
		}](t, w.ok("inspect", "orders", "--position", fmt.Sprint(position), "-o", "json"))[0].Groups {
			all = append(all, strings.TrimSpace(g.State+" "+g.Member))
		}
		return strings.Join(all, ", ")
	}
	for position, want := range map[int]string{
		1: "settled, waiting, filtered", 2: "held w1, waiting, filtered", 3: "retry, waiting, filtered", 4: "dead letter, waiting, filtered", 5: "waiting, waiting, filtered",
		7: "waiting, waiting, retry",
	} {
		if got := where(position); got != want {
			t.Errorf("position %d: %s; want %s", position, got, want)
		}
	}
	w.run("select millrace.ack_messages(claim, array[5]) from (select claim from millrace.receive('orders', 'billing', 'w2', p_max => 2, p_lease_seconds => 3600) limit 1) c")
	if first, second := where(5), where(6); !strings.HasPrefix(first, "settled, ") || !strings.HasPrefix(second, "held w2, ") {
		t.Errorf("a claim of which one message is acked: %s; %s", first, second)
	}
	w.want(0, `
Position:      4 of stream orders
Key:           customer-4
Created:       … (… ago)
Readable:      yes
Headers:       <none>
Payload:       {
                 "id": 4
               }
Groups:
  GROUP        STATE         ATTEMPTS   MEMBER   UNTIL    ERROR
  billing      dead letter   1          <none>   <none>   no such customer
  projection   waiting       0          <none>   <none>   <none>
  vip          filtered      0          <none>   <none>   <none>
`, "inspect", "orders", "--position", "4")
	w.run("select millrace.trim('orders', p_before => 7)")
	for position, want := range map[int]string{1: "settled, unknown, settled", 2: "held w1, unknown, settled", 4: "dead letter, unknown, settled", 5: "settled, unknown, settled", 6: "held w2, unknown, settled"} {
		if got := where(position); got != want {
			t.Errorf("position %d after the trim: %s; want %s", position, got, want)
		}
	}
	w.want(1, `error: position 8 of stream "orders" does not exist: the last is 7`, "inspect", "orders", "--position", "8")
}

// Groups that keep a queue of their own copy messages before anybody receives them, so what waits there need not have been tried.
func TestInspectAGroupWithAQueue(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders'), millrace.create_group('orders', 'jobs', p_queue_policy => 'Singleton')")
	w.run("select millrace.create_group('orders', 'nobody', p_filter => '{\"unrouted\": true}'), millrace.create_group('orders', 'blocked', 'Ordered')")
	w.run("select millrace.publish('orders', '{}', 'k' || i) from generate_series(1, 3) i")
	w.run("select millrace.nack(claim, array[position], 3000, 'no paper') from millrace.receive('orders', 'jobs', 'w1', p_max => 1)")
	w.run("select millrace.release(claim) from (select distinct claim from millrace.receive('orders', 'nobody', 'w1')) c")
	for range 2 {
		w.run("select millrace.nack(claim, array[position], 0, 'x') from millrace.receive('orders', 'blocked', 'w1', p_max => 1)")
	}
	w.want(0, `
Group:         jobs of stream orders
Owner:         <none>
State:         Active
Mode:          Shared, queue policy Singleton
Start:         Earliest
Filter:        <none>
Ack wait:      30s
Attempts:      at most 10, 1s to 5m apart
Lag:           2, queued up to position 3
In flight:     0
Oldest:        …
Error:         no paper…
Members:       <none>
Holders:       <none>
Queue:
  POSITION   KEY   ATTEMPTS   STATE     DUE …   ERROR
  2          k2    0          queued    now …   <none>
  3          k3    0          queued    now …   <none>
  1          k1    1          waiting   in …   no paper
Dead letters:  <none>
`, "inspect", "orders", "jobs")
	if out := w.ok("inspect", "orders", "nobody"); !strings.Contains(out, "Filter:        {\"unrouted\":true}\n") || !strings.Contains(out, "Queue:\n") {
		t.Errorf("a group for unrouted messages:\n%s", out)
	}
	if out := w.ok("inspect", "orders", "blocked"); !strings.Contains(out, "Deliveries:    2 of the message that was handed out most often\n") {
		t.Errorf("a group that stands still:\n%s", out)
	}
	states := map[string]string{}
	for _, g := range decode[struct {
		Groups []struct{ Group, State string }
	}](t, w.ok("inspect", "orders", "--position", "2", "-o", "json"))[0].Groups {
		states[g.Group] = g.State
	}
	if states["jobs"] != "queued" || states["nobody"] != "queued" || states["blocked"] != "waiting" {
		t.Errorf("position 2 is %v", states)
	}
	group := decode[struct {
		QueuePolicy string `json:"queue_policy"`
		Queued      int
		Active      int
	}](t, w.ok("inspect", "orders", "jobs", "-o", "json"))[0]
	if group.QueuePolicy != "Singleton" || group.Queued != 3 || group.Active != 0 {
		t.Errorf("inspect -o json: %+v", group)
	}
}

// deadLetters makes n of them in group billing of stream orders.
func deadLetters(t *testing.T, n int) *world {
	t.Helper()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders'), millrace.create_stream('repair'), millrace.create_group('orders', 'billing')")
	w.run("select millrace.publish_batch('orders', array(select to_jsonb(i) from generate_series(1, $1) i), array(select 'k' || i from generate_series(1, $1) i))", n)
	w.run(`select millrace.dead_letter(claim, array_agg(position), case when claim is null then '' else 'paper' end)
		from millrace.receive('orders', 'billing', 'w1', p_max => $1) group by claim`, n)
	return w
}

func TestRedriveMovesWhatItIsTold(t *testing.T) {
	t.Parallel()
	w := deadLetters(t, 12)
	w.run("update millrace_engine.dead_letter set reason = 'customer', headers = '{\"a\": 1}' where position = 12")
	w.want(0, `
POSITION   KEY   ATTEMPTS   DEAD   REASON
…   paper
…   paper
…   paper
…   paper
…   paper
…   paper
…   paper
…   paper
…   paper
…   paper
… and 2 more
12 dead letters would be moved back to the group
`, "redrive", "orders", "billing", "--dry-run")
	if r := w.millrace("redrive", "orders", "billing", "--dry-run"); !strings.Contains(r.out, "… and 2 more\n") {
		t.Errorf("the dry run says:\n%s", r.out)
	}
	w.want(0, `1 dead letter moved from group "billing" to stream "repair"`, "redrive", "orders", "billing", "--reason", "custom", "-H", "a=1", "--to", "repair")
	w.want(0, `{"stream":"orders","group":"billing","moved":2,"of":2}`, "redrive", "orders", "billing", "--key", "k1", "--key", "k2", "-o", "json")
	w.want(0, `3 dead letters moved back to group "billing" of stream "orders"`, "redrive", "orders", "billing", "--limit", "3", "--from-position", "4")
	w.want(0, `0 dead letters moved back to group "billing" of stream "orders"`, "redrive", "orders", "billing", "--dead-before", "1h")
	// What dies while it runs is for the next one, or a message that always fails would go round for ever.
	w.run("update millrace_engine.dead_letter set dead_at = clock_timestamp() + interval '1 hour' where position = 3")
	w.want(0, `5 dead letters moved back to group "billing" of stream "orders"`, "redrive", "orders", "billing")
	if n := one[int](w, "select count(*) from millrace_engine.dead_letter"); n != 1 {
		t.Errorf("%d dead letters are left", n)
	}
	if n := one[int](w, "select retrying from millrace.stats('orders')"); n != 10 {
		t.Errorf("%d messages wait in the group", n)
	}
}

func TestRedriveCanBeInterrupted(t *testing.T) {
	t.Parallel()
	w := deadLetters(t, 100)
	redrive := w.start(nil, "redrive", "orders", "billing", "--rate", "1")
	w.eventually("the first to be moved", func() bool { return one[int](w, "select count(*) from millrace_engine.dead_letter") < 100 })
	if code := redrive.interrupt(); code != 130 || !strings.Contains(redrive.err.String(), "interrupted: the others stay dead letters") {
		t.Errorf("exit code %d, %s", code, redrive.err.String())
	}
	moved, left := one[int](w, "select retrying from millrace.stats('orders')"), one[int](w, "select count(*) from millrace_engine.dead_letter")
	if moved == 0 || moved > 50 || moved+left != 100 {
		t.Errorf("%d were moved and %d are left", moved, left)
	}
}

func TestResetAsksAndShows(t *testing.T) {
	t.Parallel()
	w := shop(t)
	const plan = `Group "billing" of stream "orders" goes on at position 1 instead of 2.
  Delivered again: up to 1 message
  In flight: 1 message, whose claims end: what is being done cannot be acked
  Removed: 1 retry, parked messages among them
`
	w.want(0, plan, "reset", "orders", "billing", "--to", "earliest", "--dry-run")
	w.wantPiped("n\n", 1, plan+"Reset group \"billing\" of stream \"orders\"? [y/N]\nerror: nothing was changed: it was not confirmed. Answer y, or pass --yes",
		"reset", "orders", "billing", "--to", "earliest")
	w.wantPiped("", 1, plan+"Reset group…\nerror: nothing was changed: it was not confirmed. Answer y, or pass --yes", "reset", "orders", "billing", "--to", "earliest")
	if n := one[int](w, "select in_flight from millrace.stats('orders') where \"group\" = 'billing'"); n != 1 {
		t.Error("the group was reset without a yes")
	}
	w.want(0, `{"stream":"orders","group":"billing","next_before":2,"next":8,"in_flight":1,"removed":1,"dry_run":true}`, "reset", "orders", "billing", "--to", "latest", "--dry-run", "-o", "json")
	r := w.piped("y\n", "reset", "orders", "billing", "--to", "earliest")
	if r.code != 0 || r.out != "group \"billing\" of stream \"orders\" goes on at position 1; 1 retry removed\n" {
		t.Errorf("confirmed: %+v", r)
	}
	w.want(0, `group "billing" of stream "orders" goes on at position 6; 0 retries removed`, "reset", "orders", "billing", "--to", "6", "-y")
	if n := one[int](w, "select lag from millrace.stats('orders') where \"group\" = 'billing'"); n != 2 {
		t.Errorf("the lag is %d", n)
	}
	// A place beyond the end would pass over what is published from now on, without a word.
	w.want(1, `error: position 9 of stream "orders" does not exist: the last is 7. To pass over everything, write latest`, "reset", "orders", "billing", "--to", "9", "-y")
	w.want(0, `group "billing" of stream "orders" goes on at position 8; 0 retries removed`, "reset", "orders", "billing", "--to", "8", "-y")
	w.run("select millrace.trim('orders', p_before => 3)")
	w.want(1, `error: position 1 of stream "orders" has been removed. The first that is left is 3`, "reset", "orders", "billing", "--to", "1", "-y")
}

func TestTrimAsksAndShows(t *testing.T) {
	t.Parallel()
	w := shop(t)
	const plan = `Stream "orders" loses positions 1 to 4, up to 4 messages.
  Group "billing" has not settled up to 3 of them.
  Group "projection" has not settled up to 4 of them.
`
	w.want(0, plan, "trim", "orders", "--keep", "3", "--dry-run")
	w.wantPiped("no\n", 1, plan+"Trim stream…\nerror: nothing was changed…", "trim", "orders", "--before", "5")
	w.want(0, `{"stream":"orders","first_before":1,"first_position":5,"messages":4,"groups_behind":["billing","projection"],"dry_run":true}`, "trim", "orders", "--before", "5", "--dry-run", "-o", "json")
	w.want(0, `Stream "orders" loses nothing: its first position is 1.`, "trim", "orders", "--older-than", "1h", "--dry-run")
	w.want(0, "Stream \"orders\" loses position 1, up to 1 message.\n  Group \"projection\"…", "trim", "orders", "--before", "2", "--dry-run")
	w.want(0, `the first position of stream "orders" is 5`, "trim", "orders", "--keep", "3", "--yes")
	w.want(0, `{"stream":"orders","first_before":5,"first_position":8,"messages":3,"groups_behind":["billing","projection"]}`, "trim", "orders", "--keep", "0", "-y", "-o", "json")
}

// Who changes by hand what a Kubernetes resource owns is told so, on standard error, however the result is printed.
func TestChangesOfWhatAResourceOwnsSaySo(t *testing.T) {
	t.Parallel()
	w := shop(t)
	w.run(`update millrace_engine.stream set owner = '{"cluster": "c1", "namespace": "shop", "name": "web-orders", "uid": "u"}'`)
	w.run(`update millrace_engine.consumer_group set owner = '{"cluster": "c1", "namespace": "shop", "name": "web-billing", "uid": "u"}' where name = 'billing'`)
	const reset = "note: this belongs to ConsumerGroup shop/web-billing in Kubernetes, cluster c1. The resource stays as it is and does not move the group back; " +
		"its start is for a new group only.\n"
	const trim = "note: this belongs to Stream shop/web-orders in Kubernetes, cluster c1. The resource and its retention stay as they are; what is trimmed does not come back.\n"
	for args, want := range map[string]string{
		"reset orders billing --to latest --dry-run":     reset,
		"reset orders billing --to latest --yes":         reset,
		"reset orders billing --to latest --yes -o json": reset,
		"reset orders projection --to latest --yes":      "",
		"trim orders --keep 6 --dry-run":                 trim,
		"trim orders --keep 5 --yes":                     trim,
		"trim orders --keep 4 --yes -o json":             trim,
	} {
		if r := w.millrace(strings.Fields(args)...); r.code != 0 || r.err != want {
			t.Errorf("millrace %s: exit code %d, and on standard error\n%swant\n%s", args, r.code, r.err, want)
		}
	}
	// It comes before the question.
	if r := w.piped("n\n", "trim", "orders", "--keep", "1"); r.code != 1 || !strings.HasPrefix(r.err, trim) || !strings.Contains(r.err, "Trim stream \"orders\"? [y/N]") {
		t.Errorf("asked: %+v", r)
	}
}
