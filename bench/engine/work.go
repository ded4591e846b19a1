package engine

import (
	"context"
	"slices"
	"time"
)

// Work is one thing to measure.
type Work struct {
	Name  string
	Yield []Yield // its rows; one measurement can give several
	// N is how many messages a measurement takes, in the full form and in the short one.
	N, ShortN int
	// Once says that the short form measures it once only, because it takes long.
	Once bool
	// Versus are the systems that a row is compared with.
	Versus []string

	run func(ctx context.Context, b *bed) (map[string]float64, error)
}

// Yield is one row of a work.
type Yield struct{ Name, Unit string }

// How many producers and consumers work at once.
const (
	singleProducers = 8
	batchProducers  = 2
	consumers       = 2
	publishBatch    = 1000
)

// Works are all works, in the order of the report.
func Works() []Work {
	rate := func(name string) []Yield { return []Yield{{name, "msg/s"}} }
	drain := func(name string, batch, n, short int, versus ...string) Work {
		return Work{Name: name, Yield: rate(name), N: n, ShortN: short, Versus: versus,
			run: func(ctx context.Context, b *bed) (map[string]float64, error) { return b.drain(ctx, name, batch) }}
	}
	return []Work{
		{Name: "publish-single", Yield: rate("publish-single"), N: 50_000, ShortN: 5_000, Versus: []string{"limit-insert", "skip-locked"},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.publish(ctx, "publish-single", singleProducers, 1)
			}},
		{Name: "publish-batch-1000", Yield: rate("publish-batch-1000"), N: 500_000, ShortN: 50_000, Versus: []string{"limit-copy", "skip-locked"},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.publish(ctx, "publish-batch-1000", batchProducers, publishBatch)
			}},
		drain("consume-batch-1", 1, 20_000, 3_000, "skip-locked", "skip-locked-async"),
		drain("consume-batch-10", 10, 100_000, 20_000, "skip-locked", "skip-locked-async"),
		drain("consume-batch-100", 100, 300_000, 60_000, "skip-locked", "limit-read"),
		drain("consume-batch-1000", 1000, 500_000, 100_000, "skip-locked", "limit-read"),
		{Name: "latency-500", Yield: []Yield{{"latency-500-p50", "ms"}, {"latency-500-p99", "ms"}}, N: 10_000, ShortN: 1_500,
			Versus: []string{"skip-locked", "limit-read"},
			run:    func(ctx context.Context, b *bed) (map[string]float64, error) { return b.latency(ctx) }},
		{Name: "footprint", Yield: []Yield{{"wal-per-message", "bytes"}, {"dead-tuples-per-message", "rows"}, {"cpu-per-message", "µs"}}, N: 50_000, ShortN: 5_000,
			Versus: []string{"limit-insert", "skip-locked"},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.footprint(ctx, singleProducers, 1, "")
			}},
		{Name: "footprint-batch", Yield: []Yield{{"wal-per-message-batch-1000", "bytes"}, {"dead-tuples-per-message-batch-1000", "rows"},
			{"cpu-per-message-batch-1000", "µs"}},
			N: 200_000, ShortN: 50_000, Versus: []string{"limit-copy", "skip-locked"},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.footprint(ctx, batchProducers, publishBatch, "-batch-1000")
			}},
		{Name: "held-xmin", Once: true, N: 120_000, ShortN: 20_000, Versus: []string{"skip-locked"},
			Yield: []Yield{{"held-xmin", "last/first"}, {"held-xmin-p50-first", "ms"}, {"held-xmin-p50-last", "ms"},
				{"held-xmin-cores-first", "cores"}, {"held-xmin-cores-last", "cores"}},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) { return b.heldXmin(ctx) }},
	}
}

// named tells whether a name from the command line means this work: its own, or that of one of its rows.
func (w Work) named(name string) bool {
	return w.Name == name || slices.ContainsFunc(w.Yield, func(y Yield) bool { return y.Name == name })
}

// stalled is how long a work may stand still before it has failed. It is long: machines can be busy.
const stalled = 30 * time.Second
