package client

import (
	"context"
	"fmt"
	"iter"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// FrameMode says what becomes of a frame.
type FrameMode string

// Modes of frames.
const (
	// Durable is a message of the stream.
	Durable FrameMode = "Durable"
	// DurableSummary is one whose payload is a merge patch (RFC 7396) to the key's summary.
	DurableSummary FrameMode = "DurableSummary"
	// BestEffortLive is for whoever looks now. A crash of the server forgets it.
	BestEffortLive FrameMode = "BestEffortLive"
)

// NewFrame is a frame to append.
type NewFrame struct {
	Mode          FrameMode // default Durable
	Type          string    // such as stdout, token or progress; default event
	CorrelationID string    // optional
	Fields        Headers   // nil: none
	Payload       []byte    // JSON text or raw bytes, by the stream's payload type
}

// AppendedFrame is what an append tells.
type AppendedFrame struct {
	ID             string // <ms>-<number>, greater than that of every frame of the key before it
	Count          int64  // frames that the key has had, of any mode, since retention last left nothing of it
	SummaryVersion int64  // of the summary, after a DurableSummary; else 0
	Position       int64  // in the stream; 0 of a BestEffortLive
}

// Frame is one frame of a key.
type Frame struct {
	ID            string
	Mode          FrameMode
	Type          string
	CorrelationID string
	Fields        Headers
	Payload       []byte
	Count         int64 // of the key up to this one: a gap is frames that were removed
	Position      int64 // 0 of a BestEffortLive
	CreatedAt     time.Time
}

// Summary is the rolling document of a key.
type Summary struct {
	Document  []byte // JSON
	Version   int64  // how many patches have made it
	PatchKind string // json-merge-patch
	FirstAt   time.Time
	LastAt    time.Time
}

// AppendFrame appends a frame to a key of a stream with frames. A transaction that it takes part in must be READ COMMITTED, and keeps others from appending to the key until
// it ends. ErrRefused when the stream takes no frames, or a value is not possible.
func (s Session) AppendFrame(ctx context.Context, stream, key string, f NewFrame) (AppendedFrame, error) {
	fields, err := writeHeaders(f.Fields, traceContext{})
	if err != nil {
		return AppendedFrame{}, err
	}
	ctx, cancel := s.c.limit(ctx)
	defer cancel()
	p, err := s.c.publisher(ctx, s.db, stream)
	if err != nil {
		return AppendedFrame{}, err
	}
	appendFrame := pgstream.AppendFrame
	if p.PayloadType() == pgstream.PayloadBytes {
		appendFrame = pgstream.AppendFrameBytes
	}
	a, err := appendFrame(ctx, s.db, stream, key, pgstream.NewFrame{
		Mode: pgstream.FrameMode(f.Mode), Type: f.Type, CorrelationID: f.CorrelationID, Fields: fields, Payload: f.Payload,
	})
	s.c.forget(stream, err)
	return AppendedFrame(a), err
}

// FrameRange says which frames to read. Its zero value: the first 1000.
type FrameRange struct {
	From        string // a cursor: "-" for the start (the default), an id, or milliseconds; included
	To          string // a cursor: "+" for the end (the default), an id, or milliseconds; included
	Max         int    // 1 to 10000; default 1000
	DurableOnly bool   // without best-effort frames
}

// ReadFrames reads a range of a key's frames, the oldest first. ErrRefused for what is no cursor.
func (s Session) ReadFrames(ctx context.Context, stream, key string, r FrameRange) ([]Frame, error) {
	ctx, cancel := s.c.limit(ctx)
	defer cancel()
	found, err := pgstream.ReadFrames(ctx, s.db, stream, key, pgstream.FrameRange(r))
	if err != nil {
		return nil, err
	}
	frames := make([]Frame, len(found))
	for i := range found {
		if frames[i], err = frameOf(&found[i]); err != nil {
			return nil, err
		}
	}
	return frames, nil
}

// ReadSummary reads the rolling document of a key; nil when there is none.
func (s Session) ReadSummary(ctx context.Context, stream, key string) (*Summary, error) {
	ctx, cancel := s.c.limit(ctx)
	defer cancel()
	found, err := pgstream.ReadSummary(ctx, s.db, stream, key)
	if err != nil || found == nil {
		return nil, err
	}
	summary := Summary(*found)
	return &summary, nil
}

// TailOptions of TailFrames.
type TailOptions struct {
	DurableOnly bool // without best-effort frames
}

// TailFrames returns the frames of a key behind the one with an id, or with "0" from the first that is left, and waits for more until ctx ends, whose error is then the last. No
// connection is held while it waits. Errors that IsTransient do not end it: they are logged, and it goes on where it was.
func (c *Client) TailFrames(ctx context.Context, stream, key, after string, o TailOptions) iter.Seq2[Frame, error] {
	return func(yield func(Frame, error) bool) {
		listener, done, err := c.listen()
		if err != nil {
			yield(Frame{}, err)
			return
		}
		defer done()
		call, cancel := c.limit(ctx)
		tail, err := pgstream.TailFrames(call, c.pool, stream, key, after, pgstream.TailOptions{
			Listener: listener, DurableOnly: o.DurableOnly, Poll: c.o.PollInterval, CallTimeout: c.callTimeout(),
		})
		cancel()
		if err != nil {
			yield(Frame{}, err)
			return
		}
		trouble := trouble{log: c.log.With("stream", stream)}
		for {
			read := tail.Next
			if trouble.delay > 0 {
				read = tail.TryNext // so that the end of the trouble is told without a frame
			}
			page, err := read(ctx, readPage)
			if err != nil && ctx.Err() == nil && IsTransient(err) {
				trouble.pause(ctx, "reading frames failed; trying again", err)
				continue
			}
			if ctx.Err() != nil && err != nil {
				err = ctx.Err()
			}
			trouble.over("reading frames again")
			if err != nil {
				yield(Frame{}, err)
				return
			}
			for i := range page {
				f, err := frameOf(&page[i])
				if !yield(f, err) || err != nil {
					return
				}
			}
		}
	}
}

func frameOf(f *pgstream.Frame) (Frame, error) {
	fields, err := readHeaders(f.Fields)
	if err != nil {
		err = fmt.Errorf("the fields of frame %s: %w", f.ID, err)
	}
	return Frame{ID: f.ID, Mode: FrameMode(f.Mode), Type: f.Type, CorrelationID: f.CorrelationID, Fields: fields, Payload: f.Payload, Count: f.Count,
		Position: f.Position, CreatedAt: f.CreatedAt}, err
}
