package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Timing of a StreamSource.
const (
	extendTick = 500 * time.Millisecond // how often claims are looked at; each is extended after a third of its lease
	minLease   = time.Second
	// orderedPoll is how often a member with open claims looks for messages of its other partitions.
	orderedPoll = 50 * time.Millisecond
)

// StreamSource reads a Millrace stream as a member of a consumer group. It is a TxSource: a sink in the same database
// commits its rows and the ack as one.
//
// A claim travels as one batch where it can, because settling it whole is one cheap row. In an Ordered group it always
// does: when one of its messages fails, those after it are not written, and the group delivers them again in order.
type StreamSource struct {
	pool     *pgxpool.Pool
	consumer *pgstream.Consumer
	listener *pgstream.Listener
	stream   string
	group    string
	ordered  bool
	errors   config.Errors
	max      int
	failed   bool // the last Next returned an error; only Next uses it
	// byPosition: rows of the sink are told apart by @position, which only messages of one priority are.
	byPosition bool
	priorities map[string]int // by the group in a claim's token: each priority has its own; only Next uses it
	metrics    *Metrics
	log        *slog.Logger
	settled    chan struct{} // holds a value when a claim was settled since Next last looked

	mu    sync.Mutex
	open  map[*claim]struct{}
	skew  time.Duration // the database's clock minus ours
	known bool          // skew has been measured
}

// claim is what the source remembers of one claim until all of it is settled.
type claim struct {
	token string
	total int
	lease time.Duration

	left   int       // not yet settled; guarded by StreamSource.mu
	due    time.Time // next extension; guarded by StreamSource.mu
	fenced bool      // guarded by StreamSource.mu
}

// NewStreamSource joins the group as the given member. What an earlier process of that name held goes back to the group
// at once. listenURL reaches the database directly, for notifications; empty means the pool's own address.
func NewStreamSource(ctx context.Context, pool *pgxpool.Pool, listen *pgx.ConnConfig, member string, c *config.Config, metrics *Metrics, log *slog.Logger) (*StreamSource, error) {
	g := c.Source.ConsumerGroup
	s := &StreamSource{
		pool: pool, listener: pgstream.NewListener(listen), stream: g.Stream, group: g.Group,
		ordered: g.Mode == config.ModeOrdered, errors: c.Errors, max: min(c.Batch.MaxRows, 10_000),
		metrics: metrics, log: log, open: map[*claim]struct{}{}, settled: make(chan struct{}, 1),
		byPosition: c.KeyedByPosition(), priorities: map[string]int{},
	}
	err := schema.Check(ctx, pool)
	if err != nil {
		return nil, err
	}
	s.consumer, err = pgstream.NewConsumer(ctx, pool, pgstream.ConsumerConfig{
		Stream: g.Stream, Group: g.Group, Member: member, MaxMessages: s.max, Listener: s.listener,
	})
	if errors.Is(err, pgstream.ErrNotFound) {
		return nil, fmt.Errorf("%w; create it with a ConsumerGroup resource or with millrace.create_group, or correct source.consumerGroup", err)
	}
	if err != nil {
		return nil, err
	}
	if err := s.consumer.Leave(ctx); err != nil {
		return nil, err
	}
	s.listener.Report = func(err error) {
		log.Warn("notifications do not arrive; messages are found by polling", "error", reason(err))
	}
	log.Info(fmt.Sprintf("consumer started on stream %s group %s consumer %s", g.Stream, g.Group, member))
	return s, nil
}

// Readers implements Source.
func (s *StreamSource) Readers() []Reader { return []Reader{s} }

// Name implements Reader.
func (s *StreamSource) Name() string { return s.stream }

