package pipeline

import (
	"context"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

//go:embed queries/dead_letter_next.sql
var deadLetterNextQuery string

//go:embed queries/dead_letter_take.sql
var deadLetterTakeQuery string

//go:embed queries/dead_letter_again.sql
var deadLetterAgainQuery string

// DeadLetterFilter says which dead letters are meant. The zero value means all of them.
type DeadLetterFilter struct {
	Stream string // empty: any
	Branch string // of a fan-out; empty: any
	Reason string // contained in the reason
	Max    int    // at most so many; 0: all
}

// DeadLetterSource gives the dead letters of a processor to its pipeline again. It is a TxSource: a sink in the same database
// writes an item and removes its dead letter in one transaction, so two redrives at once, or one that is killed, write
// nothing twice. What is refused again stays a dead letter, with its new reason. A dead letter of a branch is for this
// branch alone.
//
// It offers each dead letter that was there at the start until it is written or refused, and closes Done then.
type DeadLetterSource struct {
	pool      *pgxpool.Pool
	processor string
	table     string // the qualified name, quoted
	filter    DeadLetterFilter
	branches  []string  // whose dead letters are meant; "" stands for the whole pipeline
	started   time.Time // by the database's clock
	last      int64     // id of the newest dead letter at the start
	after     int64     // id that was offered last; only Next uses it
	log       *slog.Logger
	metrics   *Metrics

	mu       sync.Mutex
	open     map[int64]bool // offered and not settled
	again    bool           // some have come back without a verdict
	offered  int
	redriven int
	failed   int
	ended    bool
	done     chan struct{}
}

// NewDeadLetterSource returns a source of the dead letters that there are now, but for those of branches that the pipeline has
// no more. An error of class ClassConfiguration when there is no table of them, or no such branch.
func NewDeadLetterSource(ctx context.Context, pool *pgxpool.Pool, c *config.Config, filter DeadLetterFilter, metrics *Metrics, log *slog.Logger) (*DeadLetterSource, error) {
	t := deadLetterName(c)
	columns, err := tableColumns(ctx, pool, &t)
	if err != nil {
		return nil, err
	}
	if columns == nil {
		return nil, NewConfigurationError("there is no table %s.%s, so this processor has set nothing aside", t.Schema, t.Name)
	}
	s := &DeadLetterSource{
		pool: pool, processor: c.Name, table: pgx.Identifier{t.Schema, t.Name}.Sanitize(), filter: filter,
		log: log, metrics: metrics, open: map[int64]bool{}, done: make(chan struct{}),
	}
	for _, b := range c.Branches() {
		if filter.Branch == "" || filter.Branch == b.Name {
			s.branches = append(s.branches, b.Name)
		}
	}
	switch {
	case len(s.branches) == 0:
		return nil, noBranch(c, filter.Branch)
	case filter.Branch == "" && len(c.Sink.FanOut) > 0:
		s.branches = append(s.branches, "")
	}
	err = pool.QueryRow(ctx, "select coalesce(max(id), 0), clock_timestamp() from "+s.table+" where processor = $1", s.processor).Scan(&s.last, &s.started)
	if err != nil {
		return nil, fmt.Errorf("read the dead letters: %w", err)
	}
	return s, nil
}

// noBranch says which branches there are instead.
func noBranch(c *config.Config, name string) error {
	if len(c.Sink.FanOut) == 0 {
		return NewConfigurationError("the pipeline has no branch %q, because its sink is no fan-out; leave the branch out", name)
	}
	var names []string
	for _, b := range c.Sink.FanOut {
		names = append(names, b.Name)
	}
	return NewConfigurationError("the pipeline has no branch %q; write one of %s", name, strings.Join(names, ", "))
}

func (s *DeadLetterSource) query(text string) string {
	return strings.ReplaceAll(text, "TABLE", s.table)
}

// Done is closed when every dead letter has been written or refused.
func (s *DeadLetterSource) Done() <-chan struct{} { return s.done }

// Counts returns how many dead letters have been redriven, and how many were refused again.
func (s *DeadLetterSource) Counts() (redriven, failed int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.redriven, s.failed
}

// Readers implements Source.
func (s *DeadLetterSource) Readers() []Reader { return []Reader{s} }

// Name implements Reader.
func (s *DeadLetterSource) Name() string { return "dead letters" }

// Next implements Reader.
func (s *DeadLetterSource) Next(ctx context.Context, most int) (*Batch, error) {
	s.mu.Lock()
	if s.filter.Max > 0 {
		most = min(most, s.filter.Max-s.offered)
	}
	s.mu.Unlock()
	b := &Batch{}
	if most > 0 {
		var err error
		if b, err = s.read(ctx, most); err != nil {
			return nil, err
		}
	}
	if len(b.Items) > 0 {
		return b, nil
	}
	if s.exhausted() {
		sleep(ctx, time.Second) // Done ends the pipeline
		return b, nil
	}
	sleep(ctx, 10*time.Millisecond) // until what is open is settled
	return b, nil
}

// exhausted says whether every dead letter has its verdict. When some came back without one, reading begins again.
func (s *DeadLetterSource) exhausted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.open) > 0:
		return false
	case s.again:
		s.again, s.after = false, 0
		return false
	case !s.ended:
		s.ended = true
		close(s.done)
	}
	return true
}

