package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Orders publishes orders to a Stream from concurrent transactions, as applications do: each transaction writes a row of
// its own beside the messages, and some roll back.
type Orders struct {
	// Count is the number of messages in transactions that commit.
	Count int
	// Seed makes the same sequence of commits and rollbacks. It is also part of the orders' ids.
	Seed uint64
	// Transactions is how many run at the same time; default 10.
	Transactions int
	// Messages is the number of messages in one transaction; default 50.
	Messages int
	// Rollbacks is the share of transactions that roll back; zero means 0.1, and less than zero none.
	Rollbacks float64
	// PerSecond bounds the rate of messages; zero: as fast as the database takes them.
	PerSecond int
	// Stream is the name of the stream in the database; default OrdersStream.
	Stream string
}

// OrdersStream is the stream of config/samples.
const OrdersStream = "orders"

// errRollback is why a transaction that could have committed does not.
var errRollback = errors.New("the application changed its mind")

func (o Orders) withDefaults() Orders {
	if o.Transactions == 0 {
		o.Transactions = 10
	}
	if o.Messages == 0 {
		o.Messages = 50
	}
	if o.Rollbacks == 0 {
		o.Rollbacks = 0.1
	}
	if o.Stream == "" {
		o.Stream = OrdersStream
	}
	return o
}

// Publish publishes, and adds to produced what was committed and what was rolled back. A database that goes away is
// waited for. It returns early with what it has done when ctx ends.
func (o Orders) Publish(ctx context.Context, dsn string, produced *Produced) error {
	o = o.withDefaults()
	if err := createMarks(ctx, dsn); err != nil {
		return fmt.Errorf("publish orders: %w", err)
	}
	var left atomic.Int64
	left.Store(int64(o.Count))
	group, ctx := errgroup.WithContext(ctx)
	for n := range o.Transactions {
		p := &publisher{
			Orders: o, dsn: dsn, produced: produced, name: fmt.Sprintf("o-%d-%d", o.Seed, n),
			random: rand.New(rand.NewPCG(o.Seed, uint64(n))), pace: newPace(o.PerSecond / o.Transactions),
		}
		group.Go(func() error {
			defer p.close()
			return p.run(ctx, &left)
		})
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("publish orders (seed %d): %w", o.Seed, err)
	}
	return nil
}

// publisher is one application process.
type publisher struct {
	Orders
	dsn      string
	produced *Produced
	name     string
	random   *rand.Rand
	pace     *pace
	conn     *pgx.Conn
	n        int
}

// order is one message and what becomes of it.
type order struct {
	id, amount string
	message    pgstream.NewMessage
}

func (p *publisher) run(ctx context.Context, left *atomic.Int64) error {
	for {
		size, err := p.pace.next(ctx, p.Messages)
		if err != nil {
			return nil //nolint:nilerr // the caller has seen enough
		}
		if remaining := left.Add(int64(-size)) + int64(size); remaining <= 0 {
			return nil
		} else if remaining < int64(size) {
			size = int(remaining)
		}
		// A transaction that does not commit is tried again with other ids, until as many as were asked for are in.
		for {
			orders := p.orders(size)
			rollback := p.random.Float64() < p.Rollbacks
			committed, err := p.transact(context.WithoutCancel(ctx), ctx.Done(), orders, rollback)
			if err != nil {
				return err
			}
			if committed {
				for _, o := range orders {
					p.produced.addValid(o.id, o.amount)
				}
				break
			}
			ids := make([]string, len(orders))
			for i, o := range orders {
				ids[i] = o.id
			}
			p.produced.addRolledBack(ids)
			if ctx.Err() != nil {
				return nil
			}
		}
	}
}

func (p *publisher) orders(count int) []order {
	orders := make([]order, count)
	for i := range orders {
		p.n++
		o := order{id: p.name + "-" + strconv.Itoa(p.n), amount: fmt.Sprintf("%d.%02d", p.random.IntN(1000), p.random.IntN(100))}
		customer := fmt.Sprintf("customer-%d", p.random.IntN(500))
		payload, err := json.Marshal(map[string]any{
			"order_id": o.id, "customer_id": customer, "amount": json.Number(o.amount), "created_at": time.Now().UTC().Format(time.RFC3339Nano),
		})
		if err != nil {
			panic(err) // strings and numbers can be marshalled
		}
		o.message = pgstream.NewMessage{Key: &customer, Payload: payload}
		orders[i] = o
	}
	return orders
}

// transact runs one transaction and returns whether it committed (I1). stop gives up waiting for a database that is away.
func (p *publisher) transact(ctx context.Context, stop <-chan struct{}, orders []order, rollback bool) (bool, error) {
	mark := uuid.New()
	conn, err := p.connect(ctx, stop)
	if err != nil {
		return false, err
	}
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "insert into scenario.mark (id, published) values ($1, true)", mark); err != nil {
			return err
		}
		// Some one by one, some together: what an application may do in one transaction.
		single := min(2, len(orders))
		for _, o := range orders[:single] {
			if _, err := pgstream.Publish(ctx, tx, p.Stream, o.message); err != nil {
				return err
			}
		}
		rest := make([]pgstream.NewMessage, 0, len(orders))
		for _, o := range orders[single:] {
			rest = append(rest, o.message)
		}
		if _, err := pgstream.PublishBatch(ctx, tx, p.Stream, rest); err != nil {
			return err
		}
		if rollback {
			return errRollback
		}
		return nil
	})
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, errRollback) && !conn.IsClosed():
		return false, nil
	case conn.IsClosed() || pgstream.IsTransient(err):
		return p.resolve(ctx, stop, mark)
	default:
		return false, err
	}
}

// resolve finds out whether the transaction with this mark committed, when the answer to its COMMIT was lost. If it is not
// there, its mark is taken by another word, so that it cannot come later; while it is still open, that waits for its end.
func (p *publisher) resolve(ctx context.Context, stop <-chan struct{}, mark uuid.UUID) (bool, error) {
	for {
		conn, err := p.connect(ctx, stop)
		if err != nil {
			return false, err
		}
		var published bool
		_, err = conn.Exec(ctx, "insert into scenario.mark (id, published) values ($1, false) on conflict do nothing", mark)
		if err == nil {
			err = conn.QueryRow(ctx, "select published from scenario.mark where id = $1", mark).Scan(&published)
		}
		if err == nil {
			return published, nil
		}
		if !conn.IsClosed() && !pgstream.IsTransient(err) {
			return false, err
		}
	}
}

// connect returns the connection, or a new one when the last has ended. It waits for a database that is away.
func (p *publisher) connect(ctx context.Context, stop <-chan struct{}) (*pgx.Conn, error) {
	if p.conn != nil && !p.conn.IsClosed() {
		return p.conn, nil
	}
	const pause, patience = 100 * time.Millisecond, time.Minute
	for began := time.Now(); ; {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		conn, err := pgx.Connect(attempt, p.dsn)
		cancel()
		if err == nil {
			p.conn = conn
			return conn, nil
		}
		if time.Since(began) > patience {
			return nil, fmt.Errorf("the database has been away for %s: %w", patience, err)
		}
		select {
		case <-stop:
			return nil, fmt.Errorf("the database is away: %w", err)
		case <-time.After(pause):
		}
	}
}

func (p *publisher) close() {
	if p.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = p.conn.Close(ctx)
	}
}

// createMarks makes the table in which each transaction leaves its mark, the application's own row.
func createMarks(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, `create schema if not exists scenario;
		create table if not exists scenario.mark (id uuid primary key, published boolean not null)`)
	return err
}
