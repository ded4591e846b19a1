package pipeline

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/bench/proc"
	"github.com/millrace-dev/millrace/bench/report"
)

// Options choose what is measured.
type Options struct {
	Works   []string // names; none: all
	Systems []string // names; none: all
	N       int      // entries (seconds of memory-sink-down); zero: what the work says
	Runs    int
	Short   bool
	Log     func(line string)
}

// measureLimit bounds one measurement. A system that needs longer gets no figure.
const measureLimit = 10 * time.Minute

// runner holds what all measurements share.
type runner struct {
	*Servers
	options  Options
	programs map[string]string
	dir      string
	groups   int
}

// Run measures the systems at the works, interleaved, and returns the samples in the order of works and systems. A failure of the product ends
// the run; a peer that fails gets a note.
func Run(ctx context.Context, s *Servers, o Options) ([]report.Samples, error) {
	works, err := Select(o.Works)
	if err != nil {
		return nil, err
	}
	systems := Systems()
	for _, name := range o.Systems {
		if name != limitCopy && !slices.ContainsFunc(systems, func(s *System) bool { return s.Name == name }) {
			return nil, fmt.Errorf("there is no system %q; choose from millrace, connect, bento, watermill, %s", name, limitCopy)
		}
	}
	wanted := func(name string) bool { return len(o.Systems) == 0 || slices.Contains(o.Systems, name) }
	systems = slices.DeleteFunc(systems, func(s *System) bool { return !wanted(s.Name) })
	dir, err := os.MkdirTemp("", "millrace-bench-pipeline-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	r := &runner{Servers: s, options: o, dir: dir, programs: map[string]string{}}
	for _, system := range systems {
		if r.programs[system.Name], err = system.Build(ctx, o.Log); err != nil {
			return nil, err
		}
	}
	var all []report.Samples
	var loaded struct {
		backlog *Backlog
		shape   [3]int
	}
	for _, w := range works {
		n := w.N
		if o.Short {
			n = w.ShortN
		}
		if o.N > 0 {
			n = o.N
		}
		if w.kind == drain {
			shape := [3]int{n, w.Payload, 0}
			if w.Spread {
				shape[2] = 1
			}
			if loaded.backlog == nil || loaded.shape != shape {
				o.Log(fmt.Sprintf("%-24s loading %d entries", w.Name, n))
				loaded.backlog, loaded.shape = NewBacklog(n, w.Payload, w.Spread), shape
				if err := r.load(ctx, loaded.backlog); err != nil {
					return nil, err
				}
			}
		} else {
			loaded.backlog = nil
		}
		samples, err := r.repeat(ctx, w, n, loaded.backlog, systems, wanted(limitCopy))
		if err != nil {
			return nil, err
		}
		all = append(all, samples...)
	}
	return all, nil
}

// repeat measures every system at one work, each repetition beginning with another one.
func (r *runner) repeat(ctx context.Context, w Work, n int, b *Backlog, systems []*System, limit bool) ([]report.Samples, error) {
	runs := r.options.Runs
	if w.Runs > 0 {
		runs = min(runs, w.Runs)
	}
	var names []string
	for _, s := range systems {
		names = append(names, s.Name)
	}
	if limit && w.kind == drain && w.Replicas == 1 && w.BatchRows == 0 {
		names = append(names, limitCopy)
	}
	values := map[string][][]float64{}
	notes := map[string]string{}
	for run := range runs {
		for i := range names {
			name := names[(i+run)%len(names)]
			if notes[name] != "" {
				continue
			}
			at := slices.IndexFunc(systems, func(s *System) bool { return s.Name == name })
			if at >= 0 {
				if notes[name] = systems[at].Cannot(w.Name); notes[name] != "" {
					continue
				}
			}
			got, err := r.measure(ctx, w, n, b, systems, at)
			if err != nil {
				err = fmt.Errorf("%s of %s: %w", w.Name, name, err)
				if ctx.Err() != nil || name == "millrace" || name == limitCopy {
					return nil, err
				}
				first, _, _ := strings.Cut(err.Error(), "\n")
				notes[name] = first
				r.options.Log(err.Error())
				continue
			}
			values[name] = append(values[name], got)
			r.options.Log(fmt.Sprintf("%-24s %-10s %s", w.Name, name, figures(w, got)))
		}
	}
	var samples []report.Samples
	for i, row := range w.rows() {
		for _, name := range names {
			s := report.Samples{Work: row[0], System: name, Unit: row[1], Note: notes[name]}
			for _, v := range values[name] {
				if i < len(v) && notes[name] == "" {
					s.Values = append(s.Values, v[i])
				}
			}
			if len(s.Values) == 0 && s.Note == "" {
				continue
			}
			samples = append(samples, s)
		}
	}
	return samples, nil
}

func figures(w Work, values []float64) string {
	var parts []string
	for i, row := range w.rows() {
		if i < len(values) {
			parts = append(parts, fmt.Sprintf("%s %s %s", row[0], report.Number(values[i]), row[1]))
		}
	}
	return strings.Join(parts, ", ")
}

// measure returns one value for each row of the work. at is the system's place, or negative for the limit.
func (r *runner) measure(ctx context.Context, w Work, n int, b *Backlog, systems []*System, at int) ([]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, measureLimit)
	defer cancel()
	r.groups++
	group := fmt.Sprintf("bench-%d", r.groups)
	if at < 0 {
		rate, err := r.copyAll(ctx, b)
		return []float64{rate}, err
	}
	system := systems[at]
	members := &members{system: system}
	begin := func(replicas int) error {
		for i := range replicas {
			member := Member{Dir: r.dir, RedisURL: r.Redis.URL(), DSN: r.DSN(), Group: group, Name: fmt.Sprintf("%s-%d", group, i), BatchRows: w.BatchRows}
			if err := members.start(r.programs[system.Name], member); err != nil {
				return err
			}
		}
		return nil
	}
	var values []float64
	var err error
	switch w.kind {
	case drain:
		values, err = r.drain(ctx, w, n, b, group, members, begin)
	case latency:
		values, err = r.latency(ctx, n, group, members, begin)
	case memory:
		values, err = r.sinkDown(ctx, time.Duration(n)*time.Second, group, members, begin)
	}
	return values, errors.Join(err, members.stop(), r.dropGroup(ctx, group))
}

