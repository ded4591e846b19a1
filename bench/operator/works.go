package operator

import (
	"context"
	"fmt"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/bench/proc"
	"github.com/millrace-dev/millrace/bench/report"
)

// cold creates everything at once and waits until all of it is Ready.
func (r *run) cold(ctx context.Context, p *place) error {
	objects := resources(p.namespace, r.Sizes)
	before, err := r.audit.read()
	if err != nil {
		return err
	}
	if err := r.server.reset(ctx); err != nil {
		return err
	}
	cpuBefore, err := r.manager.cpu()
	if err != nil {
		return err
	}
	start := time.Now()
	if err := create(ctx, r.cluster.client, objects); err != nil {
		return err
	}
	created := time.Since(start)
	if err := p.watcher.all(ctx, len(objects), readyLimit, r.running, isReady); err != nil {
		return err
	}
	waits, last := p.watcher.waits()
	name := fmt.Sprintf("cold-%d", r.Sizes.Streams)
	r.figures.add(name+"-ready", systemMillrace, "s", "", last.Sub(start).Seconds())
	r.figures.add(name+"-created", systemMillrace, "s", "", created.Seconds())
	for _, kind := range kinds {
		if len(waits[kind]) > 0 {
			r.figures.add("cold-"+kind+"-p50", systemMillrace, "s", "", report.Percentile(waits[kind], 50))
			r.figures.add("cold-"+kind+"-p99", systemMillrace, "s", "", report.Percentile(waits[kind], 99))
		}
	}
	r.log("%-24s all Ready after %.1f s, created within %.1f s", workCold, last.Sub(start).Seconds(), created.Seconds())
	if err := r.settle(ctx, p, r.Sizes); err != nil {
		return err
	}
	r.log("%-24s settled after %.1f s", workCold, time.Since(start).Seconds())
	if err := r.check(ctx, p); err != nil {
		return err
	}
	cpu, err := r.manager.cpu()
	if err != nil {
		return err
	}
	l, err := r.server.load(ctx, p.database)
	if err != nil {
		return err
	}
	r.figures.add("cold-manager-cpu", systemMillrace, "s", "", (cpu - cpuBefore).Seconds())
	r.figures.add("cold-statement-time", systemMillrace, "s", "", l.executing.Seconds())
	r.figures.add("cold-statements", systemMillrace, "statements", "", l.statements)
	now, err := r.audit.read()
	if err != nil {
		return err
	}
	made := since(before, now)
	r.figures.add("cold-requests", systemMillrace, "requests", "", float64(sum(made, func(request) bool { return true })))
	for _, q := range r.requests(made) {
		r.figures.add("cold-request "+q.String(), systemMillrace, "requests", "", float64(made[q]))
	}
	return r.tell(ctx, p)
}

// tell logs the statements that took the most time.
func (r *run) tell(ctx context.Context, p *place) error {
	if !r.Verbose {
		return nil
	}
	lines, err := r.server.top(ctx, p.database)
	for _, line := range lines {
		r.log("    %s", line)
	}
	return err
}

// check compares the database with the resources.
func (r *run) check(ctx context.Context, p *place) error {
	streams, groups, err := r.server.count(ctx, p.database)
	if err != nil {
		return err
	}
	if streams != r.Sizes.Streams || groups != r.Sizes.Groups {
		return fmt.Errorf("all resources are Ready, and the database has %d streams and %d groups of them", streams, groups)
	}
	return nil
}

// quiet is how long nothing may be written for the manager to be at rest: longer than two readings of lag lie apart.
const quiet = 12 * time.Second

