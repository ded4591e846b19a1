package pgstream_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// What is left when the server, a backend, a connection or a statement ends in the wrong moment.

// ownServer is an engine on a server that the test may kill.
func ownServer(t *testing.T) (*engine, *postgres.Server) {
	t.Helper()
	s := postgres.NewServer(t, postgres.Options{Settings: map[string]string{"max_prepared_transactions": "20"}})
	e := engineOn(t, s.DSN("postgres"))
	conn := e.connect()
	_, err := schema.Migrate(e.ctx, conn, schema.Options{})
	must(t, err)
	must(t, conn.Close(e.ctx))
	return e, s
}

// crash is a run under load on a server that is killed. Messages are known by an id in their payload, because the positions of what a crash
// undid may be given away again.
type crash struct {
	e      *engine
	mu     sync.Mutex
	fate   map[string]string         // of every message that was ever sent: committed, rolled back or unknown
	got    map[string]map[string]int // deliveries by group and id
	acked  map[string]int            // in group "acks": when the ack was confirmed, by the count of such
	acks   int
	broken []string
	stop   atomic.Bool
}

func (c *crash) violated(format string, args ...any) { // under mu
	c.broken = append(c.broken, fmt.Sprintf(format, args...))
}

func (c *crash) settleFate(ids []string, fate string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range ids {
		c.fate[id] = fate
	}
}

func (c *crash) committed() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, f := range c.fate {
		if f == "committed" {
			n++
		}
	}
	return n
}

// pause keeps goroutines from spinning while the server is away.
func (c *crash) pause(err error) {
	if err != nil {
		time.Sleep(5 * time.Millisecond)
	}
}

func (c *crash) publish(r *rand.Rand, name string) {
	for n := 0; !c.stop.Load(); n++ {
		c.pause(c.publishOnce(r, name+"-"+strconv.Itoa(n)))
	}
}

func (c *crash) publishOnce(r *rand.Rand, name string) error {
	ctx := c.e.ctx
	tx, err := c.e.BeginTx(ctx, pgx.TxOptions{IsoLevel: []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable}[r.IntN(3)]})
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	var kept []string
	for i := range 1 + r.IntN(3) {
		var ms []pgstream.NewMessage
		var ids []string
		for j := range 1 + r.IntN(4) {
			id, key := fmt.Sprintf("%s-%d-%d", name, i, j), fmt.Sprintf("k%d", r.IntN(5))
			ids = append(ids, id)
			ms = append(ms, pgstream.NewMessage{Key: &key, Payload: fmt.Appendf(nil, `{"id": %q}`, id)})
		}
		c.settleFate(ids, "rolled back") // until the commit is known
		target := tx
		undo := r.IntN(5) == 0
		if undo {
			if target, err = tx.Begin(ctx); err != nil {
				return err
			}
		}
		if _, err := pgstream.PublishBatch(ctx, target, "orders", ms); err != nil {
			return err
		}
		if undo {
			if err := target.Rollback(ctx); err != nil {
				return err
			}
			continue
		}
		kept = append(kept, ids...)
	}
	if r.IntN(5) == 0 {
		return tx.Rollback(ctx)
	}
	c.settleFate(kept, "unknown")
	err = tx.Commit(ctx)
	if err == nil {
		c.settleFate(kept, "committed")
	}
	return err
}

func idOf(m pgstream.Message) string {
	var p struct{ ID string }
	_ = json.Unmarshal(m.Payload, &p)
	return p.ID
}

func (c *crash) confirmedAcks() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.acks
}

// received notes a delivery and checks what may never be delivered. When the receive began, so many acks were confirmed: those since may be of what it
// received, because a busy machine can keep the answer until the claim has expired and another member has settled it.
func (c *crash) received(group string, claim *pgstream.Claim, confirmed int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range claim.Messages {
		id := idOf(m)
		c.got[group][id]++
		if c.fate[id] != "committed" && c.fate[id] != "unknown" {
			c.violated("%s was delivered to %s, and is %q", id, group, c.fate[id])
		}
		if n, ok := c.acked[id]; ok && group == "acks" && n <= confirmed {
			c.violated("%s was delivered again after its ack was confirmed", id)
		}
	}
}

