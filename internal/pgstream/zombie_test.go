package pgstream_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// hunt is two calls of end_zombies on a connection, as a scout makes them: the first only notes who holds a claim.
func (e *engine) hunt(db pgstream.DB) []*pgstream.Zombie {
	e.t.Helper()
	var seen, found string
	must(e.t, db.QueryRow(e.ctx, "select seen::text, zombies::text from millrace_engine.end_zombies()").Scan(&seen, &found))
	if found != "[]" {
		e.t.Errorf("a first look found %s", found)
	}
	must(e.t, db.QueryRow(e.ctx, "select zombies::text from millrace_engine.end_zombies($1::text::jsonb)", seen).Scan(&found))
	var zombies []*pgstream.Zombie
	must(e.t, json.Unmarshal([]byte(found), &zombies))
	return zombies
}

// The client of a sink hangs after its effect and its ack, before the commit. Its claim expires, and nobody can take it over until its
// session is ended: then the new owner's effect is the only one.
func TestAZombieIsEndedAndTheNewOwnersEffectIsTheOnlyOne(t *testing.T) {
	t.Parallel()
	for _, verb := range []struct {
		name string
		mode pgstream.Mode
		sql  string
	}{
		{"ack", pgstream.ModeShared, "select millrace.ack($1)"},
		{"ack in an Ordered group", pgstream.ModeOrdered, "select millrace.ack($1)"},
		{"ack_messages", pgstream.ModeShared, "select millrace.ack_messages($1, array[1])"},
		{"nack", pgstream.ModeShared, "select millrace.nack($1, array[1], 5)"},
		{"nack in an Ordered group", pgstream.ModeOrdered, "select millrace.nack($1, array[1], 5)"},
		{"dead_letter", pgstream.ModeShared, "select millrace.dead_letter($1, array[1], 'bad')"},
		{"release", pgstream.ModeShared, "select millrace.release($1)"},
		{"extend", pgstream.ModeShared, "select millrace.extend($1, 3600)"},
	} {
		t.Run(verb.name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stopClock()
			e.stream("orders")
			e.run("create table effect (by text)")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: verb.mode, AckWait: 30 * time.Second})
			e.publish("orders", 1)
			old := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "old"})
			heir := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "heir"})
			claim := mustReceive(e, old)
			tx := e.begin()
			exec(e, tx, "insert into effect values ('old')")
			exec(e, tx, verb.sql, claim.Token)
			zombie := pid(tx)
			conn := e.connect()

			e.jump(29 * time.Second)
			if found := e.hunt(conn); len(found) > 0 {
				t.Fatalf("the claim has not expired: %v", found[0])
			}
			e.jump(60 * time.Second)
			if found := e.hunt(conn); len(found) > 0 {
				t.Fatalf("the claim has not expired for long: %v", found[0])
			}
			if claim := receive(e, heir); claim != nil {
				t.Fatal("the claim was taken over while its owner may still commit")
			}
			e.jump(2 * time.Second)
			found := e.hunt(conn)
			if len(found) != 1 || !found[0].Ended || found[0].PID != int(zombie) || found[0].Stream != "orders" || found[0].Group != "g" {
				t.Fatalf("found %v; want session %d ended", found, zombie)
			}
			taken := mustReceive(e, heir)
			same(t, "taken over", positions(taken), []int64{1})
			if err := tx.Commit(e.ctx); err == nil {
				t.Error("the zombie committed")
			}
			own := e.begin()
			exec(e, own, "insert into effect values ('heir')")
			must(t, heir.AckTx(e.ctx, own, taken.Token))
			commit(e, own)
			if by := one[string](e, "select string_agg(by, ',') from effect"); by != "heir" {
				t.Errorf("the effects are of %s, want only the heir's", by)
			}
			if found := e.hunt(conn); len(found) > 0 {
				t.Errorf("found %v after the end", found[0])
			}
		})
	}
}