// drain lets a group empty the backlog, and returns entries per second and the processor time of an entry in microseconds: of the processes, of
// PostgreSQL and of Redis. The time of starting a process counts until it is connected, which all systems are in well under a second.
func (r *runner) drain(ctx context.Context, w Work, n int, b *Backlog, group string, members *members, begin func(int) error) ([]float64, error) {
	if err := r.prepare(ctx, group); err != nil {
		return nil, err
	}
	before, err := r.serverCPU()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if err := begin(w.Replicas); err != nil {
		return nil, err
	}
	if err := r.drained(ctx, group, measureLimit, members.running); err != nil {
		return nil, err
	}
	took := time.Since(start)
	after, err := r.serverCPU()
	if err != nil {
		return nil, err
	}
	own, err := members.cpu()
	if err != nil {
		return nil, err
	}
	per := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(n) }
	values := []float64{float64(n) / took.Seconds()}
	if len(w.Extra) > 0 {
		values = append(values, per(own), per(after[0]-before[0]), per(after[1]-before[1]))
	}
	return values, r.check(ctx, b.Distinct, b.Sum)
}

// serverCPU is the processor time of PostgreSQL and of Redis until now.
func (s *Servers) serverCPU() (used [2]time.Duration, err error) {
	for i, pid := range []int{s.ids.postmaster, s.ids.redis} {
		if used[i], err = proc.CPU(pid); err != nil {
			return used, err
		}
	}
	return used, nil
}