// settle waits until every resource has its figures and nothing is written any more.
func (r *run) settle(ctx context.Context, p *place, n Sizes) error {
	if err := p.watcher.all(ctx, n.total(), settleLimit, r.running, isMeasured); err != nil {
		return fmt.Errorf("wait for figures in status: %w", err)
	}
	before := -1
	still := time.Now()
	return r.cluster.await(ctx, "the manager's rest", settleLimit, func() error {
		if err := r.running(); err != nil {
			return err
		}
		counts, err := r.audit.read()
		if err != nil {
			return err
		}
		if n := sum(counts, request.writes); n != before {
			before, still = n, time.Now()
		}
		if time.Since(still) < quiet {
			return fmt.Errorf("it wrote %s ago", time.Since(still).Round(time.Second))
		}
		return nil
	})
}

func (r *run) restOfMany(ctx context.Context, p *place) error {
	return r.rest(ctx, p, r.Sizes, fmt.Sprintf("rest-%d", few.Streams))
}

// rest watches the manager while nothing happens. base is the work to compare with.
func (r *run) rest(ctx context.Context, p *place, n Sizes, base string) error {
	if err := r.server.reset(ctx); err != nil {
		return err
	}
	requestsBefore, err := r.audit.read()
	if err != nil {
		return err
	}
	loadBefore, err := r.server.load(ctx, p.database)
	if err != nil {
		return err
	}
	cpuBefore, err := r.manager.cpu()
	if err != nil {
		return err
	}
	start := time.Now()
	connections := 0
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for time.Since(start) < r.Rest {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		now, err := r.server.connections(ctx, p.database)
		if err != nil {
			return err
		}
		connections = max(connections, now)
	}
	took := time.Since(start)
	requests, err := r.audit.read()
	if err != nil {
		return err
	}
	l, err := r.server.load(ctx, p.database)
	if err != nil {
		return err
	}
	cpu, err := r.manager.cpu()
	if err != nil {
		return err
	}
	memory, err := proc.ResidentMiB(r.manager.pid())
	if err != nil {
		return err
	}
	if err := r.running(); err != nil {
		return err
	}
	made := since(requestsBefore, requests)
	add := func(name, unit string, value float64) {
		from := ""
		if base != "" {
			from = base + "-" + name
		}
		r.figures.add(fmt.Sprintf("rest-%d-%s", n.Streams, name), systemMillrace, unit, from, value)
	}
	perSecond := func(v float64) float64 { return v / took.Seconds() }
	add("api-writes", "per minute", 60*perSecond(float64(sum(made, request.writes))))
	add("api-leases", "per minute", 60*perSecond(float64(sum(made, request.lease))))
	add("api-reads", "per minute", 60*perSecond(float64(sum(made, func(q request) bool { return !q.writes() && !q.lease() }))))
	add("statements", "per second", perSecond(l.statements-loadBefore.statements))
	add("transactions", "per second", perSecond(l.transactions-loadBefore.transactions))
	add("statement-time", "ms per second", perSecond(float64((l.executing-loadBefore.executing).Microseconds())/1000))
	add("server-cpu", "ms per second", perSecond(float64((l.cpu - loadBefore.cpu).Milliseconds())))
	add("manager-cpu", "ms per second", perSecond(float64((cpu - cpuBefore).Milliseconds())))
	add("manager-memory", "MiB", memory)
	add("connections", "connections", float64(connections))
	r.log("%-24s %d streams: %d writes, %d reads, %.1f statements/s that take %.1f ms, manager %.1f ms of CPU per second and %.0f MiB", workRest, n.Streams,
		sum(made, request.writes), sum(made, func(q request) bool { return !q.writes() && !q.lease() }), perSecond(l.statements-loadBefore.statements),
		perSecond(float64((l.executing-loadBefore.executing).Microseconds())/1000), perSecond(float64((cpu - cpuBefore).Milliseconds())), memory)
	for _, q := range r.requests(made) {
		if r.Verbose || q.writes() {
			r.log("    %5d %s", made[q], q)
		}
	}
	return r.tell(ctx, p)
}