func TestAZombieThatHoldsARetryIsEnded(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: 30 * time.Second})
	e.publish("orders", 1)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	must(t, c.Nack(e.ctx, mustReceive(e, c).Token, []int64{1}, 0, ""))
	retry := mustReceive(e, c)
	tx := e.begin()
	must(t, c.AckTx(e.ctx, tx, retry.Token))
	conn := e.connect()
	e.jump(89 * time.Second)
	if found := e.hunt(conn); len(found) > 0 {
		t.Fatalf("too early: %v", found[0])
	}
	if claim := receive(e, c); claim != nil {
		t.Fatal("taken over while its owner may still commit")
	}
	e.jump(2 * time.Second)
	if found := e.hunt(conn); len(found) != 1 || !found[0].Ended {
		t.Fatalf("found %v", found)
	}
	again := mustReceive(e, c)
	same(t, "taken over", positions(again), []int64{1})
	must(t, c.Ack(e.ctx, again.Token))
}

func TestOnlyZombiesAreEnded(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: 30 * time.Second})
	e.publish("orders", 5)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 1})
	conn := e.connect()
	expired, extended, taken, late := mustReceive(e, c), mustReceive(e, c), mustReceive(e, c), mustReceive(e, c)

	// Somebody whose other connection keeps the claim alive.
	kept := e.begin()
	must(t, c.AckTx(e.ctx, kept, extended.Token))
	if _, err := c.Extend(e.ctx, extended.Token, time.Hour); err != nil {
		t.Fatal(err)
	}
	// Somebody who takes a claim over, or maintains it, holds it exclusively.
	takeover := e.begin()
	lane, number := tokenParts(taken.Token)
	exec(e, takeover, "select pg_advisory_xact_lock((1073741824 + $1)::integer, $2::integer)", lane, number)
	e.jump(10 * time.Minute)
	if found := e.hunt(conn); len(found) > 0 {
		t.Errorf("ended without being one: %v", found[0])
	}
	// Somebody who is late, and acks just now: seen once, and gone at the next look.
	ack := e.begin()
	must(t, c.AckTx(e.ctx, ack, late.Token))
	var seen, found string
	must(t, conn.QueryRow(e.ctx, "select seen::text, zombies::text from millrace_engine.end_zombies()").Scan(&seen, &found))
	commit(e, ack)
	ack = e.begin() // the same session goes on with its next claim
	must(t, c.AckTx(e.ctx, ack, expired.Token))
	must(t, conn.QueryRow(e.ctx, "select zombies::text from millrace_engine.end_zombies($1::text::jsonb)", seen).Scan(&found))
	if found != "[]" {
		t.Errorf("a late ack was ended: %s", found)
	}
	commit(e, ack)
	commit(e, kept)
	rollback(e, takeover)
}

// tokenParts are the lane and the claim's number.
func tokenParts(token string) (lane, number int64) {
	var group, nonce int64
	_, _ = fmt.Sscanf(token, "%d.%d.%d.%d", &group, &lane, &number, &nonce)
	return lane, number
}

func TestOnlyZombiesAreEndedIsSeenBrokenWithoutTheLimit(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.mutate("millrace_engine.end_zombies", "c.expired_at + limit_ > now_", "false")
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.publish("orders", 1)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	tx := e.begin()
	must(t, c.AckTx(e.ctx, tx, mustReceive(e, c).Token))
	if found := e.hunt(e.connect()); len(found) == 0 {
		t.Error("the checker saw nothing wrong")
	}
}

func TestTheLimitOfZombiesIsASetting(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.run("insert into millrace_engine.setting (name, value) values ('zombie_after_seconds', '5')")
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: 30 * time.Second})
	e.publish("orders", 1)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	tx := e.begin()
	must(t, c.AckTx(e.ctx, tx, mustReceive(e, c).Token))
	e.jump(36 * time.Second)
	if found := e.hunt(e.connect()); len(found) != 1 {
		t.Errorf("found %v, want one", found)
	}
}

func TestAPreparedTransactionIsReportedAndNotTouched(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: 30 * time.Second})
	e.publish("orders", 1)
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g"})
	claim := mustReceive(e, c)
	conn := e.connect()
	gid := "zombie-" + e.database()
	exec(e, conn, "begin")
	exec(e, conn, "select millrace.ack($1)", claim.Token)
	exec(e, conn, "prepare transaction '"+gid+"'")
	t.Cleanup(func() { _, _ = conn.Exec(e.ctx, "rollback prepared '"+gid+"'") })
	e.jump(2 * time.Minute)
	found := e.hunt(e.connect())
	if len(found) != 1 || found[0].Ended || found[0].GID != gid || !strings.Contains(found[0].Error(), "commit or roll back") {
		t.Fatalf("found %v", found)
	}
	exec(e, conn, "commit prepared '"+gid+"'")
	if s := e.stats("orders", "g"); s.InFlight != 0 || s.Lag != 0 {
		t.Errorf("after its commit: %+v", s)
	}
}

