package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"time"

	"github.com/jackc/pgx/v5"
	"go.opentelemetry.io/otel"

	"github.com/millrace-dev/millrace/client"
)

func ExampleOpen() {
	ctx := context.Background()
	c, err := client.Open(ctx, databaseURL(), client.Options{
		Logger:      slog.New(slog.NewJSONHandler(os.Stderr, nil)),
		CallTimeout: 10 * time.Second,
		Pool:        client.PoolOptions{MaxConns: 20, ConnectTimeout: 10 * time.Second, StatementTimeout: 15 * time.Second},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	fmt.Println(c.Pool().Config().MaxConns)
	// Output: 20
}

func ExampleOptions_tracing() {
	ctx := context.Background()
	c, err := client.Open(ctx, databaseURL(), client.Options{TracerProvider: otel.GetTracerProvider()})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	// Output:
}

func ExampleSession_Publish() {
	ctx := context.Background()
	declare(ctx, "select millrace.create_stream('orders')")
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	position, err := c.Publish(ctx, "orders", client.NewMessage{
		Key:       "customer-7",
		Headers:   client.Headers{"type": "OrderPlaced"},
		Payload:   []byte(`{"order_id": "o-1", "amount": 12.5}`),
		DedupeKey: "request-4711",
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(position)
	// Output: 1
}

func ExampleSession_PublishBatch() {
	ctx := context.Background()
	declare(ctx, "select millrace.create_stream('readings')")
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	positions, err := c.PublishBatch(ctx, "readings", []client.NewMessage{
		{Key: "meter-1", Payload: []byte(`{"kwh": 3}`)},
		{Key: "meter-2", Payload: []byte(`{"kwh": 5}`)},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(positions)
	// Output: [1 2]
}

func ExampleClient_In() {
	ctx := context.Background()
	declare(ctx, "select millrace.create_stream('invoices')", "create table invoice (id text primary key)")
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	err = c.Transaction(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "insert into invoice values ('i-1')"); err != nil {
			return err
		}
		_, err := c.In(tx).Publish(ctx, "invoices", client.NewMessage{Payload: []byte(`{"id": "i-1"}`)})
		return err
	})
	fmt.Println(err)
	// Output: <nil>
}

func ExampleClient_Consume() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	declare(ctx, "select millrace.create_stream('tasks')", "select millrace.create_group('tasks', 'workers')",
		`select millrace.publish('tasks', '{"task": "sweep"}')`)
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	handler := func(ctx context.Context, d *client.Delivery) error {
		var task struct{ Task string }
		if err := json.Unmarshal(d.Payload, &task); err != nil {
			return client.Permanent(err) // it will never be JSON: a dead letter at once
		}
		fmt.Println(task.Task, "attempt", d.Attempt)
		if d.Attempt == 1 {
			return client.RetryAfter(errors.New("the broom is busy"), 10*time.Millisecond)
		}
		stop() // one task is enough for an example; a service ends with signal.NotifyContext
		return nil
	}
	err = c.Consume(ctx, "tasks", "workers", handler, client.ConsumeOptions{Concurrency: 4})
	fmt.Println(err)
	// Output:
	// sweep attempt 1
	// sweep attempt 2
	// <nil>
}

func ExampleDelivery_Tx() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	declare(ctx, "select millrace.create_stream('payments')", "select millrace.create_stream('receipts')", "select millrace.create_group('payments', 'ledger')",
		"create table entry (amount numeric not null)", `select millrace.publish('payments', '12.5')`)
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	handler := func(ctx context.Context, d *client.Delivery) error {
		tx, err := d.Tx(ctx)
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "insert into entry values ($1::text::numeric)", string(d.Payload)); err != nil {
			return err
		}
		// Row, receipt and ack are committed together when this handler returns nil.
		_, err = c.In(tx).Publish(ctx, "receipts", client.NewMessage{Payload: d.Payload})
		return err
	}
	go func() {
		defer stop()
		for m, err := range c.Tail(ctx, "receipts", client.First) {
			fmt.Println(string(m.Payload), err)
			return
		}
	}()
	if err := c.Consume(ctx, "payments", "ledger", handler, client.ConsumeOptions{}); err != nil {
		log.Fatal(err)
	}
	// Output: 12.5 <nil>
}

func ExampleClient_Read() {
	ctx := context.Background()
	declare(ctx, "select millrace.create_stream('letters')",
		`select millrace.publish_batch('letters', array['"a"', '"b"', '"c"']::jsonb[])`)
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	for m, err := range c.Read(ctx, "letters", 2) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(m.Position, string(m.Payload))
	}
	// Output:
	// 2 "b"
	// 3 "c"
}

