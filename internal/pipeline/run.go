package pipeline

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Bounds inside a pipeline.
const (
	maxRead        = 2000            // entries per read
	releaseTimeout = 5 * time.Second // for giving entries back, after the drain
	upkeepInterval = time.Minute     // between two calls of the sink's Upkeep
	queuedBatches  = 64              // per writer and per settler; entries are bounded by permits
)

// Options of a Pipeline.
type Options struct {
	Config  *config.Config
	Source  Source
	Sink    Sink
	State   *State // nil: none
	Metrics *Metrics
	Tracer  *Tracer // nil: no spans
	Health  *Health
	Logger  *slog.Logger
	Breaker BreakerOptions
}

// Pipeline moves batches from a source through a transform into a sink, and settles them.
//
//	reader → decoder → writer, by key → settler
//
// There is one reader and one decoder per Reader of the source. They overlap: while a batch is written, the next is read.
type Pipeline struct {
	cfg       *config.Config
	source    Source
	sink      Sink
	transform *Transform
	state     *State
	metrics   *Metrics
	tracer    *Tracer
	health    *Health
	log       *slog.Logger
	permits   *permits
	breaker   *breaker

	sharder Sharder // nil when the sink keeps nothing together
	seed    maphash.Seed
	writers []chan *Batch
	settled chan settlement // all but Rejected
	refused chan settlement // Rejected: settling them may need the sink's database, so they do not hold up the others

	fatalOnce sync.Once
	fatal     error
	abort     context.CancelFunc
}

// New compiles a pipeline.
func New(o Options) (*Pipeline, error) {
	transform, err := NewTransform(o.Config)
	if err != nil {
		return nil, err
	}
	if err := transform.Remember(o.State, o.Config); err != nil {
		return nil, err
	}
	b := o.Config.Batch
	p := &Pipeline{
		cfg: o.Config, source: o.Source, sink: o.Sink, transform: transform, state: o.State,
		metrics: o.Metrics, tracer: o.Tracer, health: o.Health, log: o.Logger,
		permits: newPermits(b.MaxInFlight, b.MaxInFlightBytes),
		breaker: newBreaker(o.Breaker),
		seed:    maphash.MakeSeed(),
		writers: make([]chan *Batch, b.Writers),
		settled: make(chan settlement, queuedBatches),
		refused: make(chan settlement, queuedBatches),
	}
	for i := range p.writers {
		p.writers[i] = make(chan *Batch, queuedBatches)
	}
	p.sharder, _ = o.Sink.(Sharder)
	if f, ok := o.Sink.(*FanOut); ok {
		f.countWith(o.Source)
	}
	p.metrics.observe(p)
	return p, nil
}

// Run works until ctx ends, then drains: it stops reading, writes and settles what it has, and gives the rest back. It
// returns nil after a complete drain, ErrDrainTimeout when the drain's time was not enough, and another error when a part
// of the pipeline broke.
func (p *Pipeline) Run(ctx context.Context) error {
	// work outlives ctx, so that what was read can be finished. It ends when the drain's time is over.
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	reading, stopReading := context.WithCancel(ctx)
	defer stopReading()
	p.abort = func() { stopReading(); stop() }

	background, stopBackground := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBackground()
	var keeping sync.WaitGroup
	p.spawn(&keeping, "source", func() {
		if err := p.source.Run(background, reading); err != nil && background.Err() == nil {
			p.fail(fmt.Errorf("source: %w", err))
		}
	}, nil)

	p.spawn(&keeping, "upkeep", func() { p.upkeep(background) }, nil)

	overtime := p.drainTimer(reading, stop)
	defer overtime.Stop()
	p.flow(reading, work)

	timedOut := work.Err() != nil
	stopBackground()
	keeping.Wait()
	release, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	err := p.fatal
	if rerr := p.source.Release(release); rerr != nil {
		p.log.Warn("entries could not be given back; other members take them over later", "error", rerr)
	}
	if err == nil && timedOut {
		err = ErrDrainTimeout
	}
	return err
}