// handle receives one claim and settles it in the group's way. It returns whether there was one.
func (c *crash) handle(consumer *pgstream.Consumer, group string, token *string) (bool, error) {
	ctx := c.e.ctx
	ack := *token
	*token = ""
	confirmed := c.confirmedAcks()
	claim, err := consumer.AckAndTryReceive(ctx, ack)
	if err != nil || claim == nil {
		return false, err
	}
	c.received(group, claim, confirmed)
	switch group {
	case "async", "prefetch":
		*token = claim.Token // with the next receive
		return true, nil
	case "acks":
		if err := consumer.Ack(ctx, claim.Token); err != nil {
			return true, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.acks++
		for _, m := range claim.Messages {
			c.acked[idOf(m)] = c.acks
		}
		return true, nil
	default: // effect and ack in one transaction
		tx, err := c.e.Begin(ctx)
		if err != nil {
			return true, err
		}
		defer func() { _ = tx.Rollback(ctx) }()
		for _, m := range claim.Messages {
			if _, err := tx.Exec(ctx, `insert into public.sink ("group", id, key, "position") values ($1, $2, $3, $4)`, group, idOf(m), *m.Key, m.Position); err != nil {
				return true, err
			}
		}
		if err := consumer.AckTx(ctx, tx, claim.Token); err != nil {
			return true, err
		}
		return true, tx.Commit(ctx)
	}
}

func (c *crash) consume(consumer *pgstream.Consumer, group string) {
	token := ""
	for !c.stop.Load() {
		found, err := c.handle(consumer, group, &token)
		if !found && err == nil {
			time.Sleep(time.Millisecond)
		}
		c.pause(err)
	}
}

// prefetch handles single messages that the client fetches ahead of need, and lets it settle them when it likes.
func (c *crash) prefetch(consumer *pgstream.Consumer, group string) {
	ctx := c.e.ctx
	messages := consumer.Prefetch(pgstream.PrefetchConfig{FlushInterval: 20 * time.Millisecond})
	for n := 0; !c.stop.Load(); n++ {
		confirmed := c.confirmedAcks()
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		d, err := messages.Next(short)
		cancel()
		if err != nil {
			c.pause(err)
			continue
		}
		c.received(group, &pgstream.Claim{Messages: []pgstream.Message{d.Message}}, confirmed)
		if n%7 == 0 {
			c.pause(d.Nack(ctx, 0, "again"))
		} else {
			d.Ack()
		}
	}
	c.pause(messages.Stop(ctx))
}

// kill ends the server, or makes it recover by killing a backend. Both lose what was committed asynchronously a moment ago.
func (c *crash) kill(s *postgres.Server, r *rand.Rand) string {
	e := c.e
	if r.IntN(2) == 0 {
		must(e.t, s.Kill())
		must(e.t, s.Restart(e.ctx))
		return "the server"
	}
	witness := e.connect()
	// One that has ended by itself, and that the postmaster has not buried yet, can be killed without any effect: then another one.
	e.eventually("the server has ended all its backends", func() bool {
		var victim int
		err := witness.QueryRow(e.ctx, `select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()
			order by random() limit 1`).Scan(&victim)
		if errors.Is(err, pgx.ErrNoRows) {
			return false
		}
		if err == nil {
			_ = syscall.Kill(victim, syscall.SIGKILL)
		}
		return err != nil
	})
	e.eventually("the server has recovered", func() bool {
		conn, err := pgx.Connect(e.ctx, e.dsn)
		if err != nil {
			return false
		}
		_ = conn.Close(e.ctx)
		return true
	})
	e.Reset()
	return "a backend"
}

func TestACrashLosesNothingThatWasCommitted(t *testing.T) {
	t.Parallel()
	r := random(t)
	length := soak(t, 4*time.Second)
	e, server := ownServer(t)
	e.extendDeadline(length)
	groups := []string{"async", "prefetch", "acks", "effects", "ordered"}
	e.stream("orders")
	c := &crash{e: e, fate: map[string]string{}, got: map[string]map[string]int{}, acked: map[string]int{}}
	for _, g := range groups {
		c.got[g] = map[string]int{}
		spec := pgstream.GroupSpec{Stream: "orders", Name: g, AckWait: 300 * time.Millisecond}
		if g == "ordered" {
			spec.Mode = pgstream.ModeOrdered
		}
		e.group(spec)
	}
	e.run(`create table public.sink (n bigint generated always as identity, "group" text, id text, key text, "position" bigint)`)

	consumer := func(group, member string) *pgstream.Consumer {
		return e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: group, Member: member, MaxMessages: 1 + r.IntN(20)})
	}
	var load sync.WaitGroup
	for i := range 3 {
		own := newRand(r)
		load.Go(func() { c.publish(own, strconv.Itoa(i)) })
	}
	for _, g := range groups {
		for i := range 2 {
			member := consumer(g, fmt.Sprintf("m%d", i))
			if g == "prefetch" {
				load.Go(func() { c.prefetch(member, g) })
			} else {
				load.Go(func() { c.consume(member, g) })
			}
		}
	}
	start := time.Now()
	for kills := 0; kills < 2 || time.Since(start) < length; kills++ {
		before := c.committed()
		e.eventually("the load goes on", func() bool { return c.committed() > before+30 })
		t.Logf("killed %s after %s with %d committed", c.kill(server, r), time.Since(start).Round(time.Millisecond), before)
	}
	c.stop.Store(true)
	load.Wait()
	e.Reset()

	for _, g := range groups {
		last := consumer(g, "last")
		token := ""
		idle := time.Now()
		for time.Since(idle) < patience {
			found, err := c.handle(last, g, &token)
			if err != nil {
				t.Fatal(err)
			}
			if found {
				idle = time.Now()
			} else if s := e.stats("orders", g); s.Lag == 0 && s.InFlight == 0 && s.Retrying == 0 {
				break
			}
		}
	}
	c.check(groups)
}

