// Package clients runs the example of docs/sql-api.md in another language, so that what the document says is enough to use Millrace with nothing but a
// driver: real processes, killed and stopped in the middle, and a ledger in the end.
package clients

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/pgbouncer"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/process"
)

func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }

// limit is for a machine with much else to do; everything waits for what it needs and not for time.
const limit = 3 * time.Minute

// lease is LEASE_SECONDS of the example.
const lease = 2 * time.Second

// TestAPythonShopLosesAndRepeatsNothing runs the example as a role that owns nothing. On the way, one member of each group is killed, a claim is taken from
// under its member, a handler takes longer than its lease, a service fails, and connections are cut.
func TestAPythonShopLosesAndRepeatsNothing(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	s := newShop(ctx, t)

	// Whoever projects an order of customer-3 waits for this transaction.
	hold, err := s.db.Begin(ctx)
	must(t, err)
	defer func() { _ = hold.Rollback(context.Background()) }() // a pool closes when everything has been given back
	_, err = hold.Exec(ctx, "insert into account values ('customer-3', 0, 0, 0)")
	must(t, err)

	members := map[string]*process.Process{}
	for _, name := range []string{"billing-1", "billing-2", "projection-1", "projection-2"} {
		members[name] = s.start(name, strings.Split(name, "-")[0]+".py", name)
	}
	producer := s.start("producer", "producer.py", "60")

	var victim string
	select {
	case victim = <-s.tax.fatal:
	case <-ctx.Done():
		t.Fatal("nobody billed order o-17")
	}
	members[victim].Kill()
	delete(members, victim)

	s.until("a projection waits for customer-3", func() bool {
		err := s.db.QueryRow(ctx, `select application_name from pg_stat_activity
			where datname = current_database() and application_name like 'projection-_' and wait_event_type = 'Lock'`).Scan(&victim)
		if !errors.Is(err, pgx.ErrNoRows) {
			must(t, err)
		}
		return err == nil
	})
	members[victim].Kill()
	delete(members, victim)
	must(t, hold.Rollback(ctx))

	s.succeeds(producer)
	s.until("everything is billed or dead", func() bool {
		return s.count(`select count(*) from shop_order where id not in (select order_id from invoice)
			and id not in (select payload ->> 'id' from millrace.dead_letters('orders', 'billing'))`) == 0
	})
	const down = "HTTPError: HTTP Error 503: Service Unavailable"
	s.same("dead letters", "select payload ->> 'id', split_part(reason, ':', 1) from millrace.dead_letters('orders', 'billing') order by 1", "refused|CheckViolation", "stuck|HTTPError", "wrong|the amount is not positive")
	s.same("the history of the one that was tried again", `select distinct attempts::text, e ->> 'error' from millrace.dead_letters('orders', 'billing') d, jsonb_array_elements(d.errors) e
		where payload ->> 'id' = 'stuck' and e ->> 'error' like 'HTTP%'`, "3|"+down)

	// The service recovers, and the members have to connect again.
	s.tax.recover()
	const ofMembers = "from pg_stat_activity where datname = current_database() and application_name ~ '^(billing|projection)-'"
	var before time.Time
	must(t, s.db.QueryRow(ctx, "select max(backend_start) "+ofMembers).Scan(&before))
	if cut := s.count("select count(pg_terminate_backend(pid)) " + ofMembers); cut < 4 {
		t.Errorf("%d connections were cut, want two of each member that is left", cut)
	}
	s.succeeds(s.start("redrive", "redrive.py", "HTTPError"))
	s.until("the redriven order is billed", func() bool { return s.count("select count(*) from invoice where order_id = 'stuck'") == 1 })
	s.until("every order is projected", func() bool {
		return s.count("select count(*) from shop_order") <= s.count("select coalesce(sum(orders), 0) from account")
	})

	s.until("the members are connected again", func() bool { return s.count("select count(*) "+ofMembers+" and backend_start > $1", before) == 4 })

	for _, member := range members {
		must(t, member.Signal(syscall.SIGTERM))
	}
	for name, member := range members {
		s.succeeds(member)
		if log := member.LogTail(); !strings.Contains(log, "connecting again") {
			t.Errorf("%s did not notice that its connection was cut:\n%s", name, log)
		}
	}

	// The ledger. An order that was rolled back is in no table of the shop, so equal means that nothing of it was delivered either.
	s.same("orders with an invoice, other than exactly one", `select o.id, i.order_id, count(*)::text from shop_order o full join invoice i on i.order_id = o.id
		where o.id is distinct from 'wrong' and o.id is distinct from 'refused' group by 1, 2 having count(*) <> 1 or o.id is null or i.order_id is null`)
	s.same("orders that were rolled back", "select order_id from invoice where order_id ~ '^o-[0-9]*9$'")
	if n := s.count("select count(*) from shop_order"); n != 54+40+8 {
		t.Errorf("%d orders are committed, want %d", n, 54+40+8)
	}
	// An account takes no position below the one it has seen, so a message out of order would be missing here.
	s.same("accounts that differ from their orders", `select a.customer, o.customer from account a
		full join (select customer, count(*) as orders, sum(amount) as total from shop_order group by 1) o using (customer)
		where a.orders is distinct from o.orders or a.total is distinct from o.total`)
	s.same("groups", `select "group", lag::text, in_flight::text, retrying::text, dead_letters::text from millrace.stats() order by 1`,
		"billing|0|0|0|2", "projection|0|0|0|0")
	for name := range members {
		if s.count("select count(*) from millrace_engine.member where name = $1", name) != 0 {
			t.Errorf("%s did not leave its group", name)
		}
	}
	if n := s.count("select attempt from invoice where order_id = 'o-17'"); n < 2 {
		t.Errorf("the order that a member was killed with was billed in attempt %d", n)
	}
	if n := s.tax.asked("large"); n != 1 {
		t.Errorf("the order that takes long was handled %d times, want once", n)
	}
	// On a machine that is slower than the lease there are more deliveries than these, and some that were never handled.
	for id, least := range map[string]int{"lost": 2, "flaky": 2, "stuck": 2} {
		if n := s.tax.asked(id); n < least {
			t.Errorf("order %s was handled %d times, want %d", id, n, least)
		}
	}
	if !strings.Contains(s.logs(), "the claim has ended") {
		t.Errorf("no member noticed that it had lost its claim:\n%s", s.logs())
	}
}

