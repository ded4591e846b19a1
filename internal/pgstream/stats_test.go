package pgstream_test

import (
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Positions of a transaction that rolled back at the end of a quiet stream are not work to do, and nobody may be woken by
// them or kept from scaling down.
func TestRolledBackPositionsAtTheEndAreNoLag(t *testing.T) {
	for _, mode := range []pgstream.Mode{pgstream.ModeShared, pgstream.ModeOrdered} {
		t.Run(string(mode), func(t *testing.T) {
			e := newEngine(t)
			e.stream("orders")
			e.group(pgstream.GroupSpec{Stream: "orders", Name: "g", Mode: mode})
			c := e.consumer(pgstream.ConsumerConfig{Stream: "orders", Group: "g", Member: "one"})
			e.publish("orders", 10)
			drain(e, c)
			tx := e.begin()
			publishIn(e, tx, "orders")
			publishIn(e, tx, "orders")
			rollback(e, tx)
			drain(e, c)
			if s := e.stats("orders", "g"); s.Lag != 0 || s.OldestAge != 0 {
				t.Errorf("after a rollback: lag %d, oldest %s", s.Lag, s.OldestAge)
			}
			e.publish("orders", 1)
			if s := e.stats("orders", "g"); s.Lag < 1 || s.InFlight != 0 {
				t.Errorf("with one message to claim: lag %d, in flight %d", s.Lag, s.InFlight)
			}
		})
	}
}
