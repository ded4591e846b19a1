package scenario_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/rueidis"
	"github.com/tidwall/gjson"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/redis"
	"github.com/millrace-dev/millrace/test/scenario"
)

func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }

// TestPositionsLedger moves positions to a table by the simplest code that can, and then damages the result in every
// way that a pipeline could.
func TestPositionsLedger(t *testing.T) {
	t.Parallel()
	sink := scenario.Sink{
		DSN: postgres.NewDatabase(t), Table: "positions", RowsQuery: scenario.PositionsQuery("positions"),
		RedisURL: redis.New(t).URL(), RedisStream: scenario.PositionsStream, RedisGroup: "positions", Processor: "telemetry",
	}
	conn := connect(t, sink.DSN)
	exec(t, conn, "create table positions (device_id text, ts timestamptz, latitude double precision)")
	produced := scenario.NewProduced()
	o := scenario.Positions{Count: 5000, Seed: 7, Duplicates: 0.05, Undecodable: 0.01}
	if err := o.Produce(t.Context(), sink.RedisURL, produced); err != nil {
		t.Fatal(err)
	}
	if produced.Entries() != 5000 || produced.Undecodable() < 20 || produced.Undecodable() > 100 || produced.Rows() > 4850 || produced.Rows() < 4500 {
		t.Fatalf("%d entries, %d undecodable, %d rows", produced.Entries(), produced.Undecodable(), produced.Rows())
	}

	before, err := sink.Ledger(t.Context(), produced)
	if err != nil {
		t.Fatal(err)
	}
	if len(before.Missing) != produced.Rows() || before.Unsettled == 0 || before.Pending != produced.Undecodable() || before.Err() == nil {
		t.Fatalf("before anything moves:\n%s", before)
	}
	client := openRedis(t, sink.RedisURL)
	undecodable := move(t, client, conn)
	if l, err := sink.Await(t.Context(), produced, 10*time.Second); err != nil || l.Once != produced.Rows() || l.Pending != len(undecodable) {
		t.Fatalf("after everything moved: %v\n%s", err, l)
	}

	const someRow = "(select ctid from positions limit 1)"
	for _, damage := range []struct{ name, do, undo, says string }{
		{"a missing row", "create table kept as select * from positions limit 1; delete from positions p using kept k where p.ts = k.ts",
			"insert into positions select * from kept", "1 are missing"},
		{"a row twice", "insert into positions select * from positions where ctid = " + someRow,
			"delete from positions p using positions q where p.ts = q.ts and p.device_id = q.device_id and p.ctid > q.ctid", "1 are there more than once"},
		{"the content of another row", "update positions set latitude = latitude + 1000 where ctid = " + someRow, "update positions set latitude = latitude - 1000 where latitude > 500", "1 have other content"},
		{"a row that nobody sent", "insert into positions values ('device-9', '2026-01-01', 1)", "delete from positions where device_id = 'device-9'", "1 were never produced"},
	} {
		exec(t, conn, damage.do)
		l, err := sink.Ledger(t.Context(), produced)
		if err != nil {
			t.Fatal(err)
		}
		if l.Err() == nil || !strings.Contains(l.Err().Error(), damage.says) || !strings.Contains(l.String(), "NOT EXACT") {
			t.Errorf("%s: the ledger says %v; want: %s", damage.name, l.Err(), damage.says)
		}
		exec(t, conn, damage.undo)
	}

	exec(t, conn, "truncate positions")
	if err := client.Do(t.Context(), client.B().Xack().Key(sink.RedisStream).Group(sink.RedisGroup).Id(undecodable[0]).Build()).Error(); err != nil {
		t.Fatal(err)
	}
	l, err := sink.Ledger(t.Context(), produced)
	if err != nil || len(l.Lost) != 1 || !strings.Contains(l.Err().Error(), "1 undecodable ones are lost") {
		t.Fatalf("an undecodable entry was acknowledged and not set aside: %v\n%s", err, l)
	}
	exec(t, conn, "create table millrace_dead_letter (processor text, stream text, entry_id text)")
	exec(t, conn, fmt.Sprintf("insert into millrace_dead_letter values ('telemetry', 'telemetry:t', '%s'), ('telemetry', 'telemetry:t', '1-1')", undecodable[0]))
	l, err = sink.Ledger(t.Context(), produced)
	if err != nil || len(l.Lost) != 0 || l.Dead != 1 || len(l.WronglyDead) != 1 {
		t.Fatalf("it was set aside, and so was another: %v\n%s", err, l)
	}
}

