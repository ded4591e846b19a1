package eventstore

import (
	"context"
	"slices"
	"strings"
)

// Work is one thing to measure.
type Work struct {
	Name  string
	Yield []Yield // its rows; one measurement can give several
	// N is how many calls a measurement makes, in the full form and in the short one.
	N, ShortN int
	// Versus are the systems that a row is compared with.
	Versus []string

	run func(ctx context.Context, b *bed) (map[string]float64, error)
}

// Yield is one row of a work.
type Yield struct {
	Name, Unit string
	Base       string // the row of the same work that this one should be as good as
}

// clients is how many work at once, where it is not one.
const clients = 8

var (
	stores = []string{"emmett", "limit-table"}
	logs   = []string{"flowfabric", "limit-table"}
)

// isFrames tells whether a work needs a FrameLog; the others need expected versions.
func isFrames(work string) bool {
	for _, prefix := range []string{"frame", "tail", "summary", "live"} {
		if strings.HasPrefix(work, prefix) {
			return true
		}
	}
	return false
}

// Works are all works, in the order of the report.
func Works() []Work {
	one := func(name, unit string, n, short int, versus []string, run func(ctx context.Context, b *bed) (float64, error)) Work {
		return Work{Name: name, Yield: []Yield{{Name: name, Unit: unit}}, N: n, ShortN: short, Versus: versus,
			run: func(ctx context.Context, b *bed) (map[string]float64, error) {
				got, err := run(ctx, b)
				return map[string]float64{name: got}, err
			}}
	}
	appends := func(name string, clients, events, n, short int) Work {
		return one(name, "appends/s", n, short, stores, func(ctx context.Context, b *bed) (float64, error) { return b.appends(ctx, clients, events) })
	}
	return []Work{
		appends("append-1", 1, 1, 10_000, 2_000),
		appends("append-1-clients-8", clients, 1, 40_000, 8_000),
		appends("append-10", 1, 10, 5_000, 1_000),
		appends("append-10-clients-8", clients, 10, 20_000, 3_000),
		{Name: "append-conflict", N: 20_000, ShortN: 3_000, Versus: stores,
			Yield: []Yield{{Name: "append-conflict", Unit: "appends/s"}, {Name: "append-conflict-refused", Unit: "share"}, {Name: "append-conflict-handled", Unit: "share"}},
			run:   func(ctx context.Context, b *bed) (map[string]float64, error) { return b.conflict(ctx) }},
		one("read-entity", "reads/s", 10_000, 2_000, stores, func(ctx context.Context, b *bed) (float64, error) { return b.reads(ctx, Read) }),
		one("aggregate", "reads/s", 5_000, 1_000, stores, func(ctx context.Context, b *bed) (float64, error) { return b.reads(ctx, Aggregate) }),
		one("frame-append", "frames/s", 40_000, 6_000, logs, func(ctx context.Context, b *bed) (float64, error) { return b.frames(ctx) }),
		{Name: "frame-append-run", N: 10_000, ShortN: 2_000, Versus: logs,
			Yield: []Yield{{Name: "frame-append-run-last", Unit: "frames/s", Base: "frame-append-run-first"}, {Name: "frame-append-run-first", Unit: "frames/s"}},
			run:   func(ctx context.Context, b *bed) (map[string]float64, error) { return b.frameRun(ctx) }},
		{Name: "tail-200", N: 3_000, ShortN: 600, Versus: logs,
			Yield: []Yield{{Name: "tail-200-p50", Unit: "ms"}, {Name: "tail-200-p99", Unit: "ms"}},
			run:   func(ctx context.Context, b *bed) (map[string]float64, error) { return b.tail(ctx) }},
		one("summary-append-one", "patches/s", 10_000, 2_000, logs, func(ctx context.Context, b *bed) (float64, error) { return b.merges(ctx, 1) }),
		one("summary-append", "patches/s", 20_000, 4_000, logs, func(ctx context.Context, b *bed) (float64, error) { return b.merges(ctx, max(b.n/10, 1)) }),
		one("summary-read", "reads/s", 50_000, 20_000, logs, func(ctx context.Context, b *bed) (float64, error) { return b.summaries(ctx) }),
		{Name: "live-append", N: 12_000, ShortN: 1_600, Versus: logs,
			Yield: []Yield{{Name: "live-append-p50", Unit: "ms"}, {Name: "live-append-p99", Unit: "ms"}, {Name: "live-append-dead-rows", Unit: "rows/frame"},
				{Name: "live-append-size", Unit: "KiB"}, {Name: "live-append-kept", Unit: "frames"}},
			run: func(ctx context.Context, b *bed) (map[string]float64, error) { return b.live(ctx) }},
	}
}

// named tells whether a name from the command line means this work: its own, or that of one of its rows.
func (w Work) named(name string) bool {
	return w.Name == name || slices.ContainsFunc(w.Yield, func(y Yield) bool { return y.Name == name })
}

// Rivals names the systems that a row is compared with: only the product's rows are.
func Rivals(row, system string) []string {
	if !strings.HasPrefix(system, "millrace") {
		return nil
	}
	for _, w := range Works() {
		if w.named(row) {
			return w.Versus
		}
	}
	return nil
}

// Systems are all systems, in the order of the report.
func Systems() []System {
	return []System{millrace{name: "millrace"}, millrace{name: "millrace-sql", inDatabase: true}, limitTable{}, emmett{}, flowFabric{partitions: 256}}
}
