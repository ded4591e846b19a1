package client

import (
	"context"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Publish appends one message to a stream and returns its position, 0 for a delayed one. ErrNotFound when there is no such stream, ErrRefused when the message
// or an option is not possible.
func (s Session) Publish(ctx context.Context, stream string, m NewMessage) (position int64, err error) {
	ctx, span := s.c.tracing.publishing(ctx, stream, 1, m.Key)
	defer func() { span.published(position, err) }()
	headers, err := writeHeaders(m.Headers, contextOf(ctx))
	if err != nil {
		return 0, err
	}
	ctx, cancel := s.c.limit(ctx)
	defer cancel()
	p, err := s.c.publisher(ctx, s.db, stream)
	if err == nil {
		position, err = p.Publish(ctx, s.db, m.engine(headers))
		s.c.forget(stream, err)
	}
	return position, err
}

// PublishBatch appends messages in order, in one round trip: all of them or none. It returns their positions in that order, 0 for delayed ones. Their
// options other than DedupeKey must be the same; at most 100,000 messages. Several calls in one transaction are as atomic as one.
func (s Session) PublishBatch(ctx context.Context, stream string, ms []NewMessage) (positions []int64, err error) {
	if len(ms) == 0 {
		return nil, nil
	}
	ctx, span := s.c.tracing.publishing(ctx, stream, len(ms), "")
	defer func() { span.published(0, err) }()
	with := contextOf(ctx)
	batch := make([]pgstream.NewMessage, len(ms))
	for i := range ms {
		headers, err := writeHeaders(ms[i].Headers, with)
		if err != nil {
			return nil, err
		}
		batch[i] = ms[i].engine(headers)
	}
	ctx, cancel := s.c.limit(ctx)
	defer cancel()
	p, err := s.c.publisher(ctx, s.db, stream)
	if err == nil {
		positions, err = p.PublishBatch(ctx, s.db, batch)
		s.c.forget(stream, err)
	}
	return positions, err
}