// check compares what was delivered with what was committed.
func (c *crash) check(groups []string) {
	e := c.e
	e.t.Helper()
	stored := map[string]bool{}
	rows, err := e.Query(e.ctx, "select payload ->> 'id' from millrace.orders")
	must(e.t, err)
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	must(e.t, err)
	for _, id := range all {
		if stored[id] {
			c.violated("%s is in the log twice", id)
		}
		stored[id] = true
	}
	effects := map[string]map[string]int{}
	rows, err = e.Query(e.ctx, `select "group", id, count(*) from public.sink group by 1, 2`)
	must(e.t, err)
	var group, id string
	var n int
	_, err = pgx.ForEachRow(rows, []any{&group, &id, &n}, func() error {
		if effects[group] == nil {
			effects[group] = map[string]int{}
		}
		effects[group][id] = n
		return nil
	})
	must(e.t, err)
	for id, fate := range c.fate {
		if (fate == "committed") != stored[id] && fate != "unknown" {
			c.violated("%s is %s, and in the log: %t", id, fate, stored[id])
		}
		for _, g := range groups {
			if (c.got[g][id] > 0) != stored[id] {
				c.violated("%s is in the log: %t, and was delivered %d times to %s", id, stored[id], c.got[g][id], g)
			}
			if g != "effects" && g != "ordered" {
				continue
			}
			if n := effects[g][id]; (n == 1) != stored[id] || n > 1 {
				c.violated("%s is in the log: %t, and had its effect in %s %d times", id, stored[id], g, n)
			}
		}
	}
	if wrong := one[int](e, `select count(*) from (select "position" < lag("position") over (partition by key order by n) as back from public.sink
			where "group" = 'ordered') x where back`); wrong > 0 {
		c.violated("%d messages of a key had their effect out of order", wrong)
	}
	if len(stored) == 0 {
		c.violated("nothing was committed: the run proves nothing")
	}
	mustHold(e.t, c.broken)
	e.t.Logf("%d messages sent, %d in the log", len(c.fate), len(stored))
}

