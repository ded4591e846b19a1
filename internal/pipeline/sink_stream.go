package pipeline

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// StreamSink publishes to Millrace streams of one database.
//
// Messages of one key are published by one writer, in the order of the source, so their positions are in that order. From a
// consumer group of the same database every message is published exactly once: its ack is in the transaction that
// publishes. Otherwise an item that comes again is published again, unless the stream has a dedupe window: then the message
// has a dedupe key made of what identifies the item in its source, and is published once within the window.
type StreamSink struct {
	pool   *pgxpool.Pool
	name   string // of the processor
	maker  *messageMaker
	source TxSource // settles in the sink's transactions; nil when it is elsewhere
	seed   maphash.Seed

	mu      sync.Mutex
	targets map[string]*target // by stream
}

// target is a stream that the sink publishes to.
type target struct {
	publisher *pgstream.Publisher
	payloads  pgstream.PayloadType
	dedupes   bool // the stream has a dedupe window
	readAt    time.Time
}

// minCopied is the number of messages from which COPY pays: it knows no dedupe keys and takes a round trip more.
const minCopied = 50

// targetAge is how long the settings of a stream are taken for granted.
const targetAge = 10 * time.Second

// NewStreamSink compiles the expressions, checks that the stream exists, and returns a sink. Its errors are of class ClassConfiguration when a person
// has to act.
func NewStreamSink(ctx context.Context, pool *pgxpool.Pool, c *config.Config) (*StreamSink, error) {
	maker, err := newMessageMaker(c)
	if err != nil {
		return nil, err
	}
	s := &StreamSink{pool: pool, name: c.Name, maker: maker, seed: maphash.MakeSeed(), targets: map[string]*target{}}
	if err := schema.Check(ctx, pool); err != nil {
		return nil, err
	}
	if maker.route == nil {
		if _, err := s.target(ctx, pool, maker.stream); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// SettleWith implements SettlingSink.
func (s *StreamSink) SettleWith(source TxSource) { s.source = source }

// Shard implements Sharder: the messages of a key have one writer.
func (s *StreamSink) Shard(it *Item) uint64 {
	if s.maker.key != nil {
		if key, err := s.maker.keyOf(it, it.Variables(s.maker.columns)); err == nil && key != nil {
			return maphash.String(s.seed, *key)
		}
	}
	return maphash.String(s.seed, it.ID)
}

// Write implements Sink.
func (s *StreamSink) Write(ctx context.Context, b *Batch) ([]Outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	return settledWrite(ctx, conn.Conn(), s.source, b, func(tx pgx.Tx) ([]Outcome, error) { return s.WriteTx(ctx, tx, b) })
}

// message is one item on its way into its stream.
type message struct {
	pgstream.NewMessage
	item   *Item
	stream string
}

// WriteTx implements TxSink. What an expression cannot be evaluated for is Rejected, and so is what is routed to a stream that
// does not exist.
func (s *StreamSink) WriteTx(ctx context.Context, tx pgx.Tx, b *Batch) ([]Outcome, error) {
	os := make([]Outcome, len(b.Items))
	messages := make([]message, 0, len(b.Items))
	for i, it := range b.Items {
		m, why, err := s.message(ctx, tx, it)
		if err != nil {
			return nil, err
		}
		if why == nil {
			messages = append(messages, m)
			continue
		}
		os[i] = Outcome{Result: Rejected, Reason: clip(why.Error())}
		if b.InOrder {
			copy(os[i+1:], outcomes(len(os)-i-1, Outcome{Result: Retry, Reason: "an item before it was rejected"}))
			break
		}
	}
	// By stream, so that writers that publish to several streams lock their dedupe keys in one order.
	slices.SortStableFunc(messages, func(a, b message) int { return cmp.Compare(a.stream, b.stream) })
	for len(messages) > 0 {
		n := 1
		for n < len(messages) && messages[n].stream == messages[0].stream {
			n++
		}
		if err := s.publish(ctx, tx, messages[:n]); err != nil {
			return nil, err
		}
		messages = messages[n:]
	}
	return os, nil
}

// message makes a message of an item. why says what is wrong with the item.
func (s *StreamSink) message(ctx context.Context, tx pgx.Tx, it *Item) (m message, why, err error) {
	vars := it.Variables(s.maker.columns)
	stream, why := s.maker.streamOf(vars)
	if why != nil {
		return m, why, nil
	}
	t, err := s.target(ctx, tx, stream)
	if errors.Is(err, pgstream.ErrNotFound) && s.maker.route != nil {
		return m, fmt.Errorf("route: stream %s does not exist", short(stream)), nil
	}
	if err != nil {
		return m, nil, err
	}
	m.item, m.stream = it, stream
	if m.NewMessage, why = s.maker.message(it, vars, t.payloads); why == nil {
		m.Headers = handOnTrace(m.Headers, it, &s.maker.codec)
	}
	return m, why, nil
}

// publish publishes messages of one stream.
func (s *StreamSink) publish(ctx context.Context, tx pgx.Tx, messages []message) error {
	stream := messages[0].stream
	t, err := s.target(ctx, tx, stream)
	if err != nil {
		return err
	}
	ms := make([]pgstream.NewMessage, len(messages))
	dedupe := s.source == nil && t.dedupes
	for i, m := range messages {
		if ms[i] = m.NewMessage; dedupe {
			ms[i].DedupeKey = identity(s.name, m.item)
		}
	}
	if !dedupe && len(ms) >= minCopied {
		err = t.publisher.Copy(ctx, tx, ms)
	} else {
		_, err = t.publisher.PublishBatch(ctx, tx, ms)
	}
	switch {
	case errors.Is(err, pgstream.ErrNotFound):
		s.forgetTarget(stream)
	case errors.Is(err, pgstream.ErrRefused) && time.Since(t.readAt) > time.Second:
		// Perhaps the stream has been changed, and the messages are not to blame: look at it again before they are.
		s.forgetTarget(stream)
		return errors.New(err.Error()) // transient
	}
	return err
}

// target returns what the sink has to know of a stream.
func (s *StreamSink) target(ctx context.Context, db pgstream.DB, stream string) (*target, error) {
	s.mu.Lock()
	t := s.targets[stream]
	s.mu.Unlock()
	if t != nil && time.Since(t.readAt) < targetAge {
		return t, nil
	}
	t = &target{readAt: time.Now()}
	var err error
	if t.publisher, err = pgstream.NewPublisher(ctx, db, stream); err != nil {
		return nil, err
	}
	err = db.QueryRow(ctx, "select payload_type, dedupe_window_seconds > 0 from millrace_engine.stream where name = $1", stream).
		Scan(&t.payloads, &t.dedupes)
	if err != nil {
		return nil, fmt.Errorf("read the settings of stream %q: %w", stream, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.targets[stream] = t
	return t, nil
}

func (s *StreamSink) forgetTarget(stream string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.targets, stream)
}

// identity is a text that only this item has, under that name, and has again when it comes again. The content is part of it,
// because a Redis that lost its data starts ids over.
func identity(name string, it *Item) string {
	h := sha256.New()
	var size [8]byte
	add := func(text string) {
		binary.BigEndian.PutUint64(size[:], uint64(len(text)))
		h.Write(size[:])
		h.Write([]byte(text))
	}
	add(name)
	add(it.Stream)
	add(it.ID)
	add(it.Payload)
	for _, f := range it.Fields {
		add(f.Field)
		add(f.Value)
	}
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}