// TestAPythonShopWorksBehindPgBouncer runs the producer and the members of the Ordered group through a pool by transaction, with their listeners beside it. They share
// one session, so a statement that one of them has prepared is in the way of the others.
func TestAPythonShopWorksBehindPgBouncer(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	s := newShop(ctx, t)
	direct := strings.TrimPrefix(s.env[0], "DATABASE_URL=")
	s.env = append(s.env[1:], "DATABASE_URL="+pgbouncer.New(t, direct, pgbouncer.Options{Settings: map[string]string{"default_pool_size": "1"}}).DSN(), "LISTEN_URL="+direct)
	members := []*process.Process{s.start("projection-1", "projection.py", "projection-1"), s.start("projection-2", "projection.py", "projection-2")}
	s.succeeds(s.start("producer", "producer.py", "60"))
	s.until("every order is projected", func() bool {
		return s.count("select count(*) from shop_order") <= s.count("select coalesce(sum(orders), 0) from account")
	})
	for _, member := range members {
		must(t, member.Signal(syscall.SIGTERM))
		s.succeeds(member)
		if log := member.LogTail(); strings.Contains(log, "connecting again") {
			t.Errorf("%s lost its connection:\n%s", member.Name(), log)
		}
	}
	s.same("accounts that differ from their orders", `select a.customer, o.customer from account a
		full join (select customer, count(*) as orders, sum(amount) as total from shop_order group by 1) o using (customer)
		where a.orders is distinct from o.orders or a.total is distinct from o.total`)
}

