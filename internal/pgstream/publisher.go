package pgstream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

// maxBatch is how many messages millrace.publish_batch takes.
const maxBatch = 100_000

// Publisher publishes to one stream and knows its payload type and limits, so that a batch is one round trip and what the stream would refuse is
// refused before it is sent. It may be used by many goroutines. It holds no connection: each call says in which transaction it takes part.
//
// A payload is measured as it is given: for JSON, the length of the text. A stream that was dropped and created with another payload type needs
// a new Publisher.
type Publisher struct {
	stream string
	limits atomic.Pointer[limits]
}

type limits struct {
	payloadType PayloadType
	maxBytes    int
}

// NewPublisher reads what a publisher must know about the stream. ErrNotFound when there is none.
func NewPublisher(ctx context.Context, db DB, stream string) (*Publisher, error) {
	p := &Publisher{stream: stream}
	if err := p.refresh(ctx, db); err != nil {
		return nil, err
	}
	return p, nil
}

// PayloadType is what the stream's payloads are.
func (p *Publisher) PayloadType() PayloadType { return p.limits.Load().payloadType }

func (p *Publisher) refresh(ctx context.Context, db DB) error {
	var l limits
	err := db.QueryRow(ctx, "select payload_type, max_message_bytes from millrace_engine.stream where name = $1", p.stream).
		Scan(&l.payloadType, &l.maxBytes)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotFound
	}
	if err != nil {
		return publishError(p.stream, err)
	}
	p.limits.Store(&l)
	return nil
}

// Publish appends one message and returns its position, 0 for a delayed message. With a pgx.Tx it takes part in that transaction. ErrRefused says
// what to do instead.
func (p *Publisher) Publish(ctx context.Context, db DB, m NewMessage) (int64, error) {
	if err := p.check(ctx, db, []NewMessage{m}); err != nil {
		return 0, err
	}
	o := m.options()
	if o == (options{}) && m.DedupeKey == "" {
		return insert(ctx, db, p.stream, m)
	}
	var position *int64
	delay, at := o.due()
	sql := "select " + p.function("millrace.publish") + "($1, $2, $3, $4, $5, $6, $7, nullif($8, ''), $9"
	args := []any{p.stream, m.Payload, m.Key, m.Headers, delay, at, o.priority, m.DedupeKey, o.serialize}
	if o.throttle != 0 || o.nextSlot {
		sql += ", $10, $11" // the functions of the previous release have no more than those before
		args = append(args, o.slot(), o.nextSlot)
	}
	if err := db.QueryRow(ctx, sql+")", args...).Scan(&position); err != nil {
		return 0, publishError(p.stream, err)
	}
	return orZero(position), nil
}

// PublishBatch appends messages in order and returns their positions in that order, in one statement: all of them or none. A delayed message has
// position 0. Their options other than DedupeKey must be the same; at most 100,000 messages.
func (p *Publisher) PublishBatch(ctx context.Context, db DB, ms []NewMessage) ([]int64, error) {
	if len(ms) == 0 {
		return nil, nil
	}
	if len(ms) > maxBatch {
		return nil, p.refused("%d messages in one batch; at most %d are possible. Split the batch: several calls in one transaction are as atomic as one",
			len(ms), maxBatch)
	}
	if err := p.check(ctx, db, ms); err != nil {
		return nil, err
	}
	o := ms[0].options()
	if o.nextSlot {
		return nil, p.refused("the messages of a batch cannot wait for the next slot. Publish them one by one; several calls in one transaction are as atomic as one")
	}
	payloads := make([][]byte, len(ms))
	keys := make([]*string, len(ms))
	headers := make([][]byte, len(ms))
	dedupe := make([]*string, len(ms))
	withHeaders, withDedupe := false, false
	for i, m := range ms {
		if m.options() != o {
			return nil, p.refused("messages of one batch have different options. Publish them in one batch for each; several calls in one " +
				"transaction are as atomic as one")
		}
		payloads[i], keys[i], headers[i] = m.Payload, m.Key, m.Headers
		withHeaders = withHeaders || m.Headers != nil
		if m.DedupeKey != "" {
			dedupe[i], withDedupe = &ms[i].DedupeKey, true
		}
	}
	if !withHeaders {
		headers = nil
	}
	sql := "select * from " + p.function("millrace.publish_batch")
	args := []any{p.stream, payloads, keys, headers}
	if o == (options{}) && !withDedupe {
		sql += "($1, $2, $3, $4)" // the functions of the previous release have no more
	} else {
		delay, at := o.due()
		sql += "($1, $2, $3, $4, $5, $6, $7, $8, $9"
		args = append(args, delay, at, o.priority, dedupe, o.serialize)
		if o.throttle != 0 {
			sql += ", $10"
			args = append(args, o.slot())
		}
		sql += ")"
	}
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return nil, publishError(p.stream, err)
	}
	positions, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (int64, error) {
		var position *int64
		err := row.Scan(&position)
		return orZero(position), err
	})
	if err != nil {
		return nil, publishError(p.stream, err)
	}
	return positions, nil
}

// Copy appends messages in order by COPY, the fastest way. All of them or none; their positions are not returned, and options are refused.
func (p *Publisher) Copy(ctx context.Context, db Copier, ms []NewMessage) error {
	reader, _ := db.(DB)
	if err := p.check(ctx, reader, ms); err != nil {
		return err
	}
	return PublishCopy(ctx, db, p.stream, ms)
}

// check refuses what the stream would refuse. The limits are read again before a message is too large: they may have been raised.
func (p *Publisher) check(ctx context.Context, db DB, ms []NewMessage) error {
	l := p.limits.Load()
	for _, m := range ms {
		if m.Payload == nil {
			return p.refused("a payload is nil. Publish the JSON value null as []byte(\"null\"), and no bytes as []byte{}")
		}
		if m.Throttle%time.Second != 0 || m.Throttle < 0 {
			return p.refused("a message cannot be throttled to one in %s. Use whole seconds", m.Throttle)
		}
		if m.Headers != nil && !isObject(m.Headers) {
			return p.refused("headers must be a JSON object. Pass one such as {\"trace\": \"abc\"}, or nil")
		}
		if len(m.Payload) <= l.maxBytes {
			continue
		}
		if db != nil {
			if err := p.refresh(ctx, db); err != nil {
				return err
			}
			l = p.limits.Load()
		}
		if len(m.Payload) > l.maxBytes {
			return p.refused("a message of %d bytes is larger than the %d allowed. Store large payloads elsewhere and publish a reference, "+
				"or raise maxMessageBytes", len(m.Payload), l.maxBytes)
		}
	}
	return nil
}

func (p *Publisher) refused(format string, args ...any) error {
	return publishError(p.stream, fmt.Errorf("%w: "+format, append([]any{ErrRefused}, args...)...))
}

// function is the SQL function for the stream's payload type.
func (p *Publisher) function(name string) string {
	if p.limits.Load().payloadType == PayloadBytes {
		return name + "_bytes"
	}
	return name
}

func isObject(text []byte) bool {
	return bytes.HasPrefix(bytes.TrimLeft(text, " \t\r\n"), []byte("{")) && json.Valid(text)
}

func orZero[T any](p *T) T {
	if p == nil {
		var zero T
		return zero
	}
	return *p
}