func TestPreparedTransactionsOutliveACrash(t *testing.T) {
	t.Parallel()
	e, server := ownServer(t)
	old, other := e.twoMembers("orders", pgstream.ModeShared)
	e.run("create table public.sink (position bigint)")
	claim := mustReceive(e, old)
	prepare := func(name string, do func(tx pgx.Tx)) {
		t.Helper()
		tx := e.begin()
		do(tx)
		exec(e, tx, "prepare transaction '"+name+"'")
	}
	prepare("ack", func(tx pgx.Tx) {
		exec(e, tx, "insert into public.sink select unnest($1::bigint[])", positions(claim))
		must(t, old.AckTx(e.ctx, tx, claim.Token))
	})
	var late int64
	prepare("publish", func(tx pgx.Tx) { late = publishIn(e, tx, "orders") })
	high := publishIn(e, e, "orders")

	must(t, server.Kill())
	must(t, server.Restart(e.ctx))
	e.Reset()
	e.jump(time.Minute)
	if again := receive(e, other); again != nil {
		t.Fatalf("received %v while one prepared transaction settles and another one publishes", positions(again))
	}
	e.run("commit prepared 'ack'")
	e.run("commit prepared 'publish'")
	same(t, "after both commits", drain(e, other), []int64{late, high})
	mustBeFenced(t, "a second ack", old.Ack(e.ctx, claim.Token))
}

func TestAnAckCanBePrepared(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		for _, ending := range []string{"commit", "rollback"} {
			e, old, other := twoMembers(t, mode)
			claim := mustReceive(e, old)
			tx := e.begin()
			must(t, old.AckTx(e.ctx, tx, claim.Token))
			name := "ack_" + one[string](e, "select current_database()")
			exec(e, tx, "prepare transaction '"+name+"'")
			e.jump(time.Hour)
			if again := receive(e, other); again != nil {
				t.Fatalf("received %v while a prepared transaction settles them", positions(again))
			}
			e.run(ending + " prepared '" + name + "'")
			var want []int64
			if ending == "rollback" {
				want = positions(claim)
			}
			same(t, "after a "+ending, drain(e, other), want)
		}
	})
}

func TestAnAckGoesWithItsSavepoint(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, old, other := twoMembers(t, mode)
		claim := mustReceive(e, old)
		tx := e.begin()
		for range 2 {
			exec(e, tx, "savepoint here")
			must(t, old.AckTx(e.ctx, tx, claim.Token))
			exec(e, tx, "rollback to here")
		}
		must(t, old.AckMessagesTx(e.ctx, tx, claim.Token, positions(claim)[:1]))
		exec(e, tx, "savepoint here")
		must(t, old.AckMessagesTx(e.ctx, tx, claim.Token, positions(claim)[1:]))
		exec(e, tx, "rollback to here")
		commit(e, tx)
		e.jump(time.Minute)
		same(t, "what was rolled back comes again", drain(e, other), positions(claim)[1:])
	})
}

func TestAPublisherMayHaveAnyIsolationLevel(t *testing.T) {
	t.Parallel()
	for _, level := range []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable} {
		t.Run(string(level), func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stream("orders")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
			c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
			tx := e.beginAs(pgx.TxOptions{IsoLevel: level})
			exec(e, tx, "select 1 from millrace.orders") // an old snapshot
			before := publishIn(e, e, "orders")
			same(t, "before the transaction publishes", drain(e, c), []int64{before})
			late := publishIn(e, tx, "orders")
			high := publishIn(e, e, "orders")
			same(t, "while it is open", drain(e, c), nil)
			commit(e, tx)
			same(t, "after its commit", drain(e, c), []int64{late, high})
		})
	}
}

// cuttable is a pool of one connection, which ends at the step that the test says: a step is one write or read on the network.
type cuttable struct {
	*pgxpool.Pool
	left atomic.Int64
}

type cutConn struct {
	net.Conn
	pool *cuttable
}

func (c *cutConn) Write(b []byte) (int, error) {
	if c.pool.left.Add(-1) < 0 {
		n, _ := c.Conn.Write(b[:len(b)/2]) // the server gets a part
		_ = c.Conn.Close()
		return n, io.ErrClosedPipe
	}
	return c.Conn.Write(b)
}