// Next implements Reader. It may return more than max: a claim is not divided. After an error it does not wait for
// messages, so that the pipeline learns that the database is back even when there are none.
func (s *StreamSource) Next(ctx context.Context, _ int) (*Batch, error) {
	received, err := s.receive(ctx)
	s.failed = err != nil
	if err != nil {
		return nil, err
	}
	if received == nil {
		return &Batch{}, nil
	}
	prefix, err := s.identify(ctx, received.Token)
	if err != nil {
		s.failed = true
		// When this fails too, the claim ends with its lease.
		return nil, errors.Join(err, s.consumer.Release(ctx, received.Token))
	}
	now := time.Now()
	c := &claim{token: received.Token, total: len(received.Messages), left: len(received.Messages)}
	s.hold(ctx, c, received.ExpiresAt, now)
	slab := make([]Item, c.total)
	b := &Batch{Items: make([]*Item, c.total), More: c.total == s.max, Together: true, InOrder: s.ordered}
	for i := range received.Messages {
		m, it := &received.Messages[i], &slab[i]
		it.ID, it.Position, it.Key = prefix+strconv.FormatInt(m.Position, 10), m.Position, m.Key
		it.Payload, it.Created, it.Deliveries = asString(m.Payload), m.CreatedAt, m.Attempt
		it.Headers = m.Headers
		it.Stream, it.Received, it.origin = s.stream, now, c
		it.size = itemOverhead + len(m.Payload) + len(m.Headers)
		b.Items[i] = it
	}
	return b, nil
}

// identify returns what makes ids of positions: nothing for priority 0, and "p1-" for priority 1, since each priority counts positions of its own. It
// fails when the sink's key would take two messages with one position for the same.
func (s *StreamSource) identify(ctx context.Context, token string) (prefix string, err error) {
	group, _, _ := strings.Cut(token, ".")
	priority, ok := s.priorities[group]
	if !ok {
		// Through JSON, because the previous release has no such column.
		if err := s.pool.QueryRow(ctx, `select coalesce((to_jsonb(s) ->> 'priority')::integer, 0) from millrace_engine.consumer_group g
			join millrace_engine.stream s on s.id = g.stream_id where g.id = $1::text::integer`, group).Scan(&priority); err != nil {
			return "", fmt.Errorf("find the priority of a claim: %w", err)
		}
		s.priorities[group] = priority
	}
	if priority == 0 {
		return "", nil
	}
	if s.byPosition {
		return "", NewConfigurationError("stream %q has priorities, and messages of two priorities may have the same position: "+
			"map @id, which tells them apart, into a column of sink.table.key", s.stream)
	}
	return fmt.Sprintf("p%d-", priority), nil
}

// receive gets the next claim. In an Ordered group a partition hands out nothing while a claim of it is open, and no
// notification tells that our own settling has opened it again; so while this member has open claims, it looks again
// whenever it has settled one.
func (s *StreamSource) receive(ctx context.Context) (*pgstream.Claim, error) {
	if s.failed {
		return s.consumer.TryReceive(ctx)
	}
	if !s.ordered || s.openClaims() == 0 {
		return s.consumer.Receive(ctx)
	}
	received, err := s.consumer.TryReceive(ctx)
	if err != nil || received != nil {
		return received, err
	}
	look := time.NewTimer(orderedPoll)
	defer look.Stop()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-s.settled:
	case <-look.C: // messages for the partitions that have no open claim
	}
	return nil, nil
}

func (s *StreamSource) openClaims() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

// hold starts keeping a claim. Its lease is in the database's time, so it is compared with the database's clock.
func (s *StreamSource) hold(ctx context.Context, c *claim, ends, now time.Time) {
	s.mu.Lock()
	known, skew := s.known, s.skew
	s.mu.Unlock()
	if !known {
		var there time.Time
		if err := s.pool.QueryRow(ctx, "select clock_timestamp()").Scan(&there); err == nil {
			known, skew = true, time.Until(there)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known, s.skew = known, skew
	c.lease = max(ends.Sub(now.Add(skew)), minLease)
	c.due = now.Add(c.lease / 3)
	s.open[c] = struct{}{}
}

// Run implements Source: it listens for notifications, takes turns as the database's scout, and extends claims that take long. A pipeline that drains leaves the
// scout's place to others at once, and then needs no notifications any more.
func (s *StreamSource) Run(ctx, reading context.Context) error {
	var beside sync.WaitGroup
	scouting, leave := context.WithCancel(ctx)
	defer context.AfterFunc(reading, leave)()
	defer leave()
	listening, hangUp := context.WithCancel(ctx)
	beside.Go(func() { _ = s.listener.Run(listening) })
	beside.Go(func() {
		defer hangUp()
		pgstream.RunScout(scouting, s.pool, pgstream.ScoutConfig{}, s.scouted)
	})
	defer beside.Wait()
	extend := time.NewTicker(extendTick)
	defer extend.Stop()
	progress := time.NewTicker(progressInterval)
	defer progress.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-extend.C:
			err = s.extend(ctx)
		case <-progress.C:
			err = s.observe(ctx)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Debug("upkeep of the stream source failed; trying again", "error", reason(err))
		}
	}
}

