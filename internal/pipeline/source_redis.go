package pipeline

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/redis/rueidis"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// Timing of a RedisSource.
const (
	redisBlock       = 250 * time.Millisecond // longest wait for new entries; a drain waits for it
	progressInterval = 5 * time.Second
	staleInterval    = time.Minute
	itemOverhead     = 300 // bytes of an item beside its fields, roughly
)

// RedisSource reads Redis streams as one consumer of a Redis consumer group.
type RedisSource struct {
	client  rueidis.Client
	members []*redisstream.Member
	errors  config.Errors
	letters *DeadLetters // nil with the policy Pending
	metrics *Metrics
	log     *slog.Logger
}

// NewRedisSource returns a source that reads under the given consumer name. letters may be nil with the policy Pending.
// Call Join before it is used.
func NewRedisSource(client rueidis.Client, consumer string, c *config.Config, letters *DeadLetters, metrics *Metrics, log *slog.Logger) *RedisSource {
	s := &RedisSource{client: client, errors: c.Errors, letters: letters, metrics: metrics, log: log}
	for _, stream := range c.Source.Redis.Streams {
		s.members = append(s.members, redisstream.NewMember(client, redisstream.Config{
			Stream: stream, Group: c.Source.Redis.Group, Consumer: consumer,
			FromLatest:   c.Source.Redis.Start == config.StartLatest,
			ReclaimAfter: time.Duration(c.Source.Redis.ReclaimAfter),
		}))
	}
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
	return nil
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
	now := time.Now()
	slab := make([]Item, len(entries))
	b := &Batch{Items: make([]*Item, len(entries)), More: more}
	for i, e := range entries {
		it := &slab[i]
		it.ID, it.Fields, it.Deliveries = e.ID, e.Fields, e.Deliveries
		it.Stream, it.Received, it.origin = r.member.Config().Stream, now, r.member
		it.Created = time.UnixMilli(redisstream.Millis(e.ID))
		it.size = itemOverhead
		for _, f := range e.Fields {
			it.size += len(f.Field) + len(f.Value)
		}
		b.Items[i] = it
	}
	return b, nil
}

// Settle implements Source. What is written is acknowledged; what is rejected stays pending until the error policy says
// otherwise, and is acknowledged only after it has become a dead letter.
func (s *RedisSource) Settle(ctx context.Context, b *Batch, os []Outcome) error {
	for _, m := range s.members {
		var acked, kept []string
		var rejected []DeadLetter
		for i, it := range b.Items {
			if it.origin.(*redisstream.Member) != m {
				continue
			}
			switch os[i].Result {
			case Written, Duplicate, Filtered, DeadLettered:
				if acked == nil {
					acked = make([]string, 0, len(b.Items)-i)
				}
				acked = append(acked, it.ID)
			case Rejected:
				rejected = append(rejected, DeadLetter{Item: it, Deliveries: it.Deliveries, Reason: os[i].Reason})
			case Retry, Fenced:
				kept = append(kept, it.ID)
			}
		}
		if err := m.Ack(ctx, acked); err != nil {
			return err
		}
		m.Forget(kept)
		if err := s.reject(ctx, m, rejected); err != nil {
			return err
		}
	}
	return nil
}

// reject leaves entries pending, or, when they have been delivered often enough, makes dead letters of them and then
// acknowledges them.
func (s *RedisSource) reject(ctx context.Context, m *redisstream.Member, rejected []DeadLetter) error {
	if len(rejected) == 0 {
		return nil
	}
	if err := s.countDeliveries(ctx, m, rejected); err != nil {
		return err
	}
	var dead []DeadLetter
	var deadIDs, kept []string
	for _, r := range rejected {
		if s.letters != nil && s.errors.Policy == config.PolicyDeadLetter && r.Deliveries >= s.errors.MaxDeliveries {
			dead = append(dead, r)
			deadIDs = append(deadIDs, r.Item.ID)
		} else {
			kept = append(kept, r.Item.ID)
		}
	}
	if len(dead) > 0 {
		if err := s.letters.Put(ctx, dead); err != nil {
			return err
		}
		if err := m.Ack(ctx, deadIDs); err != nil {
			return err
		}
		s.metrics.deadLetters.Add(float64(len(dead)))
		s.log.Warn("entries became dead letters", "stream", m.Config().Stream, "n", len(dead),
			"deliveries", s.errors.MaxDeliveries, "reason", dead[0].Reason)
	}
	m.Forget(kept)
	return nil
}

