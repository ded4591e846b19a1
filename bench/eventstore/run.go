package eventstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/bench/report"
)

// Options choose what is measured.
type Options struct {
	Works   []string // names of works or of their rows; none: all
	Systems []string // names; none: all
	N       int      // calls in a measurement; zero: what the work says
	Runs    int      // repetitions
	Short   bool
	Log     func(line string) // a line for each step
}

// Run measures the systems at the works, interleaved, and returns the samples in the order of works and systems. A failure of the product ends the run; that of another system
// is a row without a figure.
func Run(ctx context.Context, server *engine.Server, o Options) ([]report.Samples, error) {
	return run(ctx, server, o, Systems())
}

func run(ctx context.Context, server *engine.Server, o Options, systems []System) ([]report.Samples, error) {
	works := Works()
	known := func(names []string, name string, has func(string) bool) error {
		for _, n := range names {
			if !has(n) {
				return fmt.Errorf("there is no %s %q", name, n)
			}
		}
		return nil
	}
	if err := errors.Join(
		known(o.Works, "work", func(n string) bool { return slices.ContainsFunc(works, func(w Work) bool { return w.named(n) }) }),
		known(o.Systems, "system", func(n string) bool { return slices.ContainsFunc(systems, func(s System) bool { return s.Name() == n }) }),
	); err != nil {
		return nil, err
	}
	var all []report.Samples
	for _, w := range works {
		if len(o.Works) > 0 && !slices.ContainsFunc(o.Works, w.named) {
			continue
		}
		r := repeater{work: w, options: o, server: server, notes: map[string]string{}, values: map[[2]string][]float64{}}
		for _, s := range systems {
			if len(o.Systems) == 0 || slices.Contains(o.Systems, s.Name()) {
				r.systems = append(r.systems, s)
			}
		}
		if err := r.repeat(ctx); err != nil {
			return nil, err
		}
		all = append(all, r.samples()...)
	}
	return all, nil
}

// repeater measures all systems at one work.
type repeater struct {
	work    Work
	systems []System
	options Options
	server  *engine.Server
	notes   map[string]string       // why a system has no figures
	values  map[[2]string][]float64 // by row and system
}

// repeat begins each repetition with another system.
func (r *repeater) repeat(ctx context.Context) error {
	note := func(system System, why string) {
		r.notes[system.Name()] = why
		r.options.Log(fmt.Sprintf("%-20s  %-12s  –  %s", r.work.Name, system.Name(), why))
	}
	for _, s := range r.systems {
		if why := s.Cannot(r.work.Name); why != "" {
			note(s, why)
		}
	}
	for round := range r.options.Runs {
		for i := range r.systems {
			s := r.systems[(i+round)%len(r.systems)]
			if r.notes[s.Name()] != "" {
				continue
			}
			got, err := measure(ctx, r.server, s, r.work, r.options)
			var missing engine.Unavailable
			switch {
			case errors.As(err, &missing):
				note(s, missing.Error())
				continue
			case err != nil && (ctx.Err() != nil || strings.HasPrefix(s.Name(), "millrace")):
				return fmt.Errorf("%s, %s, run %d: %w", r.work.Name, s.Name(), round+1, err)
			case err != nil:
				line, _, _ := strings.Cut(err.Error(), "\n")
				note(s, fmt.Sprintf("failed in run %d: %.200s", round+1, line))
				continue
			}
			var words []string
			for _, y := range r.work.Yield {
				at := [2]string{y.Name, s.Name()}
				r.values[at] = append(r.values[at], got[y.Name])
				words = append(words, report.Number(got[y.Name])+" "+y.Unit)
			}
			r.options.Log(fmt.Sprintf("%-20s  %-12s  run %d/%d  %s", r.work.Name, s.Name(), round+1, r.options.Runs, strings.Join(words, ", ")))
		}
	}
	return nil
}

func (r *repeater) samples() []report.Samples {
	var samples []report.Samples
	for _, y := range r.work.Yield {
		for _, s := range r.systems {
			sample := report.Samples{Work: y.Name, System: s.Name(), Unit: y.Unit, Base: y.Base, Note: r.notes[s.Name()]}
			if sample.Note == "" {
				sample.Values = r.values[[2]string{y.Name, s.Name()}]
			}
			samples = append(samples, sample)
		}
	}
	return samples
}

// bed is where one measurement of one system takes place.
type bed struct {
	Place
	store Store
	n     int
}

// connections is enough for all clients and a few more; the same for every system.
const connections = clients + 4

func measure(ctx context.Context, server *engine.Server, s System, w Work, o Options) (got map[string]float64, err error) {
	dsn, drop, err := server.Database(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, drop()) }()
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, err
	}
	config.MaxConns = connections
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	defer pool.Close()
	b := &bed{Place: Place{DSN: dsn, Pool: pool, Connections: connections}, n: w.N}
	if o.Short {
		b.n = w.ShortN
	}
	if o.N > 0 {
		b.n = o.N
	}
	if b.store, err = s.Open(ctx, b.Place); err != nil {
		return nil, fmt.Errorf("set up: %w", err)
	}
	defer func() { err = errors.Join(err, b.store.Close()) }()
	return w.run(ctx, b)
}

// analyze lets PostgreSQL look at the tables while there is something in them: it would plan for empty tables otherwise.
func (b *bed) analyze(ctx context.Context) error {
	_, err := b.Pool.Exec(ctx, "analyze")
	return err
}