// TestTheJavaThatTheDocumentationShowsSendsWhatFits prepares each statement of the Java example with the types that pgJDBC gives its parameters.
func TestTheJavaThatTheDocumentationShowsSendsWhatFits(t *testing.T) {
	t.Parallel()
	types := map[string]uint32{"String": pgtype.VarcharOID, "Int": pgtype.Int4OID, "Array": pgtype.Int8ArrayOID}
	conn, err := pgx.Connect(t.Context(), postgres.NewDatabase(t))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	_, err = schema.Migrate(t.Context(), conn, schema.Options{})
	must(t, err)
	_, err = conn.Exec(t.Context(), "create table invoice (order_id text)")
	must(t, err)
	text, err := os.ReadFile("../../docs/sql-api.md")
	must(t, err)
	found := 0
	for _, block := range regexp.MustCompile("(?ms)^```java\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		for _, statement := range regexp.MustCompile(`(\w+) = db\.prepareStatement\("(.*)"\)`).FindAllStringSubmatch(block[1], -1) {
			found++
			sql := statement[2]
			parameters := make([]uint32, strings.Count(sql, "?"))
			for _, set := range regexp.MustCompile(`\b`+statement[1]+`\.set(\w+)\((\d+),`).FindAllStringSubmatch(block[1], -1) {
				n, err := strconv.Atoi(set[2])
				must(t, err)
				parameters[n-1] = types[set[1]]
				sql = strings.Replace(sql, "?", "$"+set[2], 1)
			}
			if slices.Contains(parameters, 0) {
				t.Fatalf("%s has a parameter that nothing is set for, or one of a type that this test does not know", statement[2])
			}
			if _, err := conn.PgConn().Prepare(t.Context(), "", sql, parameters); err != nil {
				t.Errorf("%s: %v", statement[2], err)
			}
		}
	}
	if found != 6 {
		t.Errorf("the document shows %d statements in Java, want 6", found)
	}
}

// TestThePythonThatTheDocumentationShowsIsTheOneThatRuns compares; the other test runs it.
func TestThePythonThatTheDocumentationShowsIsTheOneThatRuns(t *testing.T) {
	t.Parallel()
	programs, err := filepath.Glob("python/*.py")
	must(t, err)
	var code strings.Builder
	for _, path := range programs {
		text, err := os.ReadFile(path)
		must(t, err)
		code.Write(text)
	}
	documents, err := filepath.Glob("../../docs/*.md")
	must(t, err)
	found := 0
	for _, path := range append(documents, "../../README.md") {
		if filepath.Base(path) == "pipelines.md" {
			continue // test/docs writes its programs to files and runs them
		}
		text, err := os.ReadFile(path)
		must(t, err)
		for _, block := range regexp.MustCompile("(?ms)^```python\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
			found++
			if !strings.Contains(code.String(), block[1]) {
				t.Errorf("%s shows Python that is in no file of test/clients/python:\n%s", filepath.Base(path), block[1])
			}
		}
	}
	if found == 0 {
		t.Fatal("the documentation shows no Python")
	}
}

// shop is a database with a stream and two groups, and what the programs of the example need.
type shop struct {
	t       *testing.T
	ctx     context.Context
	db      *pgxpool.Pool // of the owner
	tax     *taxService
	python  string
	env     []string
	logDir  string
	started []*process.Process
}