// scouted logs what the scout reports.
func (s *StreamSource) scouted(err error) {
	var z *pgstream.Zombie
	if errors.As(err, &z) {
		s.log.Warn("a transaction kept messages from others", "stream", z.Stream, "group", z.Group, "ended", z.Ended, "cause", z.Error())
		return
	}
	s.log.Warn("the scout failed; trying again", "error", reason(err))
}

// extend prolongs the claims that have used a third of their lease.
func (s *StreamSource) extend(ctx context.Context) error {
	now := time.Now()
	var due []*claim
	s.mu.Lock()
	for c := range s.open {
		if !c.fenced && now.After(c.due) {
			due = append(due, c)
		}
	}
	s.mu.Unlock()
	for _, c := range due {
		call, cancel := context.WithTimeout(ctx, c.lease)
		_, err := s.consumer.Extend(call, c.token, c.lease)
		cancel()
		if errors.Is(err, pgstream.ErrFenced) {
			s.mu.Lock()
			c.fenced = true // its items find out when they are settled
			s.mu.Unlock()
			continue
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		c.due = time.Now().Add(c.lease / 3)
		s.mu.Unlock()
	}
	return nil
}

func (s *StreamSource) observe(ctx context.Context) error {
	call, cancel := context.WithTimeout(ctx, progressInterval)
	defer cancel()
	all, err := pgstream.Stats(call, s.pool)
	if err != nil {
		s.metrics.lag.WithLabelValues(s.stream).Set(-1) // not known, and not what it was
		return err
	}
	for _, g := range all {
		if g.Stream == s.stream && g.Group == s.group {
			s.metrics.lag.WithLabelValues(s.stream).Set(float64(g.Lag))
			s.metrics.pending.WithLabelValues(s.stream).Set(float64(g.InFlight + g.Retrying))
			s.metrics.oldest.WithLabelValues(s.stream).Set(g.OldestAge.Seconds())
		}
	}
	return nil
}

// share is the part of a batch that belongs to one claim.
type share struct {
	claim    *claim
	items    []*Item
	done     []int64 // to be acknowledged
	retried  []int64
	fenced   int
	rejected []*Item
	reasons  []string
}

// shares sorts a batch by claim. A batch holds few claims, so a list is enough.
func shares(b *Batch, os []Outcome) []*share {
	var all []*share
	var last *share
	for i, it := range b.Items {
		c := it.origin.(*claim)
		if last == nil || last.claim != c {
			last = nil
			for _, sh := range all {
				if sh.claim == c {
					last = sh
				}
			}
			if last == nil {
				last = &share{claim: c}
				all = append(all, last)
			}
		}
		last.items = append(last.items, it)
		switch os[i].Result {
		case Written, Duplicate, Filtered, DeadLettered:
			last.done = append(last.done, it.Position)
		case Retry:
			last.retried = append(last.retried, it.Position)
		case Fenced:
			last.fenced++
		case Rejected:
			last.rejected = append(last.rejected, it)
			last.reasons = append(last.reasons, os[i].Reason)
		}
	}
	return all
}

// SettleTx implements TxSource.
func (s *StreamSource) SettleTx(ctx context.Context, tx pgx.Tx, b *Batch, os []Outcome) error {
	for _, sh := range shares(b, os) {
		if len(sh.done) == 0 {
			continue
		}
		var err error
		switch {
		case len(sh.done) == sh.claim.total:
			err = s.consumer.AckTx(ctx, tx, sh.claim.token)
		default:
			err = s.consumer.AckMessagesTx(ctx, tx, sh.claim.token, sh.done)
		}
		if errors.Is(err, pgstream.ErrFenced) {
			s.fence(sh)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fence marks the items of a claim that has ended.
func (s *StreamSource) fence(sh *share) {
	s.mu.Lock()
	sh.claim.fenced = true
	s.mu.Unlock()
	for _, it := range sh.items {
		it.Fenced = true
	}
}

// Settle implements Source. It keeps what it has done already in mind, so repeating it after an error is harmless.
func (s *StreamSource) Settle(ctx context.Context, b *Batch, os []Outcome) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	for _, sh := range shares(b, os) {
		err := s.settle(ctx, sh, b.Settled)
		if errors.Is(err, pgstream.ErrFenced) {
			// The claim has ended, so its messages will come again, to this member or another. Their rows are found by key.
			err = nil
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		if sh.claim.left -= len(sh.items); sh.claim.left <= 0 {
			delete(s.open, sh.claim)
			select {
			case s.settled <- struct{}{}:
			default:
			}
		}
		s.mu.Unlock()
	}
	return nil
}

func (s *StreamSource) settle(ctx context.Context, sh *share, acked bool) error {
	token := sh.claim.token
	if len(sh.done) > 0 && !acked {
		var err error
		if len(sh.done) == sh.claim.total {
			err = s.consumer.Ack(ctx, token)
		} else {
			err = s.consumer.AckMessages(ctx, token, sh.done)
		}
		if err != nil {
			return err
		}
	}
	if err := s.reject(ctx, sh); err != nil {
		return err
	}
	if sh.fenced > 0 {
		// The claim has ended, or its commit is in doubt. Then it is given up: the group delivers again what is not settled
		// once no transaction holds the claim any more, so the ledger decides what has happened, and not we.
		return s.consumer.Release(ctx, token)
	}
	if len(sh.retried) == 0 {
		return nil
	}
	if s.ordered || len(sh.retried) == sh.claim.total {
		return s.consumer.Release(ctx, token) // counts no attempt
	}
	return s.consumer.Nack(ctx, token, sh.retried, -1, "given back by the processor")
}

// reject sets messages aside that have been delivered often enough, and gives the others back for the group's backoff.
func (s *StreamSource) reject(ctx context.Context, sh *share) error {
	for i, it := range sh.rejected {
		at := []int64{it.Position}
		if s.errors.Policy == config.PolicyDeadLetter && it.Deliveries >= s.errors.MaxDeliveries {
			if err := s.consumer.DeadLetter(ctx, sh.claim.token, at, storable(sh.reasons[i])); err != nil {
				return err
			}
			s.metrics.deadLetters.Inc()
			s.log.Warn("message became a dead letter", "stream", s.stream, "position", it.Position, "deliveries", it.Deliveries, "reason", sh.reasons[i])
			continue
		}
		if err := s.consumer.Nack(ctx, sh.claim.token, at, -1, storable(sh.reasons[i])); err != nil {
			return err
		}
	}
	return nil
}

// Release implements Source. Leaving gives back every claim, counted as no attempt.
func (s *StreamSource) Release(ctx context.Context) error {
	s.mu.Lock()
	total := 0
	for c := range s.open {
		total += c.left
	}
	s.mu.Unlock()
	s.metrics.released.Add(float64(total))
	if total > 0 {
		s.log.Info("messages given back", "n", total)
	}
	return s.consumer.Leave(ctx)
}

// SameDatabase says whether two pools reach the same database. Connection strings say too little: hosts have aliases, and
// a pooler may stand in between. A lock taken through one is seen through the other, or it is not.
func SameDatabase(ctx context.Context, a, b *pgxpool.Pool) (bool, error) {
	if a == b {
		return true, nil
	}
	same := false
	err := pgx.BeginFunc(ctx, a, func(tx pgx.Tx) error {
		var key int64
		if err := tx.QueryRow(ctx, "select n from (select (random() * 9e18)::bigint as n) r, pg_advisory_xact_lock(n)").Scan(&key); err != nil {
			return err
		}
		var free bool
		if err := b.QueryRow(ctx, "select pg_try_advisory_xact_lock($1)", key).Scan(&free); err != nil {
			return err
		}
		same = !free
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("compare the databases of source and sink: %w", err)
	}
	return same, nil
}
