package cli_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestPublishOneMessage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders', p_priorities => 2)")
	w.want(0, `1 message published to "orders" at position 1`, "publish", "orders", `{"id": 1}`, "--key", "customer-7", "-H", "source=import", "-H", "n=3")
	w.want(0, `1 message published to "orders", to be delivered later`, "publish", "orders", "{}", "--delay", "1h")
	w.want(0, `1 message published to "orders", to be delivered later`, "publish", "orders", "{}", "--at", "2999-01-01T00:00:00Z")
	w.want(0, `1 message published to "orders" at position 1`, "publish", "orders", `{"id": 2}`, "--priority", "1")
	w.want(0, `{"stream":"orders","messages":1,"first_position":2,"last_position":2}`, "publish", "orders", `{"id": 3}`, "--dedupe-key", "k", "-o", "json")
	w.want(0, `1 message published to "orders" at position 2`, "publish", "orders", `{"id": 3}`, "--dedupe-key", "k")
	w.want(0, `1 message published to "orders" at position 3`, "publish", "orders", `{"id": 4}`, "--key", "k", "--serialize", "--headers", `{"a": null}`)
	w.want(1, `error: the payload is no JSON, which stream "orders" takes: paid. Text is written in quotes, as in '"text"'`, "publish", "orders", "paid")
	w.want(1, `error: publish to stream "orders": refused: priority 2 is not possible in stream "orders". Use 0 to 1; the highest goes first.`,
		"publish", "orders", "{}", "--priority", "2")
	w.want(0, `
POSITION   PRIORITY   KEY          CREATED               HEADERS                          PAYLOAD
1          1          <none>       …   <none>                           {"id": 2}
1          0          customer-7   …   {"n": 3, "source": "import"}     {"id": 1}
2          0          <none>       …   <none>                           {"id": 3}
3          0          k            …   {"a": null}                      {"id": 4}
`, "tail", "orders", "--from", "earliest", "--no-follow", "-o", "wide")
}

