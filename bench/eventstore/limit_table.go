package eventstore

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// limitTable is a plain table in which entity and version are unique: one statement appends, and one reads. Nothing that compares versions in PostgreSQL does with less.
// Frames are rows with a position, announced by a notification; a summary is a row that is updated in the same statement, with a shallow merge.
type limitTable struct{}

func (limitTable) Name() string { return "limit-table" }

func (limitTable) Cannot(work string) string {
	if work == "live-append" {
		return "a plain table keeps everything"
	}
	return ""
}

func (limitTable) Open(ctx context.Context, place Place) (Store, error) {
	_, err := place.Pool.Exec(ctx, `create table event (
			entity     text collate "C" not null,
			version    bigint not null,
			position   bigint generated always as identity,
			created_at timestamptz not null default now(),
			payload    jsonb not null,
			primary key (entity, version)
		) with (autovacuum_vacuum_insert_threshold = -1);
		create table frame (
			run        text collate "C" not null,
			position   bigint generated always as identity,
			created_at timestamptz not null default now(),
			payload    jsonb not null,
			primary key (run, position)
		) with (autovacuum_vacuum_insert_threshold = -1);
		create table summary (
			run        text collate "C" primary key,
			document   jsonb not null,
			version    bigint not null,
			updated_at timestamptz not null default now()
		) with (fillfactor = 80)`)
	return &tableStore{pool: place.Pool, dsn: place.DSN}, err
}

type tableStore struct {
	pool *pgxpool.Pool
	dsn  string
}

func (s *tableStore) Perform(ctx context.Context, t Task) (Outcome, error) { return perform(ctx, s, t) }

func (s *tableStore) History() string {
	return `select entity, version, (payload ->> 'n')::bigint from event order by entity, version`
}

func (s *tableStore) Close() error { return nil }

func (s *tableStore) append(ctx context.Context, entity string, expected int64, events [][]byte) (int64, error) {
	var err error
	if len(events) == 1 {
		_, err = s.pool.Exec(ctx, "insert into event (entity, version, payload) values ($1, $2, $3)", entity, expected+1, events[0])
	} else {
		_, err = s.pool.Exec(ctx, "insert into event (entity, version, payload) select $1, $2 + n, x from unnest($3::jsonb[]) with ordinality u(x, n)",
			entity, expected, events)
	}
	var e *pgconn.PgError
	if errors.As(err, &e) && e.Code == "23505" {
		return 0, errConflict
	}
	return expected + int64(len(events)), err
}

func (s *tableStore) read(ctx context.Context, entity string, from int64) ([][]byte, error) {
	rows, err := s.pool.Query(ctx, "select version, position, payload, created_at from event where entity = $1 and version >= $2 order by version limit 1000", entity, from)
	if err != nil {
		return nil, err
	}
	return collect(rows)
}

// collect reads rows in full: version, position, payload, time.
func collect(rows pgx.Rows) ([][]byte, error) {
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) ([]byte, error) {
		var e struct {
			version, position int64
			payload           []byte
			at                time.Time
		}
		err := row.Scan(&e.version, &e.position, &e.payload, &e.at)
		return e.payload, err
	})
}

func (s *tableStore) aggregate(ctx context.Context, entity string) (int64, error) {
	return fold(s.read(ctx, entity, 1))
}

// fold adds up the amounts of events.
func fold(events [][]byte, err error) (sum int64, _ error) {
	if err != nil {
		return 0, err
	}
	for _, e := range events {
		a, err := amount(e)
		if err != nil {
			return 0, err
		}
		sum += a
	}
	return sum, nil
}

func (s *tableStore) AppendFrame(ctx context.Context, run string, payload []byte) error {
	_, err := s.pool.Exec(ctx, "with f as (insert into frame (run, payload) values ($1, $2) returning run) select pg_notify('frame', run) from f", run, payload)
	return err
}

func (s *tableStore) AppendLive(context.Context, string, []byte) error {
	return errors.New("a plain table keeps everything")
}

func (s *tableStore) Merge(ctx context.Context, run string, patch []byte) (version int64, err error) {
	err = s.pool.QueryRow(ctx, `with f as (insert into frame (run, payload) values ($1, $2)),
			s as (insert into summary as s (run, document, version) values ($1, $2, 1)
				on conflict (run) do update set document = s.document || excluded.document || jsonb_build_object('steps', s.document -> 'steps' || (excluded.document -> 'steps')),
					version = s.version + 1, updated_at = now() returning s.version)
			select s.version from s, pg_notify('frame', $1)`, run, patch).Scan(&version)
	return version, err
}

func (s *tableStore) Summary(ctx context.Context, run string) (document []byte, version int64, err error) {
	var at time.Time
	err = s.pool.QueryRow(ctx, "select document, version, updated_at from summary where run = $1", run).Scan(&document, &version, &at)
	return document, version, err
}

func (s *tableStore) Frames(ctx context.Context, run string) (n int, err error) {
	err = s.pool.QueryRow(ctx, "select count(*) from frame where run = $1", run).Scan(&n)
	return n, err
}

// Follow can do with the order of positions because works that follow append with one client.
func (s *tableStore) Follow(ctx context.Context, run string) (Follower, error) {
	w, err := listen(ctx, s.dsn, "frame")
	if err != nil {
		return nil, err
	}
	f := &tableFollower{waker: w, pool: s.pool, run: run}
	if err := s.pool.QueryRow(ctx, "select coalesce(max(position), 0) from frame where run = $1", run).Scan(&f.position); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return f, nil
}

type tableFollower struct {
	*waker
	pool     *pgxpool.Pool
	run      string
	position int64
}

func (f *tableFollower) Next(ctx context.Context) ([][]byte, error) {
	return f.waker.next(ctx, func() ([][]byte, error) {
		rows, err := f.pool.Query(ctx, "select position, payload from frame where run = $1 and position > $2 order by position limit 1000", f.run, f.position)
		if err != nil {
			return nil, err
		}
		return pgx.CollectRows(rows, func(row pgx.CollectableRow) ([]byte, error) {
			var payload []byte
			err := row.Scan(&f.position, &payload)
			return payload, err
		})
	})
}
