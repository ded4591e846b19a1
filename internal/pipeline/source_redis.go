package pipeline

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// Timing of a RedisSource.
const (
	redisBlock       = 250 * time.Millisecond // longest wait for new entries; a drain waits for it
	progressInterval = 5 * time.Second
	staleInterval    = time.Minute
	trimInterval     = time.Second
	tendInterval     = time.Second // at most, between two renewals of a lease
	rememberInterval = time.Second // between two looks whether streams were read further than is remembered
	rememberTimeout  = 2 * time.Second
	itemOverhead     = 300 // bytes of an item beside its fields, roughly
)

// RedisSource reads Redis streams as one consumer of a Redis consumer group.
type RedisSource struct {
	client  rueidis.Client
	members []*redisstream.Member
	memory  *incarnations // nil when nothing depends on the ids of entries
	keyed   bool          // rows are told apart by @id
	source  config.RedisSource
	errors  config.Errors
	letters *DeadLetters // nil with the policy Pending
	metrics *Metrics
	log     *slog.Logger

	mu      sync.Mutex
	trimmed map[string]int64 // by stream: how many entries have been reported
}

// RedisOptions are what a RedisSource is made from.
type RedisOptions struct {
	Client   rueidis.Client
	Version  redisstream.Version // of the server
	Consumer string              // name of this processor among the readers of its group
	Config   *config.Config
	Pool     *pgxpool.Pool // of the sink's database; nil when the configuration needs none
	Metrics  *Metrics
	Logger   *slog.Logger
}

// NewRedisSource returns a source that reads under the given consumer name. Migrate comes before it, and Join before it is
// used.
func NewRedisSource(o RedisOptions) *RedisSource {
	c := o.Config.Source.Redis
	s := &RedisSource{
		client: o.Client, source: *c, errors: o.Config.Errors, letters: NewDeadLetters(o.Pool, o.Config),
		metrics: o.Metrics, log: o.Logger, trimmed: map[string]int64{}, keyed: keyedByID(o.Config),
	}
	var memory redisstream.Incarnations // a nil *incarnations would not be nil
	if needsIncarnations(o.Config) {
		s.memory = newIncarnations(o.Pool, o.Config)
		memory = s.memory
	}
	for _, stream := range c.Streams {
		s.members = append(s.members, redisstream.NewMember(o.Client, redisstream.Config{
			Stream: stream, Group: c.Group, Consumer: o.Consumer, Version: o.Version,
			FromLatest:   c.Start == config.StartLatest,
			ReclaimAfter: time.Duration(c.ReclaimAfter),
			Delete:       c.AfterAck == config.AfterAckDelete,
			Exclusive:    c.Ownership == config.OwnershipExclusive,
			Incarnations: memory,
		}))
	}
	// Members count the streams alike, whatever the order in their configurations.
	slices.SortFunc(s.members, func(a, b *redisstream.Member) int { return strings.Compare(a.Config().Stream, b.Config().Stream) })
	return s
}

// Join creates the streams and groups that are missing, and logs where the source reads.
func (s *RedisSource) Join(ctx context.Context) error {
	for _, m := range s.members {
		if err := m.Join(ctx); err != nil {
			return err
		}
		c := m.Config()
		s.log.Info(fmt.Sprintf("consumer started on stream %s group %s consumer %s", c.Stream, c.Group, c.Consumer))
	}
	return s.tend(ctx)
}

// tend renews the leases of the streams, takes and gives them.
func (s *RedisSource) tend(ctx context.Context) error {
	if s.source.Ownership != config.OwnershipExclusive {
		return nil
	}
	return s.each(ctx, func(m *redisstream.Member, ctx context.Context) error {
		before := m.Owner()
		err := m.Tend(ctx, slices.Index(s.members, m))
		after := m.Owner()
		if before != after {
			s.log.Info("the ownership of a stream has changed", "stream", m.Config().Stream, "owner", after)
		}
		s.metrics.owner.WithLabelValues(m.Config().Stream).Set(number(after))
		return err
	})
}