func TestPublishWhatAPipeBringsAndWhatTailPrints(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders'), millrace.create_stream('copy'), millrace.create_stream('bytes', p_payload_type => 'Bytes')")
	var all strings.Builder
	for i := range 2500 {
		fmt.Fprintf(&all, "{\"id\":\n %d}", i)
	}
	w.wantPiped(all.String(), 0, `2,500 messages published to "orders", positions 1 to 2500`, "publish", "orders")
	w.wantPiped("", 0, `0 messages published to "orders"`, "publish", "orders")

	file := filepath.Join(t.TempDir(), "more.ndjson")
	if err := os.WriteFile(file, []byte(`{"key": "a", "headers": {"n": 1}, "payload": [1], "dedupe_key": "x"}
{"payload": null}
{"payload": "<&>", "dedupe_key": "x"}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	w.want(0, `{"stream":"orders","messages":3,"first_position":2501,"last_position":2502}`, "publish", "orders", "-f", file, "--format", "message", "-k", "b", "-o", "json")
	printed := w.ok("tail", "orders", "--from", "2500", "--no-follow", "-o", "json")
	if want := `{"position":2500,"key":null,"headers":null,"payload":{"id":2499},"created_at":"…"}
{"position":2501,"key":"a","headers":{"n":1},"payload":[1],"created_at":"…"}
{"position":2502,"key":"b","headers":null,"payload":null,"created_at":"…"}`; !like(printed, want) {
		t.Errorf("tail printed\n%swant\n%s", printed, want)
	}
	w.wantPiped(printed, 0, `3 messages published to "copy", positions 1 to 3`, "publish", "copy", "--format", "message")
	if n := one[int](w, "select count(*) from millrace.orders o join millrace.copy c on c.position = o.position - 2499 and c.payload = o.payload and c.key is not distinct from o.key"); n != 3 {
		t.Errorf("%d of 3 messages are the same in the copy", n)
	}

	w.wantPiped("one\r\ntwo\n\n\xff", 0, `4 messages published to "bytes", positions 1 to 4`, "publish", "bytes")
	w.want(0, `
POSITION   KEY          CREATED               PAYLOAD
1          <none>       …   one
2          <none>       …   two
3          <none>       …
4          <none>       …   \xff
`, "tail", "bytes", "--from", "earliest", "--no-follow")
	w.run(`insert into millrace.bytes (key, payload) values (E'\x1b[2J', convert_to(E'\x1b]0;title\x07', 'UTF8'))`)
	w.want(0, "POSITION …\n5          \\x1b[2J      …   \\x1b]0;title\\a", "tail", "bytes", "--from", "5", "--no-follow")
	w.run("delete from millrace.bytes where position = 5")
	w.wantPiped(w.ok("tail", "bytes", "--from", "4", "--no-follow", "-o", "json"), 0, `1 message published to "bytes" at position 6`, "publish", "bytes", "--format", "message")
	if same := one[bool](w, "select payload = '\\xff' from millrace.bytes where position = 6"); !same {
		t.Error("a payload that is no text has changed on its way")
	}
}

func TestPublishSaysHowFarItCame(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders')")
	in := strings.Repeat("{}\n", 1200) + "{oops}\n{}\n"
	r := w.piped(in, "publish", "orders")
	n := one[int64](w, "select count(*) from millrace.orders")
	if r.code != 1 || n != 1200 || !strings.Contains(r.err, "message 1201: it is no JSON: ") {
		t.Fatalf("exit code %d, %d published\n%s", r.code, n, r.err)
	}
	var told int64
	for line := range strings.Lines(r.err) {
		if strings.Contains(line, "--skip") {
			if _, err := fmt.Sscanf(line[strings.Index(line, "--skip"):], "--skip %d", &told); err != nil {
				t.Fatal(err)
			}
		}
	}
	if told != n {
		t.Errorf("it says that %d were published, and there are %d", told, n)
	}
	mended := strings.Replace(in, "{oops}", "{}", 1)
	if r := w.piped(mended, "publish", "orders", "--skip", fmt.Sprint(n)); r.code != 0 {
		t.Fatalf("%d %s", r.code, r.err)
	}
	if n := one[int64](w, "select count(*) from millrace.orders"); n != 1202 {
		t.Errorf("%d messages after the repetition", n)
	}
	w.wantPiped(`{"payload": 1}{"key": "k"}`, 1, "1 message published; pass them over with --skip 1\nerror: message 2: it has no payload", "publish", "orders", "--format", "message")
}

func TestTailBeginsWhereItIsToldAndFilters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders')")
	w.run("insert into millrace.orders (key, headers, payload, created_at) select 'k' || i, jsonb_build_object('n', i % 2), to_jsonb(i), now() - make_interval(hours => 10 - i) from generate_series(1, 9) i")
	positions := func(args ...string) string {
		t.Helper()
		var all []string
		for _, m := range decode[struct{ Position int }](t, w.ok(append([]string{"tail", "orders", "--no-follow", "-o", "json"}, args...)...)) {
			all = append(all, fmt.Sprint(m.Position))
		}
		return strings.Join(all, " ")
	}
	for args, want := range map[string]string{
		"--from earliest":                               "1 2 3 4 5 6 7 8 9",
		"--from latest":                                 "",
		"--from 8":                                      "8 9",
		"--from 150m":                                   "8 9",
		"--from 2000-01-01T00:00:00Z --limit 2":         "1 2",
		"--from earliest --key k3 --key k5":             "3 5",
		"--from earliest --key-prefix k --header n=1.0": "1 3 5 7 9",
		"--from earliest --header n=1 --key k3":         "3",
		"--from earliest --header n=\"1\"":              "",
		"--from earliest --header other=1":              "",
	} {
		if got := positions(strings.Fields(args)...); got != want {
			t.Errorf("%s: %q, want %q", args, got, want)
		}
	}
	w.run("select millrace.trim('orders', p_before => 4)")
	if r := w.millrace("tail", "orders", "--from", "2", "--limit", "1", "-o", "json"); r.code != 0 || !strings.HasPrefix(r.out, `{"position":4,`) || r.err != "positions 2 to 3 were removed\n" {
		t.Errorf("from a position that was removed: %+v", r)
	}
	w.want(4, "error: no message came within 10ms", "tail", "orders", "--timeout", "10ms")
}

func TestTailFollowsUntilItIsInterrupted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders', p_priorities => 2), millrace.publish('orders', '\"before\"')")
	tail := w.start(nil, "tail", "orders", "-o", "json")
	came := make(chan string)
	go func() {
		for tail.lines.Scan() {
			came <- tail.lines.Text()
		}
		close(came)
	}()
	// When it has begun to follow cannot be known from outside; from the first message on it must have all of them.
	published, first := 0, ""
	w.eventually("a first message", func() bool {
		select {
		case first = <-came:
			return true
		default:
			published++
			w.run("select millrace.publish('orders', to_jsonb($1::integer))", published)
			return false
		}
	})
	if strings.Contains(first, "before") {
		t.Errorf("it began with what was there: %s", first)
	}
	w.run("select millrace.publish('orders', '\"urgent\"', p_priority => 1)")
	w.run("select millrace.publish('orders', '\"last\"')")
	var seen []string
	for len(seen) < 2 {
		line, ok := <-came
		if !ok {
			t.Fatalf("it ended: %s", tail.err.String())
		}
		if strings.Contains(line, "urgent") || strings.Contains(line, "last") {
			seen = append(seen, line)
		}
	}
	if err := tail.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for range came { // until it has ended, for the output has one reader
		t.Error("it printed something more")
	}
	if code := tail.wait(); code != 0 {
		t.Errorf("after SIGINT: exit code %d, %s", code, tail.err.String())
	}
}

func TestReceiveSettlesAsItIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders'), millrace.create_group('orders', 'billing')")
	w.want(4, "error: there is no message", "receive", "orders", "billing")
	w.want(4, "error: there is no message", "receive", "orders", "billing", "--wait", "20ms")
	w.run("select millrace.publish('orders', to_jsonb(i), 'k' || i) from generate_series(1, 6) i")
	w.want(0, `
POSITION   ATTEMPT   KEY          CREATED               PAYLOAD
1          1         k1           …   1
2          1         k2           …   2
`, "receive", "orders", "billing", "--limit", "2")
	// Given back: the same again, for the first time still.
	for _, c := range []struct{ args, want string }{
		{"--ack --limit 2", `{"position":1,"key":"k1","headers":null,"payload":1,"created_at":"…","attempt":1}` + "\n" +
			`{"position":2,"key":"k2","headers":null,"payload":2,"created_at":"…","attempt":1}`},
		{"--nack --delay 1h --reason paper", `{"position":3,…,"attempt":1}`},
		{"--dead-letter --reason never", `{"position":4,…,"attempt":1}`},
		{"--limit 10 --ack", "{\"position\":5,…}\n{\"position\":6,…}"},
	} {
		w.want(0, c.want, append([]string{"receive", "orders", "billing", "-o", "json"}, strings.Fields(c.args)...)...)
	}
	w.want(4, "error: there is no message", "receive", "orders", "billing")
	w.want(0, `
STREAM   GROUP     LAG   IN-FLIGHT   RETRY   DEAD   OLDEST   STATE
orders   billing   0     0           1       1      …   Active
`, "lag")
	if text := one[string](w, "select string_agg(d.reason, ',') from millrace.dead_letters('orders', 'billing') d"); text != "never" {
		t.Errorf("the dead letter's reason is %q", text)
	}
	w.want(2, "error: --follow needs --ack…\n\nUsage:\n  millrace receive STREAM GROUP [flags]\n\nmillrace receive --help has its flags and examples.", "receive", "orders", "billing", "--follow")
}

func TestReceiveFollowsAndLeavesNothingHeld(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"Shared", "Ordered"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.run("select millrace.create_stream('orders'), millrace.create_group('orders', 'billing', $1)", mode)
			w.run("select millrace.publish('orders', to_jsonb(i), 'k' || i) from generate_series(1, 3) i")
			receive := w.start(nil, "receive", "orders", "billing", "--follow", "--ack", "-o", "json")
			for range 3 {
				receive.line()
			}
			w.run("select millrace.publish('orders', '4', 'k')")
			if line := receive.line(); !strings.Contains(line, `"payload":4`) {
				t.Errorf("then came %s", line)
			}
			w.eventually("the last ack", func() bool {
				return one[int](w, "select sum(lag + in_flight + retrying)::integer from millrace.stats()") == 0
			})
			if code := receive.interrupt(); code != 0 {
				t.Errorf("after SIGINT: exit code %d, %s", code, receive.err.String())
			}
			if n := one[int](w, "select count(*) from millrace_engine.member"); n != 0 {
				t.Errorf("%d members are left", n)
			}
		})
	}
}

// A reader that does not read keeps the program in the middle of a claim.
func TestReceiveGivesBackWhatItCouldNotPrint(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders'), millrace.create_group('orders', 'billing', p_ack_wait_seconds => 3600)")
	w.run("select millrace.publish('orders', to_jsonb(repeat('x', 100000))) from generate_series(1, 5) i")
	receive := w.start(nil, "receive", "orders", "billing", "--limit", "5", "--ack", "-o", "json")
	w.eventually("a claim", func() bool { return one[int](w, "select in_flight from millrace.stats()") == 5 })
	if err := receive.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	w.eventually("the messages to be given back", func() bool {
		return one[int](w, "select count(*) from millrace_engine.claim c where c.messages = 5") > 0 && len(decode[any](t, w.millrace("receive", "orders", "billing", "--limit", "5", "-o", "json").out)) == 5
	})
	if code := receive.wait(); code != 130 {
		t.Errorf("exit code %d", code)
	}
}