func (s *DeadLetterSource) read(ctx context.Context, most int) (*Batch, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	optional := func(text string) *string {
		if text == "" {
			return nil
		}
		return &text
	}
	f := s.filter
	rows, err := s.pool.Query(ctx, s.query(deadLetterNextQuery), s.processor, s.after, s.last, s.started,
		optional(f.Stream), s.branches, optional(f.Reason), most)
	if err != nil {
		return nil, fmt.Errorf("read the dead letters: %w", err)
	}
	now := time.Now()
	var entry []byte
	b := &Batch{More: true}
	it := &Item{}
	var id int64
	_, err = pgx.ForEachRow(rows, []any{&id, &it.Stream, &it.ID, &it.Deliveries, &entry, &it.Branch}, func() error {
		item := *it
		if err := item.fromRaw(entry); err != nil {
			return fmt.Errorf("dead letter %d: %w", id, err)
		}
		item.Deliveries++
		item.Received, item.Redriven, item.origin = now, true, id
		item.size = itemOverhead + len(entry)
		b.Items = append(b.Items, &item)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the dead letters: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, it := range b.Items {
		s.after = it.origin.(int64)
		s.open[s.after] = true
	}
	s.offered += len(b.Items)
	return b, nil
}

// fromRaw makes of a dead letter what rawItem was called with.
func (it *Item) fromRaw(entry []byte) error {
	if len(entry) > 0 && entry[0] == '[' {
		var raw []rawField
		if err := json.Unmarshal(entry, &raw); err != nil {
			return err
		}
		it.Fields = make([]redisstream.Field, len(raw))
		for i, f := range raw {
			name, err := textOrBase64(&f.Name, f.NameBase64)
			if err != nil {
				return err
			}
			value, err := textOrBase64(f.Value, f.Base64)
			if err != nil {
				return err
			}
			it.Fields[i] = redisstream.Field{Field: name, Value: value}
		}
		if ms := redisstream.Millis(it.ID); ms > 0 {
			it.Created = time.UnixMilli(ms)
		}
		return nil
	}
	var raw rawMessage
	err := json.Unmarshal(entry, &raw)
	if err != nil {
		return err
	}
	it.Key, it.Headers, it.Position, it.Created = raw.Key, raw.Headers, raw.Position, raw.CreatedAt
	it.Payload, err = textOrBase64(raw.Payload, raw.PayloadBase64)
	return err
}

func textOrBase64(text, encoded *string) (string, error) {
	switch {
	case encoded != nil:
		data, err := base64.StdEncoding.DecodeString(*encoded)
		return string(data), err
	case text != nil:
		return *text, nil
	}
	return "", nil
}

// Run implements Source.
func (s *DeadLetterSource) Run(ctx, _ context.Context) error {
	<-ctx.Done()
	return nil
}

// SettleTx implements TxSource.
func (s *DeadLetterSource) SettleTx(ctx context.Context, tx pgx.Tx, b *Batch, os []Outcome) error {
	return s.take(ctx, tx, b, os)
}

// take removes the dead letters of what has been written. Where one is not there any more, somebody else has redriven or
// removed it: its item is fenced.
func (s *DeadLetterSource) take(ctx context.Context, db pgstream.DB, b *Batch, os []Outcome) error {
	var ids []int64
	for i, it := range b.Items {
		if os[i].Result.Acknowledge() {
			ids = append(ids, it.origin.(int64))
		}
	}
	if len(ids) == 0 {
		return nil
	}
	rows, err := db.Query(ctx, s.query(deadLetterTakeQuery), s.processor, ids)
	if err != nil {
		return fmt.Errorf("remove dead letters: %w", err)
	}
	taken, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return fmt.Errorf("remove dead letters: %w", err)
	}
	if len(taken) == len(ids) {
		return nil
	}
	there := map[int64]bool{}
	for _, id := range taken {
		there[id] = true
	}
	for i, it := range b.Items {
		if os[i].Result.Acknowledge() && !there[it.origin.(int64)] {
			it.Fenced = true
		}
	}
	return fmt.Errorf("%w: somebody else has redriven or removed %d dead letters", pgstream.ErrFenced, len(ids)-len(taken))
}

// Settle implements Source.
func (s *DeadLetterSource) Settle(ctx context.Context, b *Batch, os []Outcome) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if !b.Settled {
		// A dead letter that is gone already was written twice, at most: the sink is elsewhere.
		if err := s.take(ctx, s.pool, b, os); err != nil && Classify(err) != ClassFenced {
			return err
		}
	}
	var ids []int64
	var reasons []string
	for i, it := range b.Items {
		if os[i].Result == Rejected {
			ids, reasons = append(ids, it.origin.(int64)), append(reasons, storable(os[i].Reason))
		}
	}
	if len(ids) > 0 {
		if _, err := s.pool.Exec(ctx, s.query(deadLetterAgainQuery), s.processor, ids, reasons); err != nil {
			return fmt.Errorf("note what dead letters failed of: %w", err)
		}
		s.log.Warn("dead letters are refused again", "n", len(ids), "reason", reasons[0])
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, it := range b.Items {
		id := it.origin.(int64)
		if !s.open[id] {
			continue // settled by an attempt whose answer was lost
		}
		delete(s.open, id)
		switch {
		case os[i].Result.Acknowledge():
			s.redriven++
		case os[i].Result == Rejected:
			s.failed++
		default:
			s.again = true
			s.offered--
		}
	}
	return nil
}

// Release implements Source. What is not settled is still there.
func (s *DeadLetterSource) Release(context.Context) error { return nil }