func ExampleSession_Append() {
	ctx := context.Background()
	declare(ctx, "select millrace.create_stream('accounts', p_versions => true)")
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	opened := client.NewEvent{Headers: client.Headers{"type": "Deposited"}, Payload: []byte(`{"amount": 100}`)}
	appended, err := c.Append(ctx, "accounts", "alice", client.NoVersion, opened)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("version", appended.Version)

	_, err = c.Append(ctx, "accounts", "alice", client.NoVersion, opened)
	var conflict *client.VersionError
	if errors.As(err, &conflict) {
		fmt.Println("somebody was faster: version", conflict.Present)
	}
	// Output:
	// version 1
	// somebody was faster: version 1
}

func ExampleAggregate() {
	ctx := context.Background()
	declare(ctx, "select millrace.create_stream('wallets', p_versions => true)",
		`select millrace.append('wallets', 'bob', array['{"amount": 100}', '{"amount": -30}']::jsonb[])`)
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	balance := func(sum int, e client.Event) (int, error) {
		var change struct{ Amount int }
		err := json.Unmarshal(e.Payload, &change)
		return sum + change.Amount, err
	}
	sum, version, err := client.Aggregate(ctx, c.Session, "wallets", "bob", 0, balance)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(sum, version)
	// The decision below is refused when somebody has appended meanwhile.
	if sum >= 50 {
		_, err = c.Append(ctx, "wallets", "bob", version, client.NewEvent{Payload: []byte(`{"amount": -50}`)})
	}
	fmt.Println(err)
	// Output:
	// 70 2
	// <nil>
}

func ExampleMemory() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	declare(ctx, "select millrace.create_stream('steps')", "select millrace.create_group('steps', 'fulfilment', 'Ordered')", "select millrace.create_memory('workflows')",
		`select millrace.publish('steps', '{"step": "paid"}', 'o-1')`)
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	memory, err := c.OpenMemory(ctx, "workflows")
	if err != nil {
		log.Fatal(err)
	}
	handler := func(ctx context.Context, d *client.Delivery) error {
		tx, err := d.Tx(ctx)
		if err != nil {
			return err
		}
		workflow, err := memory.In(tx).Read(ctx, d.Key)
		if err != nil {
			return err
		}
		// State, ack and the next message are committed together.
		if _, err := memory.In(tx).Write(ctx, d.Key, client.WorkflowWrite{State: d.Payload, Expected: workflow.Version}); err != nil {
			return err
		}
		stop()
		return nil
	}
	if err := c.Consume(ctx, "steps", "fulfilment", handler, client.ConsumeOptions{}); err != nil {
		log.Fatal(err)
	}
	workflow, err := memory.Read(context.Background(), "o-1")
	fmt.Println(string(workflow.State), workflow.Version, err)
	// Output: {"step": "paid"} 1 <nil>
}

func ExampleMemory_Lock() {
	ctx := context.Background()
	declare(ctx, "select millrace.create_memory('parcels')")
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	memory, err := c.OpenMemory(ctx, "parcels")
	if err != nil {
		log.Fatal(err)
	}

	lock, err := memory.Lock(ctx, "o-1", client.LockOptions{TTL: time.Minute, Holder: "worker-1"})
	if err != nil {
		log.Fatal(err)
	}
	_, err = memory.TryLock(ctx, "o-1", client.LockOptions{})
	fmt.Println("a second lock is refused:", errors.Is(err, client.ErrLocked))
	// Call the carrier; it takes long.
	version, err := memory.Write(ctx, "o-1", client.WorkflowWrite{
		State: []byte(`{"label": "printed"}`), Expected: lock.Workflow.Version, Lock: lock, Unlock: true,
	})
	fmt.Println(version, err)
	// Output:
	// a second lock is refused: true
	// 1 <nil>
}

func ExampleClient_TailFrames() {
	ctx := context.Background()
	declare(ctx, "select millrace.create_stream('runs', p_frames => '{}')")
	c, err := client.Open(ctx, databaseURL(), client.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	for _, f := range []client.NewFrame{
		{Mode: client.DurableSummary, Type: "progress", Payload: []byte(`{"percent": 10}`)},
		{Mode: client.BestEffortLive, Type: "token", Payload: []byte(`"hello"`)},
		{Mode: client.DurableSummary, Type: "progress", Payload: []byte(`{"percent": 100, "done": true}`)},
	} {
		if _, err := c.AppendFrame(ctx, "runs", "run-1", f); err != nil {
			log.Fatal(err)
		}
	}
	for f, err := range c.TailFrames(ctx, "runs", "run-1", "0", client.TailOptions{}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(f.Type, string(f.Payload))
		if f.Count == 3 {
			break
		}
	}
	summary, err := c.ReadSummary(ctx, "runs", "run-1")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(summary.Version, string(summary.Document))
	// Output:
	// progress {"percent": 10}
	// token "hello"
	// progress {"done": true, "percent": 100}
	// 2 {"done": true, "percent": 100}
}
