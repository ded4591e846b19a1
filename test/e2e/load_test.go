package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/scenario"
)

// steady is a load of positions, and half as many orders, through both pipelines of a namespace, and all that it has put in.
// The ledger grows from fault to fault, so that a late loss of an early message is seen as well.
type steady struct {
	ns                *scenario.Namespace
	perSecond         int
	positions, orders *scenario.Produced
	stop              func()
}

// ordersTable is made without a key, so that an order which is written twice is two rows.
const ordersTable = `create table orders (order_id text not null, amount numeric, "position" bigint not null)`

// pipelines are the Stream, the group and the Processors of both pipelines. What cannot be decoded stays pending, unlike in
// the test of positions.
func pipelines(t *testing.T) string {
	t.Helper()
	return strings.Replace(manifest(t, "positions"), "policy: DeadLetter", "policy: Pending", 1) + "---\n" + manifest(t, "orders")
}

func newSteady(ns *scenario.Namespace, perSecond int) *steady {
	return &steady{ns: ns, perSecond: perSecond, positions: scenario.NewProduced(), orders: scenario.NewProduced()}
}

// start begins to produce. settle ends it.
func (s *steady) start(ctx context.Context, t *testing.T) {
	t.Helper()
	seed := newSeed(t)
	const forever = 1 << 30
	ctx, cancel := context.WithCancel(ctx)
	positions := load(ctx, t, func(ctx context.Context) error {
		return scenario.Positions{Count: forever, Seed: seed, Duplicates: 0.05, Undecodable: 0.002, PerSecond: s.perSecond}.Produce(ctx, s.ns.RedisURL, s.positions)
	})
	orders := load(ctx, t, func(ctx context.Context) error {
		return scenario.Orders{Count: forever, Seed: seed, PerSecond: s.perSecond / 2}.Publish(ctx, s.ns.DSN, s.orders)
	})
	s.stop = func() {
		t.Helper()
		cancel()
		positions()
		orders()
	}
}

// goOn waits until as many positions and orders were produced as the load has in that time.
func (s *steady) goOn(ctx context.Context, t *testing.T, during time.Duration) {
	t.Helper()
	s.produces(ctx, t, s.positions, int(during.Seconds()*float64(s.perSecond)))
	s.produces(ctx, t, s.orders, 1)
}

func (s *steady) produces(ctx context.Context, t *testing.T, p *scenario.Produced, more int) {
	t.Helper()
	until := p.Entries() + more
	eventually(ctx, t, 2*time.Minute, fmt.Sprintf("%d more produced", more), func(context.Context) error {
		if n := p.Entries(); n < until {
			return fmt.Errorf("%d are to come", until-n)
		}
		return nil
	})
}

// arrive waits until more rows of both kinds have arrived.
func (s *steady) arrive(ctx context.Context, t *testing.T, within time.Duration) {
	t.Helper()
	began := time.Now()
	for _, table := range []string{"positions", "orders"} {
		before, err := rows(ctx, s.ns.DSN, table)
		must(t, err)
		eventually(ctx, t, within, "more rows in "+table, func(ctx context.Context) error {
			if n, err := rows(ctx, s.ns.DSN, table); err != nil || n <= before {
				return errors.Join(err, fmt.Errorf("%d rows, as before", n))
			}
			return nil
		})
	}
	t.Logf("rows arrive, seen after %.1f s", time.Since(began).Seconds())
}

// settle ends the load and takes both ledgers until they are exact.
func (s *steady) settle(ctx context.Context, t *testing.T) {
	t.Helper()
	s.stop()
	if l := settle(ctx, t, s.ns.PositionsSink(), s.positions, 90*time.Second); l.Pending != l.Undecodable || l.Undecodable == 0 {
		t.Errorf("%d of %d undecodable entries are pending, want all", l.Pending, l.Undecodable)
	}
	settle(ctx, t, s.ns.OrdersSink(), s.orders, 90*time.Second)
}
