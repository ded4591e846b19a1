package operator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/millrace-dev/millrace/bench/build"
	"github.com/millrace-dev/millrace/bench/report"
)

// Options choose what is measured.
type Options struct {
	Works   []string // names; none: all
	Systems []string // names; none: all
	Sizes   Sizes
	Rest    time.Duration // how long the manager is watched at rest
	Changes int           // resources that are changed, one after another
	Runs    int
	// Program is the manager's binary; empty: built from the source tree.
	Program string
	// Verbose logs which statements the database spent its time on.
	Verbose bool
	Log     func(line string)
}

// The works, and the systems.
const (
	workCold    = "cold"
	workRest    = "rest"
	workChange  = "change"
	workRestart = "restart"

	systemMillrace = "millrace"
	systemSQL      = "limit-sql"
	systemAPI      = "limit-api"
)

// Works and Systems are all that can be chosen.
var (
	Works   = []string{workCold, workRest, workChange, workRestart}
	Systems = []string{systemMillrace, systemSQL, systemAPI}
)

// Versus are the systems that a row is compared with.
func Versus(_, system string) []string {
	if system == systemMillrace {
		return []string{systemSQL, systemAPI}
	}
	return nil
}

// few is the size that the manager at rest is compared with.
var few = Sizes{Streams: 10, Groups: 10, Processors: 2}

// Limits of single steps. What takes longer has failed.
const (
	startLimit  = 2 * time.Minute
	readyLimit  = 10 * time.Minute
	settleLimit = 2 * time.Minute
)

// figures are what was measured so far, in the order in which it came first.
type figures struct{ samples []report.Samples }

func (f *figures) add(work, system, unit, base string, value float64) {
	i := slices.IndexFunc(f.samples, func(s report.Samples) bool { return s.Work == work && s.System == system })
	if i < 0 {
		i = len(f.samples)
		f.samples = append(f.samples, report.Samples{Work: work, System: system, Unit: unit, Base: base})
	}
	f.samples[i].Values = append(f.samples[i].Values, value)
}

// Run measures, and returns the figures and the settings that they depend on.
func Run(ctx context.Context, o Options) ([]report.Samples, map[string]string, error) {
	for _, c := range []struct {
		what        string
		wanted, all []string
	}{{"work", o.Works, Works}, {"system", o.Systems, Systems}} {
		for _, name := range c.wanted {
			if !slices.Contains(c.all, name) {
				return nil, nil, fmt.Errorf("there is no %s %q; choose from %s", c.what, name, strings.Join(c.all, ", "))
			}
		}
	}
	if o.Program == "" {
		var err error
		if o.Program, err = build.Program(ctx, o.Log, "manager", ".", "./cmd/manager"); err != nil {
			return nil, nil, err
		}
	}
	var f figures
	var settings map[string]string
	for i := range o.Runs {
		r := &run{Options: o, figures: &f}
		if err := r.whole(ctx); err != nil {
			return nil, nil, fmt.Errorf("run %d: %w", i+1, err)
		}
		settings = r.settings
	}
	// A request that not every run made was made zero times by the others.
	for i := range f.samples {
		for strings.HasPrefix(f.samples[i].Work, "cold-request ") && len(f.samples[i].Values) < o.Runs {
			f.samples[i].Values = append(f.samples[i].Values, 0)
		}
	}
	return f.samples, settings, nil
}

// run is one repetition, on servers of its own.
type run struct {
	Options
	figures  *figures
	cluster  *Cluster
	server   *Server
	manager  *Manager
	audit    *audit
	settings map[string]string
}

func (r *run) wants(work string) bool { return len(r.Works) == 0 || slices.Contains(r.Works, work) }
func (r *run) measures(system string) bool {
	return len(r.Systems) == 0 || slices.Contains(r.Systems, system)
}

func (r *run) log(format string, args ...any) { r.Log(fmt.Sprintf(format, args...)) }

