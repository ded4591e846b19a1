package pgstream_test

import (
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// frames makes a stream with frames, named runs.
func (e *engine) frames(f pgstream.Frames) {
	e.t.Helper()
	plan, err := pgstream.PlanStream(e.ctx, e.Pool, pgstream.StreamSpec{Name: "runs", Frames: f})
	must(e.t, err)
	must(e.t, pgstream.ApplyStream(e.ctx, e.Pool, plan))
}

// frame appends one and returns what the append tells.
func (e *engine) frame(db pgstream.DB, key string, mode pgstream.FrameMode, payload string) pgstream.AppendedFrame {
	e.t.Helper()
	a, err := pgstream.AppendFrame(e.ctx, db, "runs", key, pgstream.NewFrame{Mode: mode, Payload: []byte(payload)})
	must(e.t, err)
	return a
}

func (e *engine) readFrames(key string, r pgstream.FrameRange) []pgstream.Frame {
	e.t.Helper()
	frames, err := pgstream.ReadFrames(e.ctx, e.Pool, "runs", key, r)
	must(e.t, err)
	return frames
}

func TestFrames(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.DefaultFrames)
	for _, m := range []pgstream.FrameMode{pgstream.FrameDurable, pgstream.FrameDurableSummary, pgstream.FrameBestEffortLive} {
		for range 2 {
			t.Logf("%+v", e.frame(e, "a", m, `{"x": 1}`))
		}
	}
	t.Logf("%+v", e.readFrames("a", pgstream.FrameRange{}))
	s, err := pgstream.ReadSummary(e.ctx, e, "runs", "a")
	must(t, err)
	t.Logf("%+v", s)
	plan, err := pgstream.PlanStream(e.ctx, e.Pool, pgstream.StreamSpec{Name: "runs", Frames: pgstream.DefaultFrames})
	must(t, err)
	t.Logf("%+v", plan)
}