func newShop(ctx context.Context, t *testing.T) *shop {
	t.Helper()
	s := &shop{t: t, ctx: ctx, python: findPython(ctx, t), logDir: t.TempDir()}
	dsn := postgres.NewDatabase(t)
	var err error
	s.db, err = pgxpool.New(ctx, dsn)
	must(t, err)
	t.Cleanup(s.db.Close)

	// Roles belong to the server, so their names are this test's own.
	var runtime string
	must(t, s.db.QueryRow(ctx, "select 'shops_' || substr(md5(random()::text), 1, 12)").Scan(&runtime))
	user := runtime + "_user"
	s.run("create role " + runtime + " nologin; create role " + user + " login password 'secret' in role " + runtime)
	t.Cleanup(func() {
		if _, err := s.db.Exec(context.Background(), "drop owned by "+user+", "+runtime+"; drop role "+user+", "+runtime); err != nil {
			t.Error(err)
		}
	})
	conn, err := s.db.Acquire(ctx)
	must(t, err)
	_, err = schema.Migrate(ctx, conn.Conn(), schema.Options{RuntimeRole: runtime})
	conn.Release()
	must(t, err)
	s.run(`select millrace.create_stream('orders');
		select millrace.create_group('orders', 'billing', p_max_attempts => 3);
		select millrace.create_group('orders', 'projection', 'Ordered');
		create table shop_order (id text primary key, customer text not null, amount numeric not null);
		create table invoice (order_id text, tax numeric not null, member text not null, attempt integer not null, -- nothing but Millrace prevents a second one
			constraint nobody_bills_this check (order_id <> 'refused'));
		create table account (customer text primary key, position bigint not null, orders integer not null, total numeric not null);
		grant select, insert, update on shop_order, invoice, account to ` + runtime)

	s.tax = &taxService{t: t, db: s.db, fatal: make(chan string, 1), requests: map[string]int{}}
	server := httptest.NewServer(s.tax)
	t.Cleanup(server.Close)
	u, err := url.Parse(dsn)
	must(t, err)
	u.User = url.UserPassword(user, "secret")
	s.env = []string{"DATABASE_URL=" + u.String(), "TAX_URL=" + server.URL, "PYTHONDONTWRITEBYTECODE=1"}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("sessions of the database:\n%s", s.activity())
		}
		for _, p := range s.started {
			p.Kill()
		}
		if t.Failed() {
			t.Log(s.logs())
		}
	})
	return s
}

// findPython returns a Python that has psycopg: the system's, for which tools/deps.sh installs it, or the first on the path.
func findPython(ctx context.Context, t *testing.T) string {
	t.Helper()
	var why []string
	for _, python := range []string{"/usr/bin/python3", "python3"} {
		out, err := exec.CommandContext(ctx, python, "-c", "import importlib.util, sys; sys.exit(not importlib.util.find_spec('psycopg'))").CombinedOutput()
		if err == nil {
			return python
		}
		why = append(why, fmt.Sprintf("%s has no psycopg: %v %s", python, err, out))
	}
	t.Fatalf("no Python with psycopg 3; run: make deps  (on Debian and Ubuntu it installs the package python3-psycopg; elsewhere: pip install 'psycopg[binary]' in a "+
		"virtual environment that is active)\n%s", strings.Join(why, "\n"))
	return ""
}

func (s *shop) start(name, program string, args ...string) *process.Process {
	s.t.Helper()
	p, err := process.Start(process.Command{
		Path: s.python, Args: append([]string{program}, args...), Dir: "python", Env: s.env, Log: filepath.Join(s.logDir, name+".log"),
	})
	must(s.t, err)
	s.started = append(s.started, p)
	return p
}

// succeeds waits for the end of a process.
func (s *shop) succeeds(p *process.Process) {
	s.t.Helper()
	select {
	case <-p.Done():
	case <-s.ctx.Done():
		s.t.Fatalf("%s does not end", p.Name())
	}
	if end := p.Exit().Error(); !strings.Contains(end, "exit status 0") {
		s.t.Fatal(end)
	}
}

// until looks again and again, and fails early when a program fails.
func (s *shop) until(what string, done func() bool) {
	s.t.Helper()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for !done() {
		select {
		case <-s.ctx.Done():
			s.t.Fatalf("waited in vain until %s", what)
		case <-look.C:
		}
		for _, p := range s.started {
			if end := p.Exit(); end != nil && strings.Contains(end.Error(), "exit status 1") {
				s.t.Fatalf("before %s: %v", what, end)
			}
		}
	}
}

