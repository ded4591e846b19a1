package pipeline_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/redis/rueidis"
)

// ledger is what was put in and what came out. Every produced id must end as exactly one of row, duplicate, dead letter or
// pending entry.
type ledger struct {
	Produced, Valid, Duplicates, Undecodable int
	Rows, Missing, DeadLetters, Pending      int
	Undelivered                              int
}

func (l ledger) String() string {
	return fmt.Sprintf("produced %d = %d valid + %d duplicates + %d undecodable; rows %d, missing %d, dead letters %d, pending %d, undelivered %d",
		l.Produced, l.Valid, l.Duplicates, l.Undecodable, l.Rows, l.Missing, l.DeadLetters, l.Pending, l.Undelivered)
}

// load produces Positions whose n-th valid one is of device n mod devices, so that the set of rows can be checked.
type load struct {
	total       int
	devices     int
	duplicates  float64 // share
	undecodable float64 // share
	poison      float64 // share that the table refuses: odometer -1
	seed        uint64

	valid, duplicated, broken, poisoned atomic.Int64
}

// seeded returns a load whose seed is printed, so that a failure can be repeated.
func seeded(t testing.TB, l *load) *load {
	t.Helper()
	l.seed = rand.Uint64()
	l.devices = 1000
	t.Logf("seed %d", l.seed)
	return l
}

func (l *load) position(n int) string { return position(n%l.devices, n/l.devices) }

// produce appends the load to a stream, at once or until ctx ends.
func (l *load) produce(ctx context.Context, client rueidis.Client, stream string) error {
	random := rand.New(rand.NewPCG(l.seed, 1))
	const page = 500
	for done := 0; done < l.total; {
		cmds := make(rueidis.Commands, 0, page)
		for ; len(cmds) < page && done < l.total; done++ {
			cmds = append(cmds, client.B().Xadd().Key(stream).Id("*").FieldValue().FieldValue("payload", l.next(random)).Build())
		}
		for _, r := range client.DoMulti(ctx, cmds...) {
			if err := r.Error(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *load) next(random *rand.Rand) string {
	valid := int(l.valid.Load())
	switch r := random.Float64(); {
	case r < l.undecodable:
		l.broken.Add(1)
		return []string{`{"device_id":`, `not json`, `{"timestamp":"2026-01-01T00:00:00Z"}`, `{"device_id":"x","timestamp":"yesterday"}`}[random.IntN(4)]
	case r < l.undecodable+l.duplicates && valid > 0:
		l.duplicated.Add(1)
		return l.position(valid - 1 - random.IntN(min(valid, 10_000)))
	case r >= l.undecodable+l.duplicates && r < l.undecodable+l.duplicates+l.poison: // not a duplicate that came too early to be one
		n := l.poisoned.Add(1)
		return fmt.Sprintf(`{"device_id":"poison-%d","timestamp":"2026-01-01T00:00:00Z","odometer":-1}`, n)
	}
	l.valid.Add(1)
	return l.position(valid)
}

// ledger reads what came out.
func (w *world) ledger(l *load) ledger {
	w.t.Helper()
	return ledger{
		Produced: l.total, Valid: int(l.valid.Load()), Duplicates: int(l.duplicated.Load()), Undecodable: int(l.broken.Load()),
		Rows: w.rows(), DeadLetters: w.deadLetters(), Pending: w.pending(), Undelivered: w.undelivered(),
		Missing: w.count(`select count(*) from generate_series(0, $1 - 1) n left join positions p
			on p.device_id = 'device-' || lpad((n % $2)::text, 4, '0') and p.ts = timestamptz '2026-01-01Z' + (n / $2) * interval '1 s'
			where p.device_id is null`, int(l.valid.Load()), l.devices),
	}
}

// Done means 3 at process level: 100,000 Positions with 5 % duplicates and 1 % undecodable, while the processor is killed
// twice without warning. I1, I2, I3.
func TestLedger_ProcessorKilledTwice(t *testing.T) {
	for _, policy := range []string{"DeadLetter", "Pending"} {
		t.Run("undecodable entries follow the policy "+policy, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			l := seeded(t, &load{total: 100_000, duplicates: 0.05, undecodable: 0.01})
			configuration := w.configText("policy: DeadLetter", "policy: "+policy)

			producing := make(chan error, 1)
			p := w.start("first", configuration)
			p.ready()
			go func() { producing <- l.produce(w.ctx, w.redis, w.stream) }()
			eventually(t, func() (bool, string) { n := w.rows(); return n > 15_000, fmt.Sprint(n, " rows") })
			p.kill()
			// The same name comes back, as a container that is restarted in its pod, and reads its own pending entries.
			p = w.start("first", configuration)
			eventually(t, func() (bool, string) { n := w.rows(); return n > 50_000, fmt.Sprint(n, " rows") })
			p.kill()
			// Another name, as a pod that replaces another, takes over what the dead one held.
			w.start("second", configuration)
			if err := <-producing; err != nil {
				t.Fatal(err)
			}

			wantPending, wantDead := 0, int(l.broken.Load())
			if policy == "Pending" {
				wantPending, wantDead = wantDead, 0
			}
			var end ledger
			eventually(t, func() (bool, string) {
				end = w.ledger(l)
				return end.Rows == end.Valid && end.Undelivered == 0 && end.Pending == wantPending && end.DeadLetters == wantDead, end.String()
			})
			t.Log(end)
			if end.Missing != 0 || end.Valid+end.Duplicates+end.Undecodable != end.Produced {
				t.Fatal("the ledger does not balance")
			}
		})
	}
}
