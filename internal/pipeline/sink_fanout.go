package pipeline

import (
	"context"
	"errors"
	"hash/maphash"
	"log/slog"
	"slices"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// FanOut gives every item to each of several sinks, its branches. An item is acknowledged when all have taken it.
//
// An item is taken by all branches or by none. The branches in the database write in one transaction, with the ack when the
// source is there too, after those outside of it. An item that a branch refuses is written by no branch of the database
// until its last delivery; then it becomes a dead letter of that branch, and the others write it, in that same transaction.
//
//	F1: a branch in the database writes an item once for each time that it is acknowledged.
//	F2: a branch outside is asked again only for what it has not taken, as long as this process remembers it: at least the
//	    last maxRemembered items that it has taken and others have not.
type FanOut struct {
	branches []*branch
	pool     *pgxpool.Pool // nil when everything is outside of the database
	source   TxSource      // settles in the sink's transactions; nil when it is elsewhere
	letters  *DeadLetters  // nil with the policy Pending
	errors   config.Errors
	name     string // of the processor
	metrics  *Metrics
	log      *slog.Logger
	seed     maphash.Seed
	sharder  Sharder         // the only branch that keeps items together; nil when there are several or none
	byStream bool            // there are several
	counter  deliveryCounter // nil when items know how often they were delivered

	mu      sync.Mutex
	taken   map[string]branches // by identity of an item that is not acknowledged, the branches outside that have taken it
	earlier map[string]branches // what taken was before it had maxRemembered items
}

// maxRemembered is how many items a fan-out remembers at least; twice as many are the most.
const maxRemembered = 20_000

// branch is one sink of a fan-out.
type branch struct {
	name      string
	sink      Sink
	tx        TxSink     // the sink, when it is in the database
	transform *Transform // nil when it takes the pipeline's rows
	columns   int
}

// branches is a set of branches, one bit each.
type branches uint32

func (s branches) has(i int) bool { return s&(1<<i) != 0 }
func (s *branches) add(i int)     { *s |= 1 << i }

// fanned is what a fan-out knows of one item. It stays with the item while its batch is written again or halved.
type fanned struct {
	views   []*Item  // the item as each branch sees it
	done    branches // that need not be asked: outside they have taken it, their filter leaves it out, or it is not for them
	wrote   branches // of done: those for which it was new
	refused []string // by branch, why it refuses the item; nil when none does
	id      string   // the item's identity; empty when it has not been asked for
}

// committed is what one transaction did with one item.
type committed struct {
	wrote    branches // for which it was new
	mismatch bool     // a branch has it with other content
}

// deliveryCounter is a source whose items do not all know how often they were delivered.
type deliveryCounter interface {
	// CountDeliveries fills in Deliveries where it is 0.
	CountDeliveries(ctx context.Context, items []*Item) error
}

// branchError is an error of one branch. Its class is that of what happened.
type branchError struct {
	branch string
	err    error
}

// Error says which branch failed, and how.
func (e *branchError) Error() string { return "branch " + e.branch + ": " + e.err.Error() }

// Unwrap returns what happened.
func (e *branchError) Unwrap() error { return e.err }

// errRefused ends a transaction because a branch refuses items that it has named.
var errRefused = errors.New("a branch refuses items of the batch")

// NewFanOut opens every branch. Its errors are of class ClassConfiguration when a person has to act.
func NewFanOut(ctx context.Context, o SinkOptions) (*FanOut, error) {
	f := &FanOut{
		pool: o.Pool, letters: NewDeadLetters(o.Pool, o.Config), errors: o.Config.Errors, name: o.Config.Name,
		metrics: o.Metrics, log: o.Logger, seed: maphash.MakeSeed(), taken: map[string]branches{},
	}
	if err := oneReceiverOfSecrets(o.Config); err != nil {
		return nil, err
	}
	sharders := 0
	for _, b := range o.Config.Branches() {
		alone := o
		alone.Config = ofBranch(o.Config, b)
		sink, err := NewSink(ctx, alone)
		if err != nil {
			return nil, &branchError{b.Name, err}
		}
		br := &branch{name: b.Name, sink: sink, columns: len(b.Mapping.Columns)}
		br.tx, _ = sink.(TxSink)
		if b.Mapping != &o.Config.Mapping {
			if br.transform, err = NewTransform(alone.Config); err != nil {
				return nil, &branchError{b.Name, err}
			}
		}
		if _, ok := sink.(Sharder); ok {
			sharders++
		}
		f.branches = append(f.branches, br)
	}
	f.byStream = sharders > 1
	if sharders == 1 {
		i := slices.IndexFunc(f.branches, func(br *branch) bool { _, ok := br.sink.(Sharder); return ok })
		f.sharder = branchSharder{f, i}
	}
	return f, nil
}

// branchSharder shards by what one branch sees of an item.
type branchSharder struct {
	fanOut *FanOut
	branch int
}

// Shard implements Sharder.
func (s branchSharder) Shard(it *Item) uint64 {
	f := s.fanOut.of(it)
	if f.done.has(s.branch) || f.refused != nil && f.refused[s.branch] != "" {
		return maphash.String(s.fanOut.seed, it.ID)
	}
	return s.fanOut.branches[s.branch].sink.(Sharder).Shard(f.views[s.branch])
}

// Shard implements Sharder. Two branches can want different items together; then the order of a stream is kept.
func (f *FanOut) Shard(it *Item) uint64 {
	switch {
	case f.sharder != nil:
		return f.sharder.Shard(it)
	case f.byStream:
		return maphash.String(f.seed, it.Stream)
	}
	return maphash.String(f.seed, it.ID)
}

// SettleWith implements SettlingSink.
func (f *FanOut) SettleWith(source TxSource) { f.source = source }

// countWith is called with the source of the pipeline.
func (f *FanOut) countWith(source Source) { f.counter, _ = source.(deliveryCounter) }

// of returns what the fan-out knows of an item.
func (f *FanOut) of(it *Item) *fanned {
	if it.fanned != nil {
		return it.fanned
	}
	known := &fanned{views: make([]*Item, len(f.branches))}
	it.fanned = known
	known.done = f.recall(it)
	for i, br := range f.branches {
		known.views[i] = it
		if it.Branch != "" && it.Branch != br.name {
			known.done.add(i)
		}
		if br.transform == nil || known.done.has(i) {
			continue
		}
		view := *it
		view.Row = make([]Value, br.columns)
		known.views[i] = &view
		if err := br.transform.Decode(&view); err != nil {
			f.refuse(it, i, err.Error())
		} else if view.Filtered {
			known.done.add(i)
			f.count(i, Filtered)
		}
	}
	return known
}

// refuse notes that a branch refuses an item.
func (f *FanOut) refuse(it *Item, i int, why string) {
	if it.fanned.refused == nil {
		it.fanned.refused = make([]string, len(f.branches))
	}
	it.fanned.refused[i] = clip(why)
	f.count(i, Rejected)
}

func (f *FanOut) count(i int, r Result) {
	f.metrics.branchEntries.WithLabelValues(f.branches[i].name, r.String()).Inc()
}

// refusal says which branches refuse an item and why; empty when none does.
func (f *FanOut) refusal(it *Item) string {
	text := ""
	for i, why := range it.fanned.refused {
		if why != "" {
			if text != "" {
				text += "; "
			}
			text += "branch " + f.branches[i].name + ": " + why
		}
	}
	return clip(text)
}

// Write implements Sink.
func (f *FanOut) Write(ctx context.Context, b *Batch) ([]Outcome, error) {
	for _, it := range b.Items {
		f.of(it)
	}
	// Written stands for every item that is still to be written.
	os := make([]Outcome, len(b.Items))
	for i, br := range f.branches {
		if br.tx == nil {
			if err := f.send(ctx, i, b, os); err != nil {
				return nil, err
			}
		}
	}
	for {
		if err := f.hold(ctx, b, os); err != nil {
			return nil, err
		}
		done, err := f.commit(ctx, b, os)
		if err == nil {
			f.release(b, done)
		}
		if !errors.Is(err, errRefused) {
			return done, err
		}
	}
}

// send gives a branch outside of the database what it has not taken yet. Items that it cannot take now become Retry.
func (f *FanOut) send(ctx context.Context, i int, b *Batch, os []Outcome) error {
	if err := f.hold(ctx, b, os); err != nil {
		return err
	}
	part, from := f.part(i, b, os)
	if len(part.Items) == 0 {
		return nil
	}
	results, err := f.branches[i].sink.Write(ctx, part)
	if err != nil {
		if err = f.blame(i, b, part, from, err); errors.Is(err, errRefused) {
			err = nil
		}
		return err
	}
	for n, o := range results {
		it := b.Items[from[n]]
		switch {
		case o.Result == Rejected:
			f.refuse(it, i, o.Reason)
		case o.Result == Retry:
			os[from[n]] = Outcome{Result: Retry, Reason: "branch " + f.branches[i].name + ": " + o.Reason}
		default:
			it.fanned.done.add(i)
			if o.Result == Written {
				it.fanned.wrote.add(i)
			}
			f.remember(it, i)
			f.count(i, o.Result)
		}
	}
	return nil
}

// part is what is still to be written of a batch by one branch, and where its items stand in the batch.
func (f *FanOut) part(i int, b *Batch, os []Outcome) (part *Batch, from []int) {
	part = &Batch{InOrder: b.InOrder}
	for n, it := range b.Items {
		k := it.fanned
		if os[n].Result == Written && !k.done.has(i) && (k.refused == nil || k.refused[i] == "") {
			part.Items, from = append(part.Items, k.views[i]), append(from, n)
		}
	}
	return part, from
}

// blame decides what the error of a branch means. When a row is at fault and there is only one, it is known which:
// errRefused. Otherwise the pipeline halves the batch.
func (f *FanOut) blame(i int, b, part *Batch, from []int, err error) error {
	if len(part.Items) == 1 && Classify(err) == ClassRow {
		f.refuse(b.Items[from[0]], i, reason(err))
		return errRefused
	}
	return &branchError{f.branches[i].name, err}
}

// hold rejects the items that a branch refuses, unless this is their last delivery, and in order holds back what comes after
// an item that is not written.
func (f *FanOut) hold(ctx context.Context, b *Batch, os []Outcome) error {
	var unknown []*Item
	for n, it := range b.Items {
		if os[n].Result == Written && it.fanned.refused != nil && it.Deliveries == 0 {
			unknown = append(unknown, it)
		}
	}
	if len(unknown) > 0 && f.letters != nil && f.counter != nil {
		if err := f.counter.CountDeliveries(ctx, unknown); err != nil {
			return err
		}
	}
	for n, it := range b.Items {
		if os[n].Result == Written && it.fanned.refused != nil && !f.last(it) {
			os[n] = Outcome{Result: Rejected, Reason: f.refusal(it)}
		}
		if b.InOrder && os[n].Result != Written {
			for rest := n + 1; rest < len(os); rest++ {
				os[rest] = Outcome{Result: Retry, Reason: "an item before it is not written"}
			}
			return nil
		}
	}
	return nil
}

// last says whether an item that is refused now does not come again.
func (f *FanOut) last(it *Item) bool {
	return f.letters != nil && !it.Redriven && it.Deliveries >= f.errors.MaxDeliveries
}

// commit writes what is left of the batch into the database: by every branch that is there, with the dead letters of those
// that refuse items, and with the ack. It returns errRefused when a branch has refused more.
func (f *FanOut) commit(ctx context.Context, b *Batch, os []Outcome) ([]Outcome, error) {
	var letters []DeadLetter
	work := false
	for n, it := range b.Items {
		if os[n].Result != Written {
			continue
		}
		for i, br := range f.branches {
			switch {
			case it.fanned.refused != nil && it.fanned.refused[i] != "":
				letters = append(letters, DeadLetter{Item: it, Branch: br.name, Deliveries: it.Deliveries, Reason: it.fanned.refused[i]})
			case br.tx != nil && !it.fanned.done.has(i):
				work = true
			}
		}
	}
	if !work && len(letters) == 0 {
		return f.results(b, os, nil), nil
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	conn, err := f.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	var did []committed // for each item of the batch
	counts := make([][numResults]int, len(f.branches))
	done, err := settledWrite(ctx, conn.Conn(), f.source, b, func(tx pgx.Tx) ([]Outcome, error) {
		did = make([]committed, len(b.Items))
		for i, br := range f.branches {
			if br.tx == nil {
				continue
			}
			if err := f.write(ctx, tx, i, b, os, did, &counts[i]); err != nil {
				return nil, err
			}
		}
		if len(letters) > 0 {
			if err := f.letters.PutTx(ctx, tx, letters); err != nil {
				return nil, err
			}
		}
		return f.results(b, os, did), nil
	})
	if err != nil {
		return nil, f.forget(ctx, conn.Conn(), err)
	}
	for i, c := range counts {
		for r, n := range c {
			if n > 0 {
				f.metrics.branchEntries.WithLabelValues(f.branches[i].name, Result(r).String()).Add(float64(n))
			}
		}
	}
	if len(letters) > 0 {
		f.metrics.deadLetters.Add(float64(len(letters)))
		f.log.Warn("items became dead letters of a branch", "n", len(letters), "branch", letters[0].Branch, "reason", letters[0].Reason)
	}
	return done, nil
}

// write lets one branch write its part of the batch inside the transaction.
func (f *FanOut) write(ctx context.Context, tx pgx.Tx, i int, b *Batch, os []Outcome, did []committed, counts *[numResults]int) error {
	part, from := f.part(i, b, os)
	if len(part.Items) == 0 {
		return nil
	}
	results, err := f.branches[i].tx.WriteTx(ctx, tx, part)
	if err != nil {
		return f.blame(i, b, part, from, err)
	}
	var failed error
	for n, o := range results {
		switch o.Result {
		case Rejected:
			f.refuse(b.Items[from[n]], i, o.Reason)
			failed = errRefused // after others have written it in this transaction
		case Retry:
			if failed == nil {
				failed = &branchError{f.branches[i].name, errors.New(o.Reason)}
			}
		case Written:
			did[from[n]].wrote.add(i)
		case Duplicate:
			did[from[n]].mismatch = did[from[n]].mismatch || o.Mismatch
		}
		counts[o.Result]++
	}
	return failed
}

// results are the outcomes of a batch that everybody has taken.
func (f *FanOut) results(b *Batch, os []Outcome, did []committed) []Outcome {
	all := slices.Clone(os)
	for n, it := range b.Items {
		if os[n].Result != Written {
			continue
		}
		var here committed
		if did != nil {
			here = did[n]
		}
		fresh := it.fanned.wrote | here.wrote
		switch {
		case it.fanned.refused != nil:
			all[n] = Outcome{Result: DeadLettered, Reason: f.refusal(it)}
		case fresh == 0 && !f.asked(it):
			all[n] = Outcome{Result: Filtered}
		case fresh == 0:
			all[n] = Outcome{Result: Duplicate}
		}
		all[n].Mismatch = here.mismatch
	}
	return all
}

// asked says whether any branch had to take an item.
func (f *FanOut) asked(it *Item) bool {
	for i, br := range f.branches {
		view := it.fanned.views[i]
		if (it.Branch == "" || it.Branch == br.name) && !(view != it && view.Filtered) {
			return true
		}
	}
	return false
}

// forget lets all branches drop prepared statements when what one of them reads has changed: the error does not say which.
func (f *FanOut) forget(ctx context.Context, conn *pgx.Conn, err error) error {
	again := err
	for _, br := range f.branches {
		if s, ok := br.sink.(interface{ prepared() *statement }); ok {
			again = s.prepared().forget(ctx, conn, err)
		}
	}
	return again
}

// remember keeps in mind that a branch outside of the database has taken an item, for when it comes again.
func (f *FanOut) remember(it *Item, i int) {
	id := f.identity(it)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.taken) >= maxRemembered {
		f.taken, f.earlier = make(map[string]branches), f.taken
	}
	taken := f.taken[id] | f.earlier[id]
	taken.add(i)
	f.taken[id] = taken
}

// recall returns the branches outside that have taken an item at an earlier delivery, as far as this process remembers.
func (f *FanOut) recall(it *Item) branches {
	f.mu.Lock()
	empty := len(f.taken)+len(f.earlier) == 0
	f.mu.Unlock()
	if empty {
		return 0
	}
	id := f.identity(it)
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.taken[id] | f.earlier[id]
}

// release forgets what is acknowledged.
func (f *FanOut) release(b *Batch, os []Outcome) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for n, it := range b.Items {
		if it.fanned.id != "" && os[n].Result.Acknowledge() {
			delete(f.taken, it.fanned.id)
			delete(f.earlier, it.fanned.id)
		}
	}
}

func (f *FanOut) identity(it *Item) string {
	if it.fanned.id == "" {
		it.fanned.id = identity(f.name, it)
	}
	return it.fanned.id
}

// Upkeep implements Upkeeper.
func (f *FanOut) Upkeep(ctx context.Context, source SettledSource) error {
	for _, b := range f.branches {
		if sink, ok := b.sink.(Upkeeper); ok {
			if err := sink.Upkeep(ctx, source); err != nil {
				return &branchError{b.name, err}
			}
		}
	}
	return nil
}
