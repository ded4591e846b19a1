package pipeline

import (
	"fmt"
	"slices"
	"strings"
)

// Work is one thing to measure.
type Work struct {
	Name string
	Unit string
	// N entries in the full and in the short form.
	N, ShortN int
	// Spread copies over the whole backlog.
	Spread bool
	// Payload is the size of a document in bytes; zero: the normal one.
	Payload int
	// Replicas of the system, and rows of its writes at most; zero: one, and what it is tuned to.
	Replicas  int
	BatchRows int
	// Runs at most; zero: as many as asked for.
	Runs int
	// Extra are further rows that the work gives, with their units.
	Extra [][2]string
	kind  kind
}

type kind int

const (
	drain kind = iota
	latency
	memory
)

// Works are all works.
func Works() []Work {
	works := []Work{
		{Name: "redis-to-table", N: 1_000_000, ShortN: 200_000,
			Extra: [][2]string{{"cpu-process", "µs"}, {"cpu-postgres", "µs"}, {"cpu-redis", "µs"}}},
		{Name: "redis-to-table-spread", N: 1_000_000, ShortN: 200_000, Spread: true},
		{Name: "replicas-1", N: 1_000_000, ShortN: 200_000, Spread: true, Replicas: 1},
		{Name: "replicas-2", N: 1_000_000, ShortN: 200_000, Spread: true, Replicas: 2},
		{Name: "replicas-4", N: 1_000_000, ShortN: 200_000, Spread: true, Replicas: 4},
		{Name: "batch-100", N: 300_000, ShortN: 50_000, BatchRows: 100},
		{Name: "batch-1000", N: 300_000, ShortN: 50_000, BatchRows: 1000},
		{Name: "batch-3000", N: 300_000, ShortN: 50_000, BatchRows: 3000},
		{Name: "batch-10000", N: 300_000, ShortN: 50_000, BatchRows: 10_000},
		{Name: "payload-1000", N: 300_000, ShortN: 50_000, Payload: 1000},
		{Name: "payload-4000", N: 100_000, ShortN: 20_000, Payload: 4000},
		{Name: "redis-latency-1000-p50", Unit: "ms", N: 15_000, ShortN: 5_000, Extra: [][2]string{{"redis-latency-1000-p99", "ms"}}, kind: latency},
		{Name: "memory-sink-down", Unit: "MiB", N: 120, ShortN: 20, Runs: 1, kind: memory}, // seconds
	}
	for i := range works {
		if works[i].Unit == "" {
			works[i].Unit = "entries/s"
		}
		works[i].Replicas = max(works[i].Replicas, 1)
	}
	return works
}

// named reports whether a name is the work's, or that of one of its rows.
func (w Work) named(name string) bool {
	return name == w.Name || slices.ContainsFunc(w.Extra, func(e [2]string) bool { return e[0] == name }) ||
		w.kind == latency && name == strings.TrimSuffix(w.Name, "-p50")
}

// rows are the names and units of what the work gives.
func (w Work) rows() [][2]string { return append([][2]string{{w.Name, w.Unit}}, w.Extra...) }

// Select returns the works with these names, or all.
func Select(names []string) ([]Work, error) {
	works := Works()
	if len(names) == 0 {
		return works, nil
	}
	for _, name := range names {
		if !slices.ContainsFunc(works, func(w Work) bool { return w.named(name) }) {
			var known []string
			for _, w := range works {
				known = append(known, w.Name)
			}
			return nil, fmt.Errorf("there is no work %q; choose from %s", name, strings.Join(known, ", "))
		}
	}
	return slices.DeleteFunc(works, func(w Work) bool { return !slices.ContainsFunc(names, w.named) }), nil
}

// Versus returns the systems that a row of the product is compared with.
func Versus(_, system string) []string {
	if system != "millrace" {
		return nil
	}
	return []string{"connect", "bento", "watermill", limitCopy}
}