// upkeep lets the sink tidy up, until ctx ends.
func (p *Pipeline) upkeep(ctx context.Context) {
	sink, ok := p.sink.(Upkeeper)
	source, knows := p.source.(SettledSource)
	for ok && knows && sleep(ctx, upkeepInterval) {
		if err := sink.Upkeep(ctx, source); err != nil && ctx.Err() == nil {
			p.log.Warn("upkeep of the sink failed; trying again later", "error", reason(err))
		}
	}
}

// flow runs the stages and returns when the last of them has ended. Each stage ends when the one before it has.
func (p *Pipeline) flow(reading, work context.Context) {
	var readers, writers, settlers sync.WaitGroup
	sources := p.source.Readers()
	for _, r := range sources {
		batches := make(chan *Batch, 1)
		p.spawn(&readers, "reader "+r.Name(), func() {
			defer close(batches)
			p.read(reading, r, batches, len(sources))
		}, nil)
		p.spawn(&readers, "decoder "+r.Name(), func() {
			for b := range batches {
				p.decode(work, b)
			}
		}, func() { discard(batches) })
	}
	for i, in := range p.writers {
		p.spawn(&writers, fmt.Sprintf("writer %d", i), func() { p.newWriter(in).run(work) }, func() { discard(in) })
	}
	p.spawn(&settlers, "settler", func() { p.settle(work, p.settled) }, func() { discard(p.settled) })
	p.spawn(&settlers, "settler of rejects", func() { p.settle(work, p.refused) }, func() { discard(p.refused) })

	readers.Wait()
	for _, w := range p.writers {
		close(w)
	}
	writers.Wait()
	close(p.settled)
	close(p.refused)
	settlers.Wait()
}

// spawn runs a stage. A panic in it is a broken invariant: it is logged, everything stops, what can be given back is,
// and Run returns it as an error. afterwards then empties the stage's input, so that the stage before it can end.
func (p *Pipeline) spawn(wg *sync.WaitGroup, name string, stage, afterwards func()) {
	wg.Go(func() {
		defer func() {
			if r := recover(); r != nil {
				p.log.Error("a stage panicked", "stage", name, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
				p.fail(fmt.Errorf("%s: panic: %v", name, r))
				if afterwards != nil {
					afterwards()
				}
			}
		}()
		stage()
	})
}

func discard[T any](in <-chan T) {
	for range in {
		continue
	}
}

// fail records the first error that ends the pipeline, and ends it without a drain.
func (p *Pipeline) fail(err error) {
	p.fatalOnce.Do(func() { p.fatal = err })
	p.abort()
}

// read reads one place until ctx ends. It keeps at most its share of the permits reserved while it waits, so that a quiet
// stream does not keep a busy one from being read.
func (p *Pipeline) read(ctx context.Context, r Reader, out chan<- *Batch, readers int) {
	share := min(max(p.cfg.Batch.MaxInFlight/(2*readers), 1), maxRead)
	part := "source " + r.Name()
	for failures := 0; ctx.Err() == nil; {
		reserved := p.permits.reserve(ctx, share)
		if reserved == 0 {
			return
		}
		b, err := r.Next(ctx, reserved)
		if err != nil || b == nil {
			b = &Batch{}
		}
		p.permits.use(reserved, len(b.Items), b.Bytes())
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			failures++
			p.sourceFailed(part, err, failures)
			pause(ctx, Classify(err), failures)
			continue
		}
		failures = 0
		if p.health.Clear(part) {
			p.log.Info("reading again", "source", r.Name())
		}
		if len(b.Items) > 0 {
			p.metrics.read.Add(float64(len(b.Items)))
			p.log.Debug("batch consumed", "n", len(b.Items))
			out <- b
		}
	}
}

// sourceFailed reports a failed read. A single failure is often gone at the next try, so it does not make the processor
// unready.
func (p *Pipeline) sourceFailed(part string, err error, failures int) {
	p.metrics.sourceErrors.Inc()
	if failures == 1 {
		p.log.Warn("reading failed; trying again", "error", err)
	}
	if failures > 2 || Classify(err) == ClassConfiguration {
		if p.health.Set(part, err.Error()) {
			p.log.Error("the source cannot be read", "error", err)
		}
	}
}