// whole starts the servers, measures everything that is wanted, and ends them.
func (r *run) whole(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "millrace-bench-operator-")
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		return err
	}
	r.log("starting the control plane, KWOK and PostgreSQL")
	defer func() {
		stopping := context.WithoutCancel(ctx)
		if r.manager != nil {
			if err != nil && r.manager.process != nil {
				err = fmt.Errorf("%w\nthe manager's log ends with:\n%s", err, r.manager.log())
			}
			err = errors.Join(err, r.manager.Stop(stopping))
		}
		if r.cluster != nil && err != nil && r.Verbose {
			for _, p := range r.cluster.processes {
				r.log("%s:\n%s", p.Name(), p.LogTail())
			}
		}
		if r.audit != nil {
			err = errors.Join(err, r.audit.file.Close())
		}
		if r.cluster != nil {
			err = errors.Join(err, r.cluster.Stop(stopping))
		}
		if r.server != nil {
			err = errors.Join(err, r.server.Stop(stopping))
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}()
	if r.cluster, err = StartCluster(ctx, dir, r.Sizes.Processors+few.Processors); err != nil {
		return err
	}
	if r.server, err = StartServer(ctx); err != nil {
		return err
	}
	if r.settings, err = r.server.Describe(ctx); err != nil {
		return err
	}
	if r.audit, err = openAudit(r.cluster.path("audit.log")); err != nil {
		return err
	}
	if r.manager, err = Install(ctx, r.cluster, r.Program); err != nil {
		return err
	}
	if r.measures(systemMillrace) {
		if err := r.millrace(ctx); err != nil {
			return err
		}
	}
	return r.limits(ctx)
}

// millrace measures the manager.
func (r *run) millrace(ctx context.Context) error {
	watching, stop := context.WithCancel(ctx)
	var watches errgroup.Group
	err := func() error {
		defer stop()
		if r.wants(workRest) {
			if err := r.few(watching, &watches); err != nil {
				return fmt.Errorf("with %d streams: %w", few.Streams, err)
			}
		}
		return r.many(watching, &watches)
	}()
	return errors.Join(err, watches.Wait())
}

// few measures the manager at rest with a few resources, and removes them.
func (r *run) few(ctx context.Context, watches *errgroup.Group) error {
	p, err := r.newPlace(ctx, watches, "few")
	if err != nil {
		return err
	}
	if err := r.manager.Start(); err != nil {
		return err
	}
	if err := create(ctx, r.cluster.client, resources(p.namespace, few)); err != nil {
		return err
	}
	if err := r.settle(ctx, p, few); err != nil {
		return err
	}
	if err := r.rest(ctx, p, few, ""); err != nil {
		return err
	}
	if err := remove(ctx, r.cluster.client, p.namespace); err != nil {
		return err
	}
	if err := p.watcher.all(ctx, 0, startLimit, r.running, isReady); err != nil {
		return fmt.Errorf("after the deletion: %w", err)
	}
	if err := r.manager.Stop(ctx); err != nil {
		return err
	}
	return r.server.drop(ctx, p.database)
}

// many makes all resources from cold, and measures what comes then.
func (r *run) many(ctx context.Context, watches *errgroup.Group) error {
	p, err := r.newPlace(ctx, watches, "many")
	if err != nil {
		return err
	}
	if err := r.manager.Start(); err != nil {
		return err
	}
	if err := r.cluster.await(ctx, "the manager", startLimit, func() error {
		if err := r.running(); err != nil {
			return err
		}
		_, err := r.manager.work(ctx)
		return err
	}); err != nil {
		return err
	}
	if err := r.cold(ctx, p); err != nil {
		return fmt.Errorf("from cold: %w", err)
	}
	for _, w := range []struct {
		name    string
		measure func(context.Context, *place) error
	}{{workRest, r.restOfMany}, {workChange, r.change}, {workRestart, r.restart}} {
		if !r.wants(w.name) {
			continue
		}
		if err := w.measure(ctx, p); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return r.manager.Stop(ctx)
}

// place is a tenant with a database of its own, and who watches it.
type place struct {
	namespace, database string
	watcher             *watcher
}

func (r *run) newPlace(ctx context.Context, watches *errgroup.Group, namespace string) (*place, error) {
	p := &place{namespace: namespace}
	var err error
	if p.database, err = r.server.database(ctx); err != nil {
		return nil, err
	}
	if err := tenant(ctx, r.cluster.client, namespace, r.server.postgres.DSN(p.database)); err != nil {
		return nil, err
	}
	p.watcher = newWatcher(ctx, watches, r.cluster.client, namespace)
	return p, nil
}

// running says what has ended that should run.
func (r *run) running() error {
	return errors.Join(r.cluster.running(), r.manager.running())
}

// requests logs requests, the most frequent first.
func (r *run) requests(counts map[request]int) []request {
	return slices.SortedFunc(maps.Keys(counts), func(a, b request) int {
		if counts[a] != counts[b] {
			return counts[b] - counts[a]
		}
		return strings.Compare(a.String(), b.String())
	})
}