func (c *cutConn) Read(b []byte) (int, error) {
	if c.pool.left.Load() <= 0 {
		_ = c.Conn.Close()
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.Conn.Read(b)
	if c.pool.left.Add(-1) < 0 && err == nil { // the answer came, and nobody learns of it
		_ = c.Conn.Close()
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

const endless = 1 << 40

func (e *engine) cuttable() *cuttable {
	e.t.Helper()
	c := &cuttable{}
	c.left.Store(endless)
	config, err := pgxpool.ParseConfig(e.dsn)
	must(e.t, err)
	config.MaxConns = 1
	config.ConnConfig.RuntimeParams["application_name"] = "cut"
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &cutConn{Conn: conn, pool: c}, nil
	}
	c.Pool, err = pgxpool.NewWithConfig(e.ctx, config)
	must(e.t, err)
	e.t.Cleanup(c.Close)
	return c
}

// cutAt does something on a connection that ends after n steps, and returns whether it got to its end. Afterwards no backend works on it any more.
func (c *cuttable) cutAt(e *engine, n int64, do func() error) (whether bool, err error) {
	e.t.Helper()
	must(e.t, c.Ping(e.ctx))
	c.left.Store(n)
	err = do()
	whether = c.left.Load() >= 0
	c.left.Store(endless)
	if err != nil {
		c.Reset()
		e.eventually("the server noticed the cut", func() bool {
			return one[bool](e, "select not exists (select from pg_stat_activity where application_name = 'cut' and datname = current_database())")
		})
	}
	return whether, err
}

// hurt is a verb that something interrupts. After an hour its messages may be delivered again as often as settled says.
type hurt struct {
	name string
	do   func(e *engine, c *pgstream.Consumer, db *pgxpool.Pool, claim *pgstream.Claim) error
	// again is how often a message must be delivered again when the verb did (err nil) or may have done its work; -1 is never or once.
	again func(err error) int
}

var hurts = []hurt{
	{"receive", func(e *engine, c *pgstream.Consumer, _ *pgxpool.Pool, _ *pgstream.Claim) error {
		_, err := c.TryReceive(e.ctx)
		return err
	}, func(error) int { return 1 }},
	{"ack", func(e *engine, c *pgstream.Consumer, _ *pgxpool.Pool, claim *pgstream.Claim) error {
		return c.Ack(e.ctx, claim.Token)
	}, zeroIfDone},
	{"ack and receive", func(e *engine, c *pgstream.Consumer, _ *pgxpool.Pool, claim *pgstream.Claim) error {
		_, err := c.AckAndTryReceive(e.ctx, claim.Token)
		return err
	}, zeroIfDone},
	{"ack each", func(e *engine, c *pgstream.Consumer, _ *pgxpool.Pool, claim *pgstream.Claim) error {
		return c.AckMessages(e.ctx, claim.Token, positions(claim))
	}, zeroIfDone},
	{"effect and ack", func(e *engine, c *pgstream.Consumer, db *pgxpool.Pool, claim *pgstream.Claim) error {
		return pgx.BeginFunc(e.ctx, db, func(tx pgx.Tx) error {
			if _, err := tx.Exec(e.ctx, "insert into public.sink select unnest($1::bigint[])", positions(claim)); err != nil {
				return err
			}
			return c.AckTx(e.ctx, tx, claim.Token)
		})
	}, zeroIfDone},
	{"nack", func(e *engine, c *pgstream.Consumer, _ *pgxpool.Pool, claim *pgstream.Claim) error {
		return c.Nack(e.ctx, claim.Token, positions(claim), 0, "no")
	}, func(error) int { return 1 }},
	{"dead letter", func(e *engine, c *pgstream.Consumer, _ *pgxpool.Pool, claim *pgstream.Claim) error {
		return c.DeadLetter(e.ctx, claim.Token, positions(claim), "bad")
	}, zeroIfDone},
	{"extend", func(e *engine, c *pgstream.Consumer, _ *pgxpool.Pool, claim *pgstream.Claim) error {
		_, err := c.Extend(e.ctx, claim.Token, time.Minute)
		return err
	}, func(error) int { return 1 }},
	{"release", func(e *engine, c *pgstream.Consumer, _ *pgxpool.Pool, claim *pgstream.Claim) error {
		return c.Release(e.ctx, claim.Token)
	}, func(error) int { return 1 }},
	{"leave", func(e *engine, c *pgstream.Consumer, _ *pgxpool.Pool, _ *pgstream.Claim) error {
		return c.Leave(e.ctx)
	}, func(error) int { return 1 }},
}

func zeroIfDone(err error) int {
	if err == nil {
		return 0
	}
	return -1
}

// hurtEngine is a stream with a group, a sink, and a member that nothing hurts.
func hurtEngine(t *testing.T, mode pgstream.Mode) (*engine, *pgstream.Consumer) {
	t.Helper()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode, AckWait: time.Second})
	e.run("create table public.sink (position bigint)")
	return e, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "whole"})
}