// login makes a role that may do everything with the engine's tables, for the length of the test, and connects as it.
func (e *engine) login(role string) *pgx.Conn {
	e.t.Helper()
	e.run(`create role "` + role + `" login password 'x'`)
	e.run(`grant usage on schema millrace, millrace_engine, public to "` + role + `"`)
	e.run(`grant select, insert, update, delete on all tables in schema millrace, millrace_engine, public to "` + role + `"`)
	e.run(`grant all on all sequences in schema millrace_engine to "` + role + `"`)
	u, err := url.Parse(e.dsn)
	must(e.t, err)
	u.User = url.UserPassword(role, "x")
	conn, err := pgx.Connect(e.ctx, u.String())
	must(e.t, err)
	e.t.Cleanup(func() {
		_ = conn.Close(e.ctx)
		e.run(`drop owned by "` + role + `"`)
		e.run(`drop role "` + role + `"`)
	})
	return conn
}

// database is the name of the test's database.
func (e *engine) database() string { return one[string](e, "select current_database()") }

// A scout that may not end a session says who holds what, and what would allow it.
func TestAScoutThatMayNotEndAZombieSaysWhatToDo(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", AckWait: 30 * time.Second})
	e.publish("orders", 2)
	app, scout := "app_"+e.database()[:20], "scout_"+e.database()[:20]
	c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", MaxMessages: 1})
	tx, err := e.login(app).Begin(e.ctx)
	must(t, err)
	must(t, c.AckTx(e.ctx, tx, mustReceive(e, c).Token))
	super := e.begin()
	must(t, c.AckTx(e.ctx, super, mustReceive(e, c).Token))
	e.jump(2 * time.Minute)

	conn := e.login(scout)
	found := e.hunt(conn)
	if len(found) != 2 {
		t.Fatalf("found %v, want two", found)
	}
	for _, z := range found {
		want := "grant pg_signal_backend to " + scout
		if z.PID == int(pid(super)) {
			want = "as a superuser"
		}
		if z.Ended || !strings.Contains(z.Error(), want) || strings.Contains(z.Error(), "millrace.ack") {
			t.Errorf("reported: %v", z)
		}
	}
	e.run(`grant pg_signal_backend to "` + scout + `"`)
	found = e.hunt(conn)
	if len(found) != 2 || found[0].Ended == found[1].Ended {
		t.Errorf("with the privilege: %v; want the one that is no superuser's ended", found)
	}
	rollback(e, super)
}

// A driver that begins transactions by itself receives, finds nothing or works, and leaves the transaction open: nobody else of the group gets an answer. Its session is
// ended when it has idled for the limit while somebody waits; not before, and not when nobody does.
func TestWhoReceivesAndLeavesTheTransactionOpenIsEndedWhenSomebodyWaits(t *testing.T) {
	t.Parallel()
	for _, group := range []struct {
		name     string
		mode     pgstream.Mode
		messages int
	}{
		{"it found nothing", pgstream.ModeShared, 0},
		{"it works", pgstream.ModeShared, 1},
		{"of an Ordered group", pgstream.ModeOrdered, 1},
	} {
		t.Run(group.name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.stopClock()
			e.stream("orders")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: group.mode})
			if group.messages > 0 {
				e.publish("orders", group.messages)
			}
			tx := e.begin()
			exec(e, tx, "select count(*) from millrace.receive('orders', 'g', 'naive')")
			conn := e.connect()
			e.jump(10 * time.Minute)
			if found := e.hunt(conn); len(found) > 0 {
				t.Errorf("ended while nobody waits: %v", found[0])
			}
			e.jump(-10 * time.Minute)

			heir := make(chan error, 1)
			go func() {
				_, err := e.Exec(e.ctx, "select count(*) from millrace.receive('orders', 'g', 'heir')")
				heir <- err
			}()
			e.eventually("the heir waits", func() bool { return e.waitsToReceive() })
			e.jump(30 * time.Second)
			if found := e.hunt(conn); len(found) > 0 {
				t.Fatalf("too early: %v", found[0])
			}
			e.jump(10 * time.Minute)
			found := e.hunt(conn)
			if len(found) != 1 || !found[0].Ended || !found[0].Receiving || found[0].PID != int(pid(tx)) || found[0].Stream != "orders" || found[0].Group != "g" ||
				!strings.Contains(found[0].Error(), "in a transaction that it left open") {
				t.Fatalf("found %v; want session %d ended", found, pid(tx))
			}
			must(t, <-heir)
		})
	}
}