// Readers implements Source: one for each stream.
func (s *RedisSource) Readers() []Reader {
	rs := make([]Reader, len(s.members))
	for i, m := range s.members {
		rs[i] = redisReader{m}
	}
	return rs
}

type redisReader struct{ member *redisstream.Member }

// Name implements Reader.
func (r redisReader) Name() string { return r.member.Config().Stream }

// Next implements Reader. A read that has begun is not broken off when ctx ends, because Redis may have handed out its
// entries already; it takes little longer than redisBlock.
func (r redisReader) Next(ctx context.Context, max int) (*Batch, error) {
	entries, more, err := r.member.Read(context.WithoutCancel(ctx), max, redisBlock)
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		return &Batch{More: more}, nil
	}
	now := time.Now()
	slab := make([]Item, len(entries))
	b := &Batch{Items: make([]*Item, len(entries)), More: more}
	from := &redisOrigin{member: r.member, term: entries[0].Term}
	for i, e := range entries {
		if e.Term != from.term {
			from = &redisOrigin{member: r.member, term: e.Term}
		}
		it := &slab[i]
		it.ID, it.Fields, it.Deliveries = from.prefix()+e.ID, e.Fields, e.Deliveries
		it.Stream, it.Received, it.origin = r.member.Config().Stream, now, from
		it.Created = time.UnixMilli(redisstream.Millis(e.ID))
		it.size = itemOverhead
		for _, f := range e.Fields {
			it.size += len(f.Field) + len(f.Value)
		}
		b.Items[i] = it
	}
	return b, nil
}

// redisOrigin is where entries come from, and the right by which they were read.
type redisOrigin struct {
	member *redisstream.Member
	term   redisstream.Term
}

// prefix goes before the ids of a stream that has begun anew, whose ids may be those of the entries before: what is
// deduplicated by @id must not take a new entry for an old one.
func (o *redisOrigin) prefix() string {
	if o.term.Incarnation == 0 {
		return ""
	}
	return fmt.Sprintf("r%d-", o.term.Incarnation)
}

// entryID is an item's id as Redis knows it.
func (o *redisOrigin) entryID(it *Item) string { return it.ID[len(o.prefix()):] }

// Fence implements LeasedSource.
func (s *RedisSource) Fence(b *Batch) (known bool) {
	if s.source.Ownership != config.OwnershipExclusive {
		return true
	}
	known = true
	for _, it := range b.Items {
		from := it.origin.(*redisOrigin)
		switch from.member.Standing(from.term) {
		case redisstream.Lost:
			it.Fenced = true
		case redisstream.Unknown:
			known = false
		case redisstream.Held:
		}
	}
	return known
}

// Settle implements Source. What is written is acknowledged; what is rejected stays pending until the error policy says
// otherwise, and is acknowledged only after it has become a dead letter.
func (s *RedisSource) Settle(ctx context.Context, b *Batch, os []Outcome) error {
	for _, from := range origins(b) {
		if err := s.settle(ctx, from, b, os); err != nil {
			return err
		}
	}
	return nil
}

// origins are those of the batch's items, each once.
func origins(b *Batch) []redisOrigin {
	var all []redisOrigin
	var last *redisOrigin
	for _, it := range b.Items {
		if from := it.origin.(*redisOrigin); from != last {
			if last = from; !slices.Contains(all, *from) {
				all = append(all, *from)
			}
		}
	}
	return all
}

// settle settles the items of one origin.
func (s *RedisSource) settle(ctx context.Context, from redisOrigin, b *Batch, os []Outcome) error {
	var acked, kept []string
	var rejected []DeadLetter
	for i, it := range b.Items {
		if *it.origin.(*redisOrigin) != from {
			continue
		}
		if s.keyed && os[i].Result == Duplicate && it.Deliveries == 1 {
			from.member.Doubt() // either its group was set back, or its id is one of the stream that was there before
		}
		switch os[i].Result {
		case Written, Duplicate, Filtered, DeadLettered:
			if acked == nil {
				acked = make([]string, 0, len(b.Items)-i)
			}
			acked = append(acked, from.entryID(it))
		case Rejected:
			rejected = append(rejected, DeadLetter{Item: it, Reason: os[i].Reason})
		case Retry, Fenced:
			kept = append(kept, from.entryID(it))
		}
	}
	if err := from.member.Ack(ctx, from.term, acked); err != nil {
		return err
	}
	from.member.Forget(from.term, kept)
	return s.reject(ctx, from, rejected)
}

