package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/bench/report"
)

// Options choose what is measured.
type Options struct {
	Works   []string // names of works or of their rows; none: all
	Systems []System
	N       int // messages in a measurement; zero: what the work says
	Payload int // bytes of a payload; zero: about 250
	Runs    int // repetitions, at most; works that take long have fewer
	Short   bool
	// Rival tells of a system by its name whether its failure is a row of the report instead of the end of the run; nil: never.
	Rival func(system string) bool
	Log   func(line string) // a line for each step
}

// Run measures every system at every work and returns the samples in the order of works and systems. It fails at the first measurement
// that fails its check.
func Run(ctx context.Context, s *Server, o Options) ([]report.Samples, error) {
	works, err := selected(o.Works)
	if err != nil {
		return nil, err
	}
	var all []report.Samples
	for _, w := range works {
		samples, err := repeat(ctx, s, o, w)
		if err != nil {
			return nil, err
		}
		all = append(all, samples...)
	}
	return all, nil
}

// Rivals names the systems that a row is compared with: only the product's rows are, whose names begin with its own.
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

func selected(names []string) ([]Work, error) {
	works := Works()
	if len(names) == 0 {
		return works, nil
	}
	var known []string
	for _, w := range works {
		known = append(known, w.Name)
	}
	for _, name := range names {
		if !slices.ContainsFunc(works, func(w Work) bool { return w.named(name) }) {
			return nil, fmt.Errorf("there is no work %q; choose from %s", name, strings.Join(known, ", "))
		}
	}
	return slices.DeleteFunc(works, func(w Work) bool { return !slices.ContainsFunc(names, w.named) }), nil
}

// repeat measures all systems at one work, interleaved, and begins each repetition with another system.
func repeat(ctx context.Context, s *Server, o Options, w Work) ([]report.Samples, error) {
	runs, n := o.Runs, w.N
	if w.Runs > 0 {
		runs = min(runs, w.Runs)
	}
	if o.Short {
		n = w.ShortN
		if w.ShortRuns > 0 {
			runs = min(runs, w.ShortRuns)
		}
	}
	if o.N > 0 {
		n = o.N
	}
	notes := map[string]string{}
	var able []System
	for _, system := range o.Systems {
		if why := system.Cannot(w.Name); why != "" {
			notes[system.Name()] = why
			o.Log(fmt.Sprintf("%-18s  %-17s  %-7s  %s", w.Name, system.Name(), "–", why))
			continue
		}
		able = append(able, system)
	}
	values := map[string]map[string][]float64{} // by row and system
	for _, y := range w.Yield {
		values[y.Name] = map[string][]float64{}
	}
	for run := range runs {
		for i := range able {
			system := able[(i+run)%len(able)]
			if notes[system.Name()] != "" {
				continue
			}
			got, err := pair(ctx, s, system, w, n, o)
			var missing Unavailable
			if errors.As(err, &missing) {
				notes[system.Name()] = missing.Error()
				o.Log(fmt.Sprintf("%-18s  %-17s  %-7s  %s", w.Name, system.Name(), "–", missing))
				continue
			}
			if err != nil && ctx.Err() == nil && o.Rival != nil && o.Rival(system.Name()) {
				notes[system.Name()] = fmt.Sprintf("failed in run %d: %s", run+1, firstLine(err))
				for _, of := range values {
					delete(of, system.Name())
				}
				o.Log(fmt.Sprintf("%-18s  %-17s  %s", w.Name, system.Name(), notes[system.Name()]))
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("%s, %s, run %d: %w", w.Name, system.Name(), run+1, err)
			}
			var words []string
			for _, y := range w.Yield {
				if v, ok := got[y.Name]; ok {
					values[y.Name][system.Name()] = append(values[y.Name][system.Name()], v)
					words = append(words, report.Number(v)+" "+y.Unit)
				}
			}
			o.Log(fmt.Sprintf("%-18s  %-17s  run %d/%d  %s", w.Name, system.Name(), run+1, runs, strings.Join(words, ", ")))
		}
	}
	var samples []report.Samples
	for _, y := range w.Yield {
		for _, system := range o.Systems {
			sample := report.Samples{Work: y.Name, System: system.Name(), Unit: y.Unit, Values: values[y.Name][system.Name()], Note: notes[system.Name()], Base: y.Base}
			if len(sample.Values) == 0 && sample.Note == "" {
				sample.Note = "cannot be seen from outside this server"
			}
			samples = append(samples, sample)
		}
	}
	return samples, nil
}

// bed is where one measurement of one system takes place.
type bed struct {
	dsn        string
	pool       *pgxpool.Pool
	queue      Queue
	staff      []Consumer
	n          int
	payload    int
	shape      Shape
	short      bool
	postmaster int
	left       bool
}

// connections is enough for all producers and consumers of a work and a few more; the same for every system.
const connections = singleProducers + 2*consumers + 4

// firstLine of an error, and not too much of it.
func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	if len(line) > 200 {
		line = line[:200] + "…"
	}
	return line
}

// pair measures a work and, where it has a base of another shape, that too.
func pair(ctx context.Context, s *Server, system System, w Work, n int, o Options) (map[string]float64, error) {
	shape := w.Shape
	if o.Short && w.ShortShape != nil {
		shape = *w.ShortShape
	}
	if o.N > 0 {
		// A lane is no lane with less than a few messages.
		shape.Streams, shape.Groups = min(shape.Streams, max(n/10, 1)), min(shape.Groups, max(n/10, 1))
	}
	got, err := measure(ctx, s, system, shape, w.run, n, o)
	if err != nil || w.base == nil {
		return got, err
	}
	base, err := measure(ctx, s, system, w.baseShape, w.base, n, o)
	if err != nil {
		return nil, err
	}
	maps.Copy(got, base)
	return got, nil
}

func measure(ctx context.Context, s *Server, system System, shape Shape, run func(context.Context, *bed) (map[string]float64, error),
	n int, o Options) (got map[string]float64, err error) {
	dsn, drop, err := s.Database(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, drop()) }()
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, err
	}
	// Statements are prepared once for each connection and then executed in one round trip: pgx's default, for all systems.
	config.MaxConns = connections
	// A program with a thousand streams has more statements than pgx keeps by default.
	config.ConnConfig.StatementCacheCapacity = 8192
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	b := &bed{dsn: dsn, pool: pool, n: n, payload: o.Payload, shape: shape, short: o.Short, postmaster: s.postmaster}
	defer func() { err = errors.Join(err, b.leave()) }()
	if b.queue, err = system.Open(ctx, pool, shape); err != nil {
		return nil, fmt.Errorf("set up: %w", err)
	}
	return run(ctx, b)
}

// leave closes everything of the bed. Repeating it does nothing.
func (b *bed) leave() error {
	if b.left {
		return nil
	}
	b.left = true
	defer b.pool.Close()
	if b.queue == nil {
		return nil
	}
	return b.queue.Close()
}

func (b *bed) analyze(ctx context.Context) error {
	if _, err := b.pool.Exec(ctx, "analyze"); err != nil {
		return fmt.Errorf("analyze: %w", err)
	}
	return nil
}