// after checks what an interrupted verb has left of these messages.
func (h hurt) after(e *engine, well *pgstream.Consumer, published []int64, result error) {
	e.t.Helper()
	var again []int64
	for range 3 {
		e.jump(time.Hour)
		again = append(again, drain(e, well)...)
	}
	must(e.t, well.Leave(e.ctx))
	slices.Sort(again)
	want := h.again(result)
	rest := len(again)
	switch {
	case slices.Equal(again, published) && want != 0:
	case rest == 0 && want != 1:
	default:
		e.t.Fatalf("%s (%v) of %v: %v came again", h.name, result, published, again)
	}
	// Whoever did its work did it once: an effect and a dead letter exclude a second delivery.
	effects := one[int](e, `select (select count(*) from public.sink where position = any ($1))
		+ (select count(*) from millrace_engine.dead_letter where "position" = any ($1))`, published)
	if (h.name == "effect and ack" || h.name == "dead letter") && effects+rest != len(published) {
		e.t.Fatalf("%s (%v) of %v: %d effects, and %v came again", h.name, result, published, effects, again)
	}
	if s := e.stats("orders", "g"); s.Lag != 0 || s.InFlight != 0 || s.Retrying != 0 {
		e.t.Fatalf("after %s (%v): %+v", h.name, result, s)
	}
}

func TestAConnectionMayEndAtEveryStep(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, well := hurtEngine(t, mode)
		cut := e.cuttable()
		c, err := pgstream.NewConsumer(e.ctx, cut.Pool, pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "cut"})
		must(t, err)
		for _, h := range hurts {
			for n := int64(0); ; n++ {
				published := e.publish("orders", 3)
				var claim *pgstream.Claim
				if h.name != "receive" {
					claim = mustReceive(e, c)
				}
				whole, err := cut.cutAt(e, n, func() error { return h.do(e, c, cut.Pool, claim) })
				if err != nil && !pgstream.IsTransient(err) && !errors.Is(err, io.ErrClosedPipe) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("%s, cut after %d steps: %v", h.name, n, err)
				}
				h.after(e, well, published, err)
				must(t, c.Leave(e.ctx))
				if whole && err == nil {
					break
				}
				if n > 100 {
					t.Fatalf("%s does not end", h.name)
				}
			}
		}
	})
}