// reject leaves entries pending, or, when they have been delivered often enough, makes dead letters of them and then
// acknowledges them.
func (s *RedisSource) reject(ctx context.Context, from redisOrigin, rejected []DeadLetter) error {
	if len(rejected) == 0 {
		return nil
	}
	items := make([]*Item, len(rejected))
	for i, r := range rejected {
		items[i] = r.Item
	}
	if err := s.CountDeliveries(ctx, items); err != nil {
		return err
	}
	var dead []DeadLetter
	var deadIDs, kept []string
	for _, r := range rejected {
		id := from.entryID(r.Item)
		if s.letters != nil && s.errors.Policy == config.PolicyDeadLetter && r.Item.Deliveries >= s.errors.MaxDeliveries {
			r.Deliveries = r.Item.Deliveries
			dead, deadIDs = append(dead, r), append(deadIDs, id)
		} else {
			kept = append(kept, id)
		}
	}
	if len(dead) > 0 {
		if err := s.letters.Put(ctx, dead); err != nil {
			return err
		}
		if err := from.member.Ack(ctx, from.term, deadIDs); err != nil {
			return err
		}
		s.metrics.deadLetters.Add(float64(len(dead)))
		s.log.Warn("entries became dead letters", "stream", from.member.Config().Stream, "n", len(dead),
			"deliveries", s.errors.MaxDeliveries, "reason", dead[0].Reason)
	}
	from.member.Forget(from.term, kept)
	return nil
}

// CountDeliveries fills in the counts that did not come with the entries.
func (s *RedisSource) CountDeliveries(ctx context.Context, items []*Item) error {
	for _, from := range origins(&Batch{Items: items}) {
		var ids []string
		var of []*Item
		for _, it := range items {
			if it.Deliveries == 0 && *it.origin.(*redisOrigin) == from {
				ids, of = append(ids, from.entryID(it)), append(of, it)
			}
		}
		counts, err := from.member.Deliveries(ctx, ids)
		if err != nil {
			return err
		}
		for i, n := range counts {
			of[i].Deliveries = n
		}
	}
	return nil
}

// Run implements Source: it shows that held entries are being worked on, keeps the leases of streams, removes consumers of
// members long gone, trims, and keeps the figures up to date.
func (s *RedisSource) Run(ctx, _ context.Context) error {
	third := max(time.Duration(s.source.ReclaimAfter)/3, 10*time.Millisecond)
	var jobs sync.WaitGroup
	every := func(interval time.Duration, what string, job func(context.Context) error) {
		jobs.Go(func() { s.repeat(ctx, interval, what, job) })
	}
	every(third, "refresh", func(ctx context.Context) error { return s.each(ctx, (*redisstream.Member).Refresh) })
	every(staleInterval, "stale consumers", func(ctx context.Context) error { return s.each(ctx, (*redisstream.Member).RemoveStale) })
	if s.memory != nil {
		every(rememberInterval, "remember", s.remember)
	}
	every(progressInterval, "progress", func(ctx context.Context) error { return s.each(ctx, s.observe) })
	if s.source.Ownership == config.OwnershipExclusive {
		every(min(third, tendInterval), "leases", s.tend)
	}
	if s.source.AfterAck == config.AfterAckTrim {
		every(trimInterval, "trim", func(ctx context.Context) error { return s.each(ctx, s.trim) })
	}
	jobs.Wait()
	return nil
}

// upkeepFailures in a row are no longer a passing trouble of the network: a right is missing, for example, while reading goes on.
const upkeepFailures = 3

