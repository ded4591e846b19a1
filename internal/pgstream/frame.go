package pgstream

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// KeepSummaries as Frames.SummaryTTL: summaries are never removed.
const KeepSummaries time.Duration = -1

// Frames makes a stream take frames. Its zero value: none. In any other value, what is zero takes its default.
type Frames struct {
	TTL        time.Duration // for how long best-effort frames should be seen, at the rate they come; default 10s
	MinLength  int           // best-effort frames of a key that are kept at least; default 64
	MaxLength  int           // and at most; default 16384
	Alpha      float64       // weight of the newest sample in the average rate of a key's best-effort frames; default 0.2
	SummaryTTL time.Duration // how long a summary is kept after its last patch; default 168h; KeepSummaries: for ever
}

// DefaultFrames are frames with every default.
var DefaultFrames = Frames{TTL: 10 * time.Second, MinLength: 64, MaxLength: 16384, Alpha: 0.2, SummaryTTL: 7 * 24 * time.Hour}

// frameSettings is Frames as the database has it.
type frameSettings struct {
	TTL        float64 `json:"ttl_seconds"`
	MinLength  int     `json:"min_length"`
	MaxLength  int     `json:"max_length"`
	Alpha      float64 `json:"alpha"`
	SummaryTTL float64 `json:"summary_ttl_seconds"`
}

// String is how a plan shows it.
func (s frameSettings) String() string {
	return fmt.Sprintf("ttl %gs, min length %d, max length %d, alpha %g, summary ttl %gs", s.TTL, s.MinLength, s.MaxLength, s.Alpha, s.SummaryTTL)
}

func (f Frames) settings() frameSettings {
	if f == (Frames{}) {
		return frameSettings{}
	}
	return frameSettings{
		TTL:        orDefault(f.TTL, DefaultFrames.TTL).Seconds(),
		MinLength:  orDefault(f.MinLength, DefaultFrames.MinLength),
		MaxLength:  orDefault(f.MaxLength, DefaultFrames.MaxLength),
		Alpha:      orDefault(f.Alpha, DefaultFrames.Alpha),
		SummaryTTL: max(orDefault(f.SummaryTTL, DefaultFrames.SummaryTTL), 0).Seconds(),
	}
}

func (s frameSettings) frames() Frames {
	if s == (frameSettings{}) {
		return Frames{}
	}
	f := Frames{
		TTL:        seconds(s.TTL),
		MinLength:  s.MinLength,
		MaxLength:  s.MaxLength,
		Alpha:      s.Alpha,
		SummaryTTL: seconds(min(s.SummaryTTL, math.MaxInt64/1e9)),
	}
	if s.SummaryTTL == 0 {
		f.SummaryTTL = KeepSummaries
	}
	return f
}

// FrameMode says what becomes of a frame.
type FrameMode string

// Modes of frames.
const (
	// FrameDurable is a message of the stream.
	FrameDurable FrameMode = "Durable"
	// FrameDurableSummary is one whose payload is a merge patch to the key's summary.
	FrameDurableSummary FrameMode = "DurableSummary"
	// FrameBestEffortLive is for whoever looks now. A crash of the server forgets it.
	FrameBestEffortLive FrameMode = "BestEffortLive"
)

// NewFrame is a frame to append.
type NewFrame struct {
	Mode          FrameMode // default FrameDurable
	Type          string    // such as stdout, token or progress; default event
	CorrelationID string    // optional
	Fields        []byte    // JSON object or nil
	Payload       []byte    // JSON for AppendFrame, anything for AppendFrameBytes
}

// AppendedFrame is what an append tells.
type AppendedFrame struct {
	ID             string // <ms>-<number>, greater than that of every frame of the key before it
	Count          int64  // frames that the key has had, of any mode, since retention last left nothing of it
	SummaryVersion int64  // of the summary, after a FrameDurableSummary; else 0
	Position       int64  // in the stream; 0 of a FrameBestEffortLive
}