// change changes streams one after another beside all the others, and takes the time until each is Ready again.
func (r *run) change(ctx context.Context, p *place) error {
	events, err := r.cluster.client.Watch(ctx, &v1alpha1.StreamList{}, client.InNamespace(p.namespace))
	if err != nil {
		return err
	}
	defer events.Stop()
	var took []float64
	for i := range r.Changes {
		var s v1alpha1.Stream
		key := client.ObjectKey{Namespace: p.namespace, Name: streamName(i * 7 % r.Sizes.Streams)}
		if err := r.cluster.client.Get(ctx, key, &s); err != nil {
			return err
		}
		s.Spec.Retention.MaxAge = &metav1.Duration{Duration: time.Duration(i+1) * time.Hour}
		limit, cancel := context.WithTimeout(ctx, startLimit)
		start := time.Now()
		err := r.cluster.client.Update(limit, &s)
		if err == nil {
			err = readyFor(limit, events, s.UID, s.Generation)
		}
		cancel()
		if err != nil {
			return fmt.Errorf("change %s: %w", s.Name, err)
		}
		took = append(took, float64(time.Since(start).Microseconds())/1000)
	}
	p50, p99 := report.Percentile(took, 50), report.Percentile(took, 99)
	r.figures.add("apply-to-ready-p50", systemMillrace, "ms", "", p50)
	r.figures.add("apply-to-ready-p99", systemMillrace, "ms", "", p99)
	r.log("%-24s p50 %.0f ms, p99 %.0f ms", workChange, p50, p99)
	return nil
}

// restart ends the manager and starts it again, and takes the time until it has looked at everything. Nothing has changed, so nothing may be written.
func (r *run) restart(ctx context.Context, p *place) error {
	peak, err := proc.PeakMiB(r.manager.pid())
	if err != nil {
		return err
	}
	r.figures.add("manager-memory", systemMillrace, "MiB", "", peak)
	if err := r.manager.Stop(ctx); err != nil {
		return err
	}
	before, err := r.audit.read()
	if err != nil {
		return err
	}
	if err := r.server.reset(ctx); err != nil {
		return err
	}
	start := time.Now()
	if err := r.manager.Start(); err != nil {
		return err
	}
	// It has looked at everything when every resource was reconciled and no more reconciles end for a while.
	const still = 3 * time.Second
	done, moved := 0, start
	if err := r.cluster.await(ctx, "the manager to look at everything", readyLimit, func() error {
		if err := r.running(); err != nil {
			return err
		}
		w, err := r.manager.work(ctx)
		if err != nil {
			return err
		}
		if w.done != done || w.open > 0 {
			done, moved = w.done, time.Now()
		}
		if done < r.Sizes.total() || time.Since(moved) < still {
			return fmt.Errorf("%d reconciles of %d resources, %d waiting or running", done, r.Sizes.total(), w.open)
		}
		return nil
	}); err != nil {
		return err
	}
	l, err := r.server.load(ctx, p.database)
	if err != nil {
		return err
	}
	if peak, err = proc.PeakMiB(r.manager.pid()); err != nil {
		return err
	}
	counts, err := r.audit.read()
	if err != nil {
		return err
	}
	made := since(before, counts)
	r.figures.add("restart-observed", systemMillrace, "s", "", moved.Sub(start).Seconds())
	r.figures.add("restart-api-writes", systemMillrace, "requests", "", float64(sum(made, request.writes)))
	r.figures.add("restart-requests", systemMillrace, "requests", "", float64(sum(made, func(q request) bool { return !q.lease() })))
	r.figures.add("restart-statements", systemMillrace, "statements", "", l.statements)
	r.figures.add("restart-manager-memory", systemMillrace, "MiB", "", peak)
	r.log("%-24s all observed after %.1f s by %d reconciles, %d writes, %.0f statements, at most %.0f MiB", workRestart, moved.Sub(start).Seconds(), done,
		sum(made, request.writes), l.statements, peak)
	for _, q := range r.requests(made) {
		if r.Verbose || q.writes() {
			r.log("    %5d %s", made[q], q)
		}
	}
	return r.tell(ctx, p)
}
