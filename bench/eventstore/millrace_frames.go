package eventstore

import (
	"context"
	"fmt"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

func (s *millraceStore) appendFrame(ctx context.Context, run string, mode pgstream.FrameMode, payload []byte) (pgstream.AppendedFrame, error) {
	return pgstream.AppendFrame(ctx, s.pool, frames, run, pgstream.NewFrame{Mode: mode, Payload: payload})
}

func (s *millraceStore) AppendFrame(ctx context.Context, run string, payload []byte) error {
	_, err := s.appendFrame(ctx, run, pgstream.FrameDurable, payload)
	return err
}

func (s *millraceStore) AppendLive(ctx context.Context, run string, payload []byte) error {
	_, err := s.appendFrame(ctx, run, pgstream.FrameBestEffortLive, payload)
	return err
}

func (s *millraceStore) Merge(ctx context.Context, run string, patch []byte) (int64, error) {
	a, err := s.appendFrame(ctx, run, pgstream.FrameDurableSummary, patch)
	return a.SummaryVersion, err
}

func (s *millraceStore) Summary(ctx context.Context, run string) ([]byte, int64, error) {
	summary, err := pgstream.ReadSummary(ctx, s.pool, frames, run)
	if err == nil && summary == nil {
		err = fmt.Errorf("%s has no summary", run)
	}
	if err != nil {
		return nil, 0, err
	}
	return summary.Document, summary.Version, nil
}

func (s *millraceStore) Frames(ctx context.Context, run string) (n int, err error) {
	tail, err := pgstream.TailFrames(ctx, s.pool, frames, run, "0", pgstream.TailOptions{})
	if err != nil {
		return 0, err
	}
	return pass(ctx, tail)
}

// pass goes over the frames that there are, and counts them.
func pass(ctx context.Context, tail *pgstream.FrameTail) (n int, _ error) {
	for {
		got, err := tail.TryNext(ctx, framesAtOnce)
		if err != nil || len(got) == 0 {
			return n, err
		}
		n += len(got)
	}
}

// framesAtOnce is how many frames a reader takes at most.
const framesAtOnce = 1000

func (s *millraceStore) Follow(ctx context.Context, run string) (Follower, error) {
	tail, err := pgstream.TailFrames(ctx, s.pool, frames, run, "0", pgstream.TailOptions{Listener: s.listener})
	if err != nil {
		return nil, err
	}
	if _, err := pass(ctx, tail); err != nil {
		return nil, err
	}
	return millraceFollower{tail}, nil
}

type millraceFollower struct{ tail *pgstream.FrameTail }

func (f millraceFollower) Next(ctx context.Context) ([][]byte, error) {
	got, err := f.tail.Next(ctx, framesAtOnce)
	payloads := make([][]byte, len(got))
	for i := range got {
		payloads[i] = got[i].Payload
	}
	return payloads, err
}

func (f millraceFollower) Close() error { return nil }