// Frame is one frame of a key.
type Frame struct {
	ID            string
	Mode          FrameMode
	Type          string
	CorrelationID string
	Fields        []byte // JSON object
	Payload       []byte
	Count         int64 // of the key up to this one: a gap is frames that were removed
	Position      int64 // 0 of a FrameBestEffortLive
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

// AppendFrame appends a frame to a key of a stream with frames and payload type JSON. With a pgx.Tx it takes part in that transaction, which must be READ COMMITTED
// and keeps others from appending to the key until it ends. ErrNotFound when the stream does not exist; ErrRefused when it has no frames or a value is not possible.
func AppendFrame(ctx context.Context, db DB, stream, key string, f NewFrame) (AppendedFrame, error) {
	return appendFrame(ctx, db, "select id, frame_count, summary_version, position from millrace.append_frame($1, $2, $3::jsonb, $4, $5, $6, $7)", stream, key, f)
}

// AppendFrameBytes is AppendFrame for streams with payload type Bytes.
func AppendFrameBytes(ctx context.Context, db DB, stream, key string, f NewFrame) (AppendedFrame, error) {
	return appendFrame(ctx, db, "select id, frame_count, summary_version, position from millrace.append_frame_bytes($1, $2, $3::bytea, $4, $5, $6, $7)", stream, key, f)
}

func appendFrame(ctx context.Context, db DB, sql, stream, key string, f NewFrame) (AppendedFrame, error) {
	var a AppendedFrame
	var correlation *string
	if f.CorrelationID != "" {
		correlation = &f.CorrelationID
	}
	var version, position *int64
	err := db.QueryRow(ctx, sql, stream, key, f.Payload, orDefault(f.Mode, FrameDurable), orDefault(f.Type, "event"), correlation, f.Fields).
		Scan(&a.ID, &a.Count, &version, &position)
	if err != nil {
		return a, fmt.Errorf("append a frame to key %q of stream %q: %w", key, stream, translate(err))
	}
	if version != nil {
		a.SummaryVersion = *version
	}
	if position != nil {
		a.Position = *position
	}
	return a, nil
}

// FrameRange says which frames to read. Its zero value: the first 1000.
type FrameRange struct {
	From        string // a cursor: "-" for the start (the default), an id, or milliseconds; included
	To          string // a cursor: "+" for the end (the default), an id, or milliseconds; included
	Max         int    // 1 to 10000; default 1000
	DurableOnly bool   // without best-effort frames
}

// ReadFrames reads a range of a key's frames, the oldest first. ErrRefused for what is no cursor.
func ReadFrames(ctx context.Context, db DB, stream, key string, r FrameRange) ([]Frame, error) {
	return readFrames(ctx, db, "select * from millrace.read_frames($1, $2, $3, $4, $5, $6)", stream, key,
		orDefault(r.From, "-"), orDefault(r.To, "+"), orDefault(r.Max, 1000), !r.DurableOnly)
}

func readFrames(ctx context.Context, db DB, sql, stream, key string, args ...any) ([]Frame, error) {
	rows, _ := db.Query(ctx, sql, append([]any{stream, key}, args...)...)
	frames, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Frame, error) {
		var f Frame
		var correlation *string
		var raw []byte
		var position *int64
		err := row.Scan(&f.ID, &f.Mode, &f.Type, &correlation, &f.Fields, &f.Payload, &raw, &f.Count, &position, &f.CreatedAt)
		if correlation != nil {
			f.CorrelationID = *correlation
		}
		if raw != nil {
			f.Payload = raw
		}
		if position != nil {
			f.Position = *position
		}
		return f, err
	})
	if err != nil {
		return nil, fmt.Errorf("read frames of key %q of stream %q: %w", key, stream, translate(err))
	}
	return frames, nil
}

// ReadSummary reads the rolling document of a key; nil when there is none.
func ReadSummary(ctx context.Context, db DB, stream, key string) (*Summary, error) {
	rows, _ := db.Query(ctx, "select document, version, patch_kind, first_at, last_at from millrace.read_summary($1, $2)", stream, key)
	found, err := pgx.CollectRows(rows, pgx.RowToAddrOfStructByPos[Summary])
	if err != nil {
		return nil, fmt.Errorf("read the summary of key %q of stream %q: %w", key, stream, translate(err))
	}
	if len(found) == 0 {
		return nil, nil
	}
	return found[0], nil
}

// TailOptions of a FrameTail.
type TailOptions struct {
	Listener    *Listener // nil: it polls
	DurableOnly bool      // without best-effort frames
	// Poll is how long to wait without a notification before looking again. Default 1s.
	Poll time.Duration
	// CallTimeout bounds every round trip, so that a server that does not answer is an error. 0: as long as ctx lets it.
	CallTimeout time.Duration
}

// FrameTail reads the frames of a key as they are appended. Its methods are for one goroutine at a time; any number of tails may share a Listener.
type FrameTail struct {
	pool        *pgxpool.Pool
	stream, key string
	after       string
	durableOnly bool
	waiter      waiter
	topic       topic
}

// TailFrames returns a tail that begins behind a frame's id, or with "0" at the first frame that is left. ErrNotFound when there is no such stream;
// ErrRefused for what is no place to begin.
func TailFrames(ctx context.Context, pool *pgxpool.Pool, stream, key, after string, opts TailOptions) (*FrameTail, error) {
	t := &FrameTail{
		pool: pool, stream: stream, key: key, after: after, durableOnly: opts.DurableOnly,
		waiter: waiter{pool: pool, listener: opts.Listener, poll: orDefault(opts.Poll, readerPoll), limit: opts.CallTimeout},
		topic:  topic{ask: "select millrace.wait_for_frames($1, $2)", args: []any{stream, key}},
	}
	// The cursor is looked at now, and not when it is first used.
	err := pool.QueryRow(ctx, "select millrace_engine.frame_topic(millrace_engine.stream_id($1), $2), exists (select from millrace.tail_frames($1, $2, $3, 1))", stream, key, after).
		Scan(&t.topic.payload, nil)
	if err != nil {
		return nil, fmt.Errorf("tail frames of key %q of stream %q: %w", key, stream, translate(err))
	}
	return t, nil
}

// Cursor is the id of the last frame that was returned. Whoever stores it goes on there with a new tail.
func (t *FrameTail) Cursor() string { return t.after }

// Next returns up to maximum frames behind Cursor, the oldest first, and moves there. It waits until there is at least one, or ctx ends; no connection is held
// while it waits.
func (t *FrameTail) Next(ctx context.Context, maximum int) ([]Frame, error) {
	var frames []Frame
	err := t.waiter.until(ctx, func() topic { return t.topic }, func() (bool, error) {
		var err error
		frames, err = t.TryNext(ctx, maximum)
		return len(frames) > 0, err
	})
	return frames, err
}

// TryNext is Next without waiting: no frame when there is none now.
func (t *FrameTail) TryNext(ctx context.Context, maximum int) ([]Frame, error) {
	ctx, cancel := limited(ctx, t.waiter.limit)
	defer cancel()
	frames, err := readFrames(ctx, t.pool, "select * from millrace.tail_frames($1, $2, $3, $4, $5)", t.stream, t.key, t.after, maximum, !t.durableOnly)
	if len(frames) > 0 {
		t.after = frames[len(frames)-1].ID
	}
	return frames, err
}