// decode makes rows of a batch, updates the state, and hands the rows to their writers and the undecodable items to the
// error policy.
func (p *Pipeline) decode(ctx context.Context, b *Batch) {
	defer p.tracer.received(b)()
	columns := len(p.cfg.Mapping.Columns)
	rows := make([]Value, columns*len(b.Items))
	good := make([]*Item, 0, len(b.Items))
	var bad []*Item
	for i, it := range b.Items {
		it.Row = rows[i*columns : (i+1)*columns : (i+1)*columns]
		if err := p.transform.Decode(it); err != nil {
			it.Problem = clip(err.Error())
			bad = append(bad, it)
			continue
		}
		good = append(good, it)
	}
	if !b.Together {
		good = p.leaveOut(good)
	}
	if len(bad) > 0 {
		p.undecodable(ctx, bad)
		if b.InOrder {
			p.dispatch(b) // the writer stops before the first of them
			return
		}
		p.finish(&Batch{Items: bad}, problems(bad))
	}
	if b.Items = good; len(good) > 0 {
		p.dispatch(b)
	}
}

// leaveOut settles the items that the filter leaves out, and returns the others. What travels together keeps them: its
// source settles it cheaper as a whole, in the transaction that writes the others.
func (p *Pipeline) leaveOut(items []*Item) []*Item {
	var filtered []*Item
	for _, it := range items {
		if it.Filtered {
			filtered = append(filtered, it)
		}
	}
	if len(filtered) == 0 {
		return items
	}
	p.finish(&Batch{Items: filtered}, outcomes(len(filtered), Outcome{Result: Filtered}))
	return slices.DeleteFunc(items, func(it *Item) bool { return it.Filtered })
}

func (p *Pipeline) undecodable(ctx context.Context, bad []*Item) {
	p.metrics.undecodable.Add(float64(len(bad)))
	for _, it := range bad {
		level := slog.LevelWarn
		if it.Deliveries != 1 {
			level = slog.LevelDebug // said before
		}
		p.log.Log(ctx, level, "entry cannot be decoded", "stream", it.Stream, "id", it.ID, "reason", it.Problem)
	}
}

// problems are the outcomes of undecodable items.
func problems(bad []*Item) []Outcome {
	os := make([]Outcome, len(bad))
	for i, it := range bad {
		os[i] = Outcome{Result: Rejected, Reason: it.Problem}
	}
	return os
}

// dispatch gives every item to the writer of its key, so that one key is written by one writer, in order.
func (p *Pipeline) dispatch(b *Batch) {
	n := len(p.writers)
	if n == 1 {
		p.writers[0] <- b
		return
	}
	if b.Together {
		p.writers[p.hash(b.Items[0])%uint(n)] <- b
		return
	}
	parts := make([][]*Item, n)
	for i := range parts {
		parts[i] = make([]*Item, 0, len(b.Items)/n+len(b.Items)/8+1)
	}
	for _, it := range b.Items {
		w := p.hash(it) % uint(n)
		parts[w] = append(parts[w], it)
	}
	for i, items := range parts {
		if len(items) > 0 {
			p.writers[i] <- &Batch{Items: items, More: b.More}
		}
	}
}

// hash is of the message's key where the source promises order per key, and otherwise of what the sink keeps together.
func (p *Pipeline) hash(it *Item) uint {
	if it.Key != nil {
		return uint(maphash.String(p.seed, *it.Key))
	}
	if p.sharder != nil {
		return uint(p.sharder.Shard(it))
	}
	if r := p.cfg.Source.Redis; r != nil && r.Ownership == config.OwnershipExclusive {
		return uint(maphash.String(p.seed, it.Stream)) // whose order is promised
	}
	return uint(maphash.String(p.seed, it.ID))
}

// ErrDrainTimeout means that a drain was cut off: what was unfinished has been given back.
var ErrDrainTimeout = errors.New("the drain took longer than drain.timeout; unfinished entries were given back")
