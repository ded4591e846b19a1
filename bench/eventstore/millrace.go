package eventstore

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

const (
	events = "events" // a stream with versions
	frames = "frames" // a stream with frames
	// maintenance runs as often as this while Millrace is measured, because it also does in real life.
	maintenance = time.Second
)

// millrace is Millrace through its Go client. With inDatabase, aggregates are made by millrace.aggregate instead of by the client.
type millrace struct {
	name       string
	inDatabase bool
}

func (m millrace) Name() string { return m.name }

func (m millrace) Cannot(work string) string {
	if m.inDatabase && work != "aggregate" {
		return "the same as millrace"
	}
	return ""
}

func (m millrace) Open(ctx context.Context, place Place) (Store, error) {
	conn, err := place.Pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	_, err = schema.Migrate(ctx, conn.Conn(), schema.Options{})
	conn.Release()
	if err != nil {
		return nil, err
	}
	for _, spec := range []pgstream.StreamSpec{
		{Name: events, Versions: true},
		{Name: frames, Frames: pgstream.Frames{TTL: liveSeconds * time.Second, MinLength: liveFloor, MaxLength: liveCeiling}},
	} {
		plan, err := pgstream.PlanStream(ctx, place.Pool, spec)
		if err != nil {
			return nil, err
		}
		if err := pgstream.ApplyStream(ctx, place.Pool, plan); err != nil {
			return nil, err
		}
	}
	if _, err := place.Pool.Exec(ctx, `create function evolve(state jsonb, payload jsonb, headers jsonb) returns jsonb language sql
			return jsonb_build_object('sum', coalesce((state -> 'sum')::bigint, 0) + (payload -> 'amount')::bigint)`); err != nil {
		return nil, err
	}
	s := &millraceStore{millrace: m, pool: place.Pool, listener: pgstream.NewListener(place.Pool.Config().ConnConfig)}
	// Maintenance has a connection of its own, as the manager has, which is another process.
	config := place.Pool.Config()
	config.MaxConns = 1
	own, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	ctx, s.cancel = context.WithCancel(ctx)
	s.background.Go(func() error { return s.listener.Run(ctx) })
	s.background.Go(func() (err error) {
		defer own.Close()
		pgstream.RunMaintenance(ctx, own, maintenance, func(e error) { err = fmt.Errorf("maintenance: %w", e) })
		return err
	})
	return s, nil
}

type millraceStore struct {
	millrace
	pool       *pgxpool.Pool
	listener   *pgstream.Listener
	background errgroup.Group
	cancel     context.CancelFunc
}

func (s *millraceStore) Perform(ctx context.Context, t Task) (Outcome, error) {
	return perform(ctx, s, t)
}

func (s *millraceStore) History() string {
	return `select key, version, (payload ->> 'n')::bigint from millrace.` + events + ` order by key collate "C", version`
}

func (s *millraceStore) Close() error {
	s.cancel()
	return s.background.Wait()
}

func (s *millraceStore) append(ctx context.Context, entity string, expected int64, payloads [][]byte) (int64, error) {
	ms := make([]pgstream.NewMessage, len(payloads))
	for i := range ms {
		ms[i].Payload = payloads[i]
	}
	a, err := pgstream.Append(ctx, s.pool, events, entity, expected, ms)
	if _, refused := pgstream.IsVersionError(err); refused {
		return 0, errConflict
	}
	return a.Version, err
}

func (s *millraceStore) read(ctx context.Context, entity string, from int64) ([][]byte, error) {
	history, err := pgstream.ReadEntity(ctx, s.pool, events, entity, from, 0, 1000)
	if err != nil {
		return nil, err
	}
	payloads := make([][]byte, len(history))
	for i := range history {
		payloads[i] = history[i].Payload
	}
	return payloads, nil
}

func (s *millraceStore) aggregate(ctx context.Context, entity string) (sum int64, err error) {
	if s.inDatabase {
		err = s.pool.QueryRow(ctx, "select (state -> 'sum')::bigint from millrace.aggregate($1, $2, 'public.evolve')", events, entity).Scan(&sum)
		return sum, err
	}
	return fold(s.read(ctx, entity, 1))
}