func TestAPublisherMayBeCutAtEveryStep(t *testing.T) {
	t.Parallel()
	e, well := hurtEngine(t, pgstream.ModeShared)
	cut := e.cuttable()
	key := "k"
	for _, way := range []struct {
		name    string
		publish func(db *pgxpool.Pool, m pgstream.NewMessage) error
	}{
		{"publish", func(db *pgxpool.Pool, m pgstream.NewMessage) error {
			_, err := pgstream.Publish(e.ctx, db, "orders", m)
			return err
		}},
		{"batch", func(db *pgxpool.Pool, m pgstream.NewMessage) error {
			_, err := pgstream.PublishBatch(e.ctx, db, "orders", []pgstream.NewMessage{m})
			return err
		}},
		{"copy", func(db *pgxpool.Pool, m pgstream.NewMessage) error {
			return pgstream.PublishCopy(e.ctx, db, "orders", []pgstream.NewMessage{m})
		}},
		{"transaction", func(db *pgxpool.Pool, m pgstream.NewMessage) error {
			return pgx.BeginFunc(e.ctx, db, func(tx pgx.Tx) error {
				_, err := pgstream.Publish(e.ctx, tx, "orders", m)
				return err
			})
		}},
	} {
		for n := int64(0); ; n++ {
			payload := fmt.Sprintf(`{"id": "%s %d"}`, way.name, n)
			whole, err := cut.cutAt(e, n, func() error { return way.publish(cut.Pool, pgstream.NewMessage{Key: &key, Payload: []byte(payload)}) })
			stored := one[int](e, "select count(*) from millrace.orders where payload = $1", payload)
			if stored > 1 || err == nil && stored != 1 {
				t.Errorf("%s, cut after %d steps (%v): %d messages", way.name, n, err, stored)
			}
			// Nothing of a publisher that is gone holds the horizon back.
			if got := drain(e, well); len(got) != stored {
				t.Errorf("%s, cut after %d steps (%v): %d stored, %v received", way.name, n, err, stored, got)
			}
			if whole && err == nil {
				break
			}
			if n > 100 {
				t.Fatalf("%s does not end", way.name)
			}
		}
	}
}

// Each table in turn is locked by somebody else, so that each verb is stopped, by one timeout or the other, at each of its steps that may wait.
func TestAVerbThatIsStoppedByATimeoutChangesNothing(t *testing.T) {
	t.Parallel()
	inBothModes(t, func(t *testing.T, mode pgstream.Mode) {
		e, well := hurtEngine(t, mode)
		config, err := pgxpool.ParseConfig(e.dsn)
		must(t, err)
		config.ConnConfig.RuntimeParams["lock_timeout"] = "4ms"
		config.ConnConfig.RuntimeParams["statement_timeout"] = "2s" // deadlines of one kind at a time
		impatient, err := pgxpool.NewWithConfig(e.ctx, config)
		must(t, err)
		t.Cleanup(impatient.Close)
		config = config.Copy()
		config.ConnConfig.RuntimeParams["lock_timeout"] = "0"
		config.ConnConfig.RuntimeParams["statement_timeout"] = "12ms"
		hasty, err := pgxpool.NewWithConfig(e.ctx, config)
		must(t, err)
		t.Cleanup(hasty.Close)
		rows, err := e.Query(e.ctx, `select format('lock table %s in access exclusive mode', c.oid::regclass) from pg_class c
			where c.relnamespace = 'millrace_engine'::regnamespace and c.relkind = 'r' and c.relname !~ '_[12]$|segment_._3|schema_version|setting|scout|delayed|dedupe'
			order by c.relname`)
		must(t, err)
		obstacles, err := pgx.CollectRows(rows, pgx.RowTo[string])
		must(t, err)
		obstacles = append(obstacles, "select pg_advisory_xact_lock(536870912 + 1, 0)")
		stopped := map[string]int{}
		for i, obstacle := range obstacles {
			for j, h := range hurts {
				pool := []*pgxpool.Pool{impatient, hasty}[(i+j)%2]
				c, err := pgstream.NewConsumer(e.ctx, pool, pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "hurt"})
				if err != nil { // the machine is busy
					must(t, ignoreTransient(err))
					continue
				}
				published := e.publish("orders", 3)
				var claim *pgstream.Claim
				if h.name != "receive" {
					patient := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "hurt"})
					claim = mustReceive(e, patient)
				}
				tx := e.begin()
				exec(e, tx, obstacle)
				err = h.do(e, c, pool, claim)
				rollback(e, tx)
				_ = tx.Conn().Close(e.ctx)
				if err != nil {
					stopped[h.name]++
					must(t, ignoreTransient(err))
				}
				h.after(e, well, published, err)
				must(t, e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "hurt"}).Leave(e.ctx))
			}
		}
		for _, h := range hurts {
			if stopped[h.name] == 0 {
				t.Errorf("%s was never stopped: the test proves nothing", h.name)
			}
		}
	})
}

func ignoreTransient(err error) error {
	if pgstream.IsTransient(err) {
		return nil
	}
	return err
}