// move reads the whole stream, writes rows, acknowledges what it wrote and returns the ids of the rest.
func move(t *testing.T, client rueidis.Client, conn *pgx.Conn) (undecodable []string) {
	t.Helper()
	const stream, group = scenario.PositionsStream, "positions"
	if err := client.Do(t.Context(), client.B().XgroupCreate().Key(stream).Group(group).Id("0").Build()).Error(); err != nil {
		t.Fatal(err)
	}
	for {
		answer, err := client.Do(t.Context(), client.B().Xreadgroup().Group(group, "one").Count(1000).Streams().Key(stream).Id(">").Build()).AsXRead()
		if rueidis.IsRedisNil(err) {
			return undecodable
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range answer[stream] {
			text := e.FieldValues["payload"]
			device, at := gjson.Get(text, "device_id").String(), gjson.Get(text, "timestamp").Time()
			if !gjson.Valid(text) || device == "" || at.IsZero() {
				undecodable = append(undecodable, e.ID)
				continue
			}
			_, err := conn.Exec(t.Context(), "insert into positions select $1, $2, $3 where not exists (select from positions where device_id = $1 and ts = $2)",
				device, at, gjson.Get(text, "latitude").Float())
			if err != nil {
				t.Fatal(err)
			}
			if err := client.Do(t.Context(), client.B().Xack().Key(stream).Group(group).Id(e.ID).Build()).Error(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestOrdersAreKnownExactlyThroughACrash: PostgreSQL is killed while ten transactions are somewhere between their first
// statement and the answer to their COMMIT. What the publisher says afterwards is what the stream holds.
func TestOrdersAreKnownExactlyThroughACrash(t *testing.T) {
	t.Parallel()
	server := postgres.NewServer(t, postgres.Options{})
	dsn := server.DSN("postgres")
	conn := connect(t, dsn)
	if _, err := schema.Migrate(t.Context(), conn, schema.Options{}); err != nil {
		t.Fatal(err)
	}
	exec(t, conn, "select millrace.create_stream('orders')")
	produced := scenario.NewProduced()
	finished := make(chan error, 1)
	go func() {
		finished <- scenario.Orders{Count: 20_000, Seed: 3, Messages: 20}.Publish(t.Context(), dsn, produced)
	}()
	for round := 1; round <= 3; round++ {
		for deadline := time.Now().Add(time.Minute); produced.Rows() < round*4000; {
			if time.Now().After(deadline) {
				t.Fatalf("%d orders in a minute", produced.Rows())
			}
			time.Sleep(time.Millisecond)
		}
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-finished; err != nil {
		t.Fatal(err)
	}
	if produced.Rows() != 20_000 {
		t.Errorf("%d orders are committed, want 20,000", produced.Rows())
	}
	// The stream itself is the table that is compared.
	sink := scenario.Sink{DSN: dsn, Table: "millrace.orders", RowsQuery: "select payload ->> 'order_id', payload ->> 'amount' from millrace.orders"}
	l, err := sink.Ledger(t.Context(), produced)
	if err == nil {
		err = l.Err()
	}
	if err != nil || l.RolledBack == 0 {
		t.Fatalf("%v\n%s", err, l)
	}
}

// TestPositionsAreKnownExactlyThroughACrash: Redis is killed while a page of entries is on its way. What the producer says
// afterwards is what the stream holds, entry for entry.
func TestPositionsAreKnownExactlyThroughACrash(t *testing.T) {
	t.Parallel()
	server, err := redis.Start(t.Context(), redis.Options{Persist: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	const count = 60_000
	produced := scenario.NewProduced()
	finished := make(chan error, 1)
	go func() {
		finished <- scenario.Positions{Count: count, Seed: 3, Duplicates: 0.1, Undecodable: 0.1}.Produce(t.Context(), server.URL(), produced)
	}()
	for round := 1; round <= 3; round++ {
		for deadline := time.Now().Add(time.Minute); produced.Entries() < round*count/5; {
			if time.Now().After(deadline) {
				t.Fatalf("%d positions in a minute", produced.Entries())
			}
			time.Sleep(time.Millisecond)
		}
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-finished; err != nil {
		t.Fatal(err)
	}
	sink := scenario.Sink{
		DSN: postgres.NewDatabase(t), Table: "positions", RowsQuery: scenario.PositionsQuery("positions"),
		RedisURL: server.URL(), RedisStream: scenario.PositionsStream, RedisGroup: "nobody", Processor: "nobody",
	}
	exec(t, connect(t, sink.DSN), "create table positions (device_id text, ts timestamptz, latitude double precision)")
	l, err := sink.Ledger(t.Context(), produced)
	if err != nil {
		t.Fatal(err)
	}
	if l.Entries != count || l.Unsettled != count-l.Undecodable || l.Pending != l.Undecodable || len(l.Lost) > 0 {
		t.Errorf("the stream holds other entries than %d:\n%s", count, l)
	}
}

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func exec(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func openRedis(t *testing.T, url string) rueidis.Client {
	t.Helper()
	client, err := rueidis.NewClient(rueidis.MustParseURL(url))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}
