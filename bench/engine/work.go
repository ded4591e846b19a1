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
	// Runs and ShortRuns are how often it is measured at most, where that takes long; zero: as often as asked for.
	Runs, ShortRuns int
	// Versus are the systems that a row is compared with.
	Versus []string
	// Shape is what the system is asked to set up, and ShortShape what it is in the short form, when that differs.
	Shape      Shape
	ShortShape *Shape

	run func(ctx context.Context, b *bed) (map[string]float64, error)
	// base measures what the rows are compared with, when that takes a database of its own.
	base      func(ctx context.Context, b *bed) (map[string]float64, error)
	baseShape Shape
}

// Yield is one row of a work.
type Yield struct {
	Name, Unit string
	Base       string // the row of the same work that this one should be as good as
}

// How many producers and consumers work at once.
const (
	singleProducers = 8
	batchProducers  = 2
	consumers       = 2
	publishBatch    = 1000
)

// The systems that do what Millrace does and are compared with it.
var rivals = []string{"skip-locked", "river", "watermill-sql", "pgq", "pgmq"}

func with(name string, more ...string) []string {
	return append(append([]string{name}, rivals...), more...)
}

// Works are all works, in the order of the report.
func Works() []Work {
	rate := func(name string) []Yield { return []Yield{{Name: name, Unit: "msg/s"}} }
	drain := func(name string, batch, n, short int, versus ...string) Work {
		return Work{Name: name, Yield: rate(name), N: n, ShortN: short, Runs: 3, ShortRuns: 2, Versus: versus,
			run: func(ctx context.Context, b *bed) (map[string]float64, error) { return b.drain(ctx, name, batch) }}
	}
	prefetch := drain("consume-prefetch-1", 1, 300_000, 50_000, rivals...)
	prefetch.Shape = Shape{Prefetch: true}
	return []Work{
		{Name: "publish-single", Yield: rate("publish-single"), N: 50_000, ShortN: 5_000, Runs: 3, ShortRuns: 2, Versus: with("limit-insert"),
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.publish(ctx, "publish-single", singleProducers, 1)
			}},
		{Name: "publish-batch-1000", Yield: rate("publish-batch-1000"), N: 300_000, ShortN: 50_000, Runs: 3, ShortRuns: 2, Versus: with("limit-copy", "limit-insert"),
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.publish(ctx, "publish-batch-1000", batchProducers, publishBatch)
			}},
		drain("consume-batch-1", 1, 20_000, 3_000, append(rivals, "skip-locked-async")...),
		drain("consume-batch-10", 10, 100_000, 20_000, append(rivals, "skip-locked-async")...),
		drain("consume-batch-100", 100, 300_000, 50_000, with("limit-read")...),
		drain("consume-batch-1000", 1000, 300_000, 100_000, with("limit-read")...),
		prefetch,
		{Name: "latency-500", Yield: []Yield{{Name: "latency-500-p50", Unit: "ms"}, {Name: "latency-500-p99", Unit: "ms"}}, N: 5_000, ShortN: 1_000, Runs: 3, ShortRuns: 2,
			Versus: with("limit-read"),
			run:    func(ctx context.Context, b *bed) (map[string]float64, error) { return b.latency(ctx) }},
		{Name: "idle", Yield: []Yield{{Name: "idle-server", Unit: "cores"}, {Name: "idle-client", Unit: "cores"}}, N: 5_000, ShortN: 2_000, Runs: 3, ShortRuns: 1,
			Versus: rivals,
			run:    func(ctx context.Context, b *bed) (map[string]float64, error) { return b.idle(ctx) }},
		{Name: "footprint", Yield: []Yield{{Name: "wal-per-message", Unit: "bytes"}, {Name: "dead-tuples-per-message", Unit: "rows"}, {Name: "cpu-per-message", Unit: "µs"}},
			N: 50_000, ShortN: 20_000, Runs: 3, ShortRuns: 2, Versus: with("limit-insert"),
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.footprint(ctx, singleProducers, 1, "")
			}},
		{Name: "footprint-batch", Yield: []Yield{{Name: "wal-per-message-batch-1000", Unit: "bytes"}, {Name: "dead-tuples-per-message-batch-1000", Unit: "rows"},
			{Name: "cpu-per-message-batch-1000", Unit: "µs"}},
			N: 200_000, ShortN: 50_000, Runs: 3, ShortRuns: 2, Versus: with("limit-copy"),
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.footprint(ctx, batchProducers, publishBatch, "-batch-1000")
			}},
		{Name: "held-xmin", Runs: 1, ShortRuns: 1, N: 120_000, ShortN: 16_000, Versus: rivals,
			Yield: []Yield{{Name: "held-xmin", Unit: "last/first"}, {Name: "held-xmin-p50-first", Unit: "ms"}, {Name: "held-xmin-p50-last", Unit: "ms"},
				{Name: "held-xmin-cores-first", Unit: "cores"}, {Name: "held-xmin-cores-last", Unit: "cores"}},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) { return b.heldXmin(ctx) }},
		{Name: "groups-100", N: 500_000, ShortN: 100_000, Runs: 3, ShortRuns: 2, Shape: Shape{Groups: 100}, baseShape: Shape{Groups: 1},
			Yield: []Yield{{Name: "groups-100", Unit: "µs", Base: "groups-1"}, {Name: "groups-1", Unit: "µs"}},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.lanes(ctx, "groups-100", "")
			},
			base: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.lanes(ctx, "groups-1", "")
			}},
		{Name: "streams-1000", N: 500_000, ShortN: 100_000, Runs: 1, ShortRuns: 1, Shape: Shape{Streams: 1000}, ShortShape: &Shape{Streams: 200}, baseShape: Shape{Streams: 10},
			Yield: []Yield{{Name: "streams-1000", Unit: "µs", Base: "streams-10"}, {Name: "streams-10", Unit: "µs"},
				{Name: "streams-1000-publish", Unit: "µs", Base: "streams-10-publish"}, {Name: "streams-10-publish", Unit: "µs"}},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.lanes(ctx, "streams-1000", "streams-1000-publish")
			},
			base: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.lanes(ctx, "streams-10", "streams-10-publish")
			}},
		{Name: "backlog-10m", N: 10_000_000, ShortN: 500_000, Runs: 1, ShortRuns: 1,
			Yield: []Yield{{Name: "backlog-10m", Unit: "µs", Base: "backlog-10k"}, {Name: "backlog-10k", Unit: "µs"}},
			run:   func(ctx context.Context, b *bed) (map[string]float64, error) { return b.backlog(ctx) }},
		{Name: "foreign-locks-10k", N: 100_000, ShortN: 50_000, Runs: 2, ShortRuns: 1,
			Yield: []Yield{{Name: "foreign-locks-10k", Unit: "µs", Base: "foreign-locks-0"}, {Name: "foreign-locks-0", Unit: "µs"},
				{Name: "foreign-locks-10k-p50", Unit: "ms", Base: "foreign-locks-0-p50"}, {Name: "foreign-locks-0-p50", Unit: "ms"}},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.foreignLocks(ctx, "foreign-locks-10k", 10_000)
			},
			base: func(ctx context.Context, b *bed) (map[string]float64, error) {
				return b.foreignLocks(ctx, "foreign-locks-0", 0)
			}},
		{Name: "maintenance", N: 2_000_000, ShortN: 500_000, Runs: 3, ShortRuns: 1, Shape: Shape{Upkeep: true},
			Yield: []Yield{{Name: "maintenance-on", Unit: "msg/s", Base: "maintenance-off"}, {Name: "maintenance-off", Unit: "msg/s"},
				{Name: "maintenance-removals", Unit: "times"}},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) { return b.upkeep(ctx) }},
	}
}

// named tells whether a name from the command line means this work: its own, or that of one of its rows.
func (w Work) named(name string) bool {
	return w.Name == name || slices.ContainsFunc(w.Yield, func(y Yield) bool { return y.Name == name })
}

// stalled is how long a work may stand still before it has failed. It is long: machines can be busy.
const stalled = 30 * time.Second
