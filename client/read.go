package client

import (
	"context"
	"iter"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Where reading begins, beside a position.
const (
	First int64 = pgstream.ReadFirst // at the first message that is left
	Next  int64 = pgstream.ReadNext  // at the next message that is published
)

// readPage is how many messages one round trip reads.
const readPage = 500

// Read returns the messages of a stream from a position on, in order, up to those that are there now. No group is needed, and nothing is claimed. An error ends it;
// ErrOutOfRange when messages that were to be read have been removed.
//
// Of a stream with priorities it reads the lowest; the others are read as "<name>.p1" and so on.
func (c *Client) Read(ctx context.Context, stream string, from int64) iter.Seq2[Message, error] {
	return func(yield func(Message, error) bool) {
		r, err := c.reader(ctx, stream, from, nil)
		if err != nil {
			yield(Message{}, err)
			return
		}
		for {
			page, err := r.TryNext(ctx, readPage)
			if !yieldPage(page, err, yield) || len(page) < readPage {
				return
			}
		}
	}
}

// Tail returns the messages of a stream from a position on, in order, and waits for more until ctx ends, whose error is then the last. No connection is held while it
// waits. Errors that IsTransient do not end it: they are logged, and it goes on where it was. Otherwise as Read.
func (c *Client) Tail(ctx context.Context, stream string, from int64) iter.Seq2[Message, error] {
	return func(yield func(Message, error) bool) {
		listener, done, err := c.listen()
		if err != nil {
			yield(Message{}, err)
			return
		}
		defer done()
		r, err := c.reader(ctx, stream, from, listener)
		if err != nil {
			yield(Message{}, err)
			return
		}
		trouble := trouble{log: c.log.With("stream", stream)}
		for {
			read := r.Next
			if trouble.delay > 0 {
				read = r.TryNext // so that the end of the trouble is told without a message
			}
			page, err := read(ctx, readPage)
			if err != nil && ctx.Err() == nil && IsTransient(err) {
				trouble.pause(ctx, "reading failed; trying again", err)
				continue
			}
			if ctx.Err() != nil && err != nil {
				err = ctx.Err()
			}
			trouble.over("reading again")
			if !yieldPage(page, err, yield) {
				return
			}
		}
	}
}

func (c *Client) reader(ctx context.Context, stream string, from int64, l *pgstream.Listener) (*pgstream.Reader, error) {
	call, cancel := c.limit(ctx)
	defer cancel()
	r, err := pgstream.NewReader(call, c.pool, stream, from, l)
	if err == nil {
		r.CallTimeout = c.callTimeout()
	}
	return r, err
}

// yieldPage hands messages out; false when there is nothing more to do.
func yieldPage(page []pgstream.Message, err error, yield func(Message, error) bool) bool {
	if err != nil {
		yield(Message{}, err)
		return false
	}
	for i := range page {
		m, err := messageOf(&page[i])
		if !yield(m, err) || err != nil {
			return false
		}
	}
	return true
}