// countDeliveries asks Redis for the counts that did not come with the entries.
func (s *RedisSource) countDeliveries(ctx context.Context, m *redisstream.Member, rejected []DeadLetter) error {
	var unknown []string
	for _, r := range rejected {
		if r.Deliveries == 0 {
			unknown = append(unknown, r.Item.ID)
		}
	}
	counts, err := m.Deliveries(ctx, unknown)
	if err != nil {
		return err
	}
	for i := range rejected {
		if rejected[i].Deliveries == 0 {
			rejected[i].Deliveries, counts = counts[0], counts[1:]
		}
	}
	return nil
}

// CountDeliveries fills in the counts that did not come with the entries.
func (s *RedisSource) CountDeliveries(ctx context.Context, items []*Item) error {
	for _, m := range s.members {
		var ids []string
		var of []*Item
		for _, it := range items {
			if it.Deliveries == 0 && it.origin.(*redisstream.Member) == m {
				ids, of = append(ids, it.ID), append(of, it)
			}
		}
		counts, err := m.Deliveries(ctx, ids)
		if err != nil {
			return err
		}
		for i, n := range counts {
			of[i].Deliveries = n
		}
	}
	return nil
}

// Run implements Source: it shows that held entries are being worked on, removes consumers of members long gone, and
// keeps the figures up to date.
func (s *RedisSource) Run(ctx context.Context) error {
	reclaim := s.members[0].Config().ReclaimAfter
	refresh := time.NewTicker(max(reclaim/3, 10*time.Millisecond))
	defer refresh.Stop()
	progress := time.NewTicker(progressInterval)
	defer progress.Stop()
	stale := time.NewTicker(staleInterval)
	defer stale.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-refresh.C:
			err = s.each(ctx, (*redisstream.Member).Refresh)
		case <-stale.C:
			err = s.each(ctx, (*redisstream.Member).RemoveStale)
		case <-progress.C:
			err = s.each(ctx, s.observe)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Debug("upkeep of the Redis source failed; trying again", "error", err)
		}
	}
}

// each does the same for every member and returns the first error.
func (s *RedisSource) each(ctx context.Context, do func(*redisstream.Member, context.Context) error) error {
	var first error
	for _, m := range s.members {
		if err := do(m, ctx); err != nil && first == nil {
			first = err
		}
	}
	return first
}

func (s *RedisSource) observe(m *redisstream.Member, ctx context.Context) error {
	stream := m.Config().Stream
	c := m.Counters()
	s.metrics.reclaimed.WithLabelValues(stream).Set(float64(c.Reclaimed))
	s.metrics.trimmed.WithLabelValues(stream).Set(float64(c.Trimmed))
	s.metrics.stolen.WithLabelValues(stream).Set(float64(c.Stolen))
	p, err := m.Progress(ctx)
	if err != nil {
		return err
	}
	s.metrics.lag.WithLabelValues(stream).Set(float64(p.Lag))
	s.metrics.pending.WithLabelValues(stream).Set(float64(p.Pending))
	s.metrics.oldest.WithLabelValues(stream).Set(p.OldestPending.Seconds())
	return nil
}

// Release implements Source.
func (s *RedisSource) Release(ctx context.Context) error {
	total := 0
	err := s.each(ctx, func(m *redisstream.Member, ctx context.Context) error {
		n, err := m.Release(ctx)
		total += n
		return err
	})
	s.metrics.released.Add(float64(total))
	if total > 0 {
		s.log.Info("entries given back", "n", total)
	}
	return err
}