// repeat does a job at every interval until ctx ends.
func (s *RedisSource) repeat(ctx context.Context, interval time.Duration, what string, job func(context.Context) error) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		err := job(ctx)
		if err == nil || ctx.Err() != nil {
			failures = 0
			continue
		}
		level := slog.LevelDebug
		if failures++; failures == upkeepFailures {
			level = slog.LevelWarn // once, and then again after it has worked
		}
		s.log.Log(ctx, level, "upkeep of the Redis source failed; trying again", "job", what, "failures", failures, "error", err)
	}
}

// remember notes how far each stream was read, so that one that begins anew is known although it grows as far before somebody
// looks.
func (s *RedisSource) remember(ctx context.Context) error {
	var members []*redisstream.Member
	var reached []redisstream.Reached
	for _, m := range s.members {
		if r, further := m.Reached(); further {
			members, reached = append(members, m), append(reached, r)
		}
	}
	if len(reached) == 0 {
		return nil
	}
	now, err := s.memory.Remember(ctx, reached)
	if err != nil {
		return err
	}
	for i, m := range members {
		m.Remembered(reached[i], now[i])
	}
	return nil
}

func (s *RedisSource) trim(m *redisstream.Member, ctx context.Context) error {
	_, err := m.Trim(ctx)
	return err
}

// each does the same for every member, and returns one of the errors. Members do not wait for each other: the nodes of a
// Cluster fail one by one.
func (s *RedisSource) each(ctx context.Context, do func(*redisstream.Member, context.Context) error) error {
	errs := make(chan error, len(s.members))
	for _, m := range s.members {
		go func() { errs <- do(m, ctx) }()
	}
	var one error
	for range s.members {
		if err := <-errs; err != nil {
			one = err
		}
	}
	return one
}

func (s *RedisSource) observe(m *redisstream.Member, ctx context.Context) error {
	stream := m.Config().Stream
	c := m.Counters()
	s.metrics.reclaimed.WithLabelValues(stream).Set(float64(c.Reclaimed))
	if n := s.reported(stream, c.Trimmed); n > 0 {
		s.log.Warn("entries were deleted or trimmed from the stream before they were settled; they are lost unless they were read before",
			"stream", stream, "n", n)
	}
	s.metrics.trimmed.WithLabelValues(stream).Set(float64(c.Trimmed))
	s.metrics.fenced.WithLabelValues(stream).Set(float64(c.Fenced))
	s.metrics.incarnation.WithLabelValues(stream).Set(float64(m.Incarnation()))
	s.metrics.stolen.WithLabelValues(stream).Set(float64(c.Stolen))
	p, err := m.Progress(ctx)
	if err != nil {
		s.metrics.lag.WithLabelValues(stream).Set(-1) // not known, and not what it was
		return err
	}
	s.metrics.lag.WithLabelValues(stream).Set(float64(p.Lag))
	s.metrics.pending.WithLabelValues(stream).Set(float64(p.Pending))
	s.metrics.oldest.WithLabelValues(stream).Set(p.OldestPending.Seconds())
	return nil
}

// reported returns how many trimmed entries of a stream have not been reported yet.
func (s *RedisSource) reported(stream string, trimmed int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := trimmed - s.trimmed[stream]
	s.trimmed[stream] = trimmed
	return n
}

// Release implements Source.
func (s *RedisSource) Release(ctx context.Context) error {
	if s.memory != nil {
		remember, cancel := context.WithTimeout(ctx, rememberTimeout)
		if err := s.remember(remember); err != nil {
			s.log.Warn("how far the Redis streams were read could not be remembered; what is remembered is a second older", "error", reason(err))
		}
		cancel()
	}
	var total atomic.Int64
	err := s.each(ctx, func(m *redisstream.Member, ctx context.Context) error {
		n, err := m.Release(ctx)
		total.Add(int64(n))
		return err
	})
	s.metrics.released.Add(float64(total.Load()))
	if n := total.Load(); n > 0 {
		s.log.Info("entries given back", "n", n)
	}
	return err
}