// activity says what every session does, and waits for. It works when the test's time is over.
func (s *shop) activity() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var all string
	err := s.db.QueryRow(ctx, `select string_agg(concat_ws(' | ', pid, application_name, state, wait_event_type, wait_event, pg_blocking_pids(pid)::text,
		clock_timestamp() - query_start, left(query, 100)), chr(10)) from pg_stat_activity where datname = current_database()`).Scan(&all)
	if err != nil {
		return err.Error()
	}
	return all
}

func (s *shop) run(sql string) {
	s.t.Helper()
	_, err := s.db.Exec(s.ctx, sql)
	must(s.t, err)
}

func (s *shop) count(sql string, args ...any) (n int) {
	s.t.Helper()
	must(s.t, s.db.QueryRow(s.ctx, sql, args...).Scan(&n))
	return n
}

// same compares rows of texts, written with a bar between the columns.
func (s *shop) same(what, sql string, want ...string) {
	s.t.Helper()
	rows, err := s.db.Query(s.ctx, sql)
	must(s.t, err)
	got, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
		values, err := row.Values()
		return strings.Trim(strings.ReplaceAll(fmt.Sprintf("%q", values), `" "`, "|"), `[]"`), err
	})
	must(s.t, err)
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		s.t.Errorf("%s:\n%s\nwant:\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func (s *shop) logs() string {
	var all strings.Builder
	paths, _ := filepath.Glob(filepath.Join(s.logDir, "*.log"))
	for _, path := range paths {
		text, _ := os.ReadFile(path)
		fmt.Fprintf(&all, "--- %s\n%s", filepath.Base(path), text)
	}
	return all.String()
}

// taxService answers the programs of the example, and makes trouble with some orders.
type taxService struct {
	t     *testing.T
	db    *pgxpool.Pool
	fatal chan string // the member that is to be killed now

	mu        sync.Mutex
	requests  map[string]int
	recovered bool
}

func (x *taxService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, member := strings.TrimPrefix(r.URL.Path, "/"), r.UserAgent()
	x.mu.Lock()
	x.requests[id]++
	first, recovered := x.requests[id] == 1, x.recovered
	x.mu.Unlock()
	switch {
	case id == "o-17" && first:
		x.fatal <- member
		<-r.Context().Done() // it has been killed
		return
	case id == "large" && first:
		x.outlast(r.Context(), id)
	case id == "lost" && first:
		// As if the member had been away for longer than its lease, and somebody else had its messages now.
		if _, err := x.db.Exec(r.Context(), "select millrace.leave('orders', 'billing', $1)", member); err != nil {
			x.t.Error(err)
		}
	case id == "flaky" && first, id == "stuck" && !recovered:
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	if err := json.NewEncoder(w).Encode(0.19); err != nil && r.Context().Err() == nil {
		x.t.Error(err)
	}
}

// outlast returns when the lease that the order was received with is over, and makes sure that nobody is given the order nevertheless.
func (x *taxService) outlast(ctx context.Context, order string) {
	select {
	case <-time.After(lease + 200*time.Millisecond):
	case <-ctx.Done():
		return
	}
	more := true
	for range 100 {
		if !more {
			break
		}
		rows, err := x.db.Query(ctx, "select payload ->> 'id' from millrace.receive('orders', 'billing', 'somebody else', 1000)")
		if err != nil {
			x.t.Error(err)
			return
		}
		ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			x.t.Error(err)
			return
		}
		for _, id := range ids {
			if id == order {
				x.t.Errorf("order %s was given to somebody else, though its claim was extended", order)
			}
		}
		more = len(ids) > 0
	}
	if more {
		x.t.Error("a member was given messages a hundred times, and there are still more")
	}
	if _, err := x.db.Exec(ctx, "select millrace.leave('orders', 'billing', 'somebody else')"); err != nil {
		x.t.Error(err)
	}
}

func (x *taxService) recover() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.recovered = true
}

func (x *taxService) asked(id string) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.requests[id]
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