// waitsToReceive says whether somebody waits for a group's receive lock.
func (e *engine) waitsToReceive() bool {
	return one[bool](e, `select exists (select from pg_locks k where k.locktype = 'advisory' and k.objsubid = 2 and not k.granted and k.waitstart is not null
		and k.classid::bigint between 536870913 and 1073741823 and k.database = (select oid from pg_database where datname = current_database()))`)
}

// A session that works in the transaction in which it has received is not ended, and one whose state the scout may not see neither: both are reported when
// somebody has waited for the limit.
func TestWhoReceivesAndIsBusyIsReported(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.stopClock()
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	tx := e.begin()
	exec(e, tx, "select count(*) from millrace.receive('orders', 'g', 'naive')")
	heir := make(chan error, 1)
	go func() {
		_, err := e.Exec(e.ctx, "select count(*) from millrace.receive('orders', 'g', 'heir')")
		heir <- err
	}()
	e.eventually("the heir waits", func() bool { return e.waitsToReceive() })
	gate := e.connect()
	exec(e, gate, "select pg_advisory_lock(1)")
	busy := make(chan error, 1)
	go func() {
		_, err := tx.Exec(e.ctx, "select pg_advisory_xact_lock(1)")
		busy <- err
	}()
	e.eventually("it is busy", func() bool {
		return one[bool](e, "select exists (select from pg_stat_activity a where a.pid = $1 and a.state = 'active')", pid(tx))
	})
	conn := e.connect()
	scout := "scout_" + e.database()[:20]
	stranger := e.login(scout)
	e.jump(30 * time.Second)
	if found := append(e.hunt(conn), e.hunt(stranger)...); len(found) > 0 {
		t.Fatalf("too early: %v", found[0])
	}
	e.jump(10 * time.Minute)
	for _, look := range []struct {
		db   *pgx.Conn
		says string
	}{
		{conn, "nobody else of the group can receive; it is busy"},
		{stranger, "grant pg_read_all_stats, pg_signal_backend to " + scout},
	} {
		found := e.hunt(look.db)
		if len(found) != 1 || found[0].Ended || !strings.Contains(found[0].Error(), look.says) {
			t.Errorf("found %v, want one that is not ended: %s", found, look.says)
		}
	}
	exec(e, gate, "select pg_advisory_unlock(1)")
	must(t, <-busy)
	commit(e, tx)
	must(t, <-heir)
	if found := e.hunt(conn); len(found) > 0 {
		t.Errorf("found %v after the end", found[0])
	}
}

// The whole way: a scout that runs ends the zombie, tells it once, and a waiting consumer gets its message.
func TestARunningScoutEndsZombies(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.run("insert into millrace_engine.setting (name, value) values ('zombie_after_seconds', '1')")
	e.stream("orders")
	e.group(pgstream.GroupSpec{Stream: "orders", Name: "g"})
	e.publish("orders", 1)
	old := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Lease: 100 * time.Millisecond})
	tx := e.begin()
	must(t, old.AckTx(e.ctx, tx, mustReceive(e, old).Token))
	heir := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", PollInterval: never, Listener: e.listener()})
	reports := make(chan error, 100)
	e.scoutOn(e.Pool, pgstream.ScoutConfig{}, func(err error) { reports <- err })
	same(t, "taken over", positions(e.mustWake(e.waiting(heir))), []int64{1})
	var z *pgstream.Zombie
	select {
	case err := <-reports:
		if !errors.As(err, &z) || !z.Ended || z.PID != int(pid(tx)) {
			t.Errorf("reported: %v", err)
		}
	case <-time.After(patience):
		t.Error("nothing was reported")
	}
}
