package eventstore

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

// flowFabric is the statements with which FlowFabric's PostgreSQL backend (ff_backend_postgres, stream.rs) appends, follows and sums up frames: the same statements in the same
// transactions and order, prepared, over a pool. FlowFabric itself is a Rust program; this one does what it does between the statements, and no more.
type flowFabric struct {
	partitions int // of each table: FlowFabric's are 256
}

func (flowFabric) Name() string { return "flowfabric" }

func (flowFabric) Cannot(work string) string {
	if !isFrames(work) {
		return "has no expected versions"
	}
	return ""
}

//go:embed flowfabric.sql
var flowFabricTables string

func (f flowFabric) Open(ctx context.Context, place Place) (Store, error) {
	_, err := place.Pool.Exec(ctx, fmt.Sprintf("select set_config('bench.partitions', '%d', false);", f.partitions)+flowFabricTables)
	return &flowFabricStore{pool: place.Pool, dsn: place.DSN}, err
}

type flowFabricStore struct {
	pool *pgxpool.Pool
	dsn  string
}

func (s *flowFabricStore) Perform(context.Context, Task) (Outcome, error) {
	return Outcome{}, errors.New("has no expected versions")
}

func (s *flowFabricStore) History() string { return "" }

func (s *flowFabricStore) Close() error { return nil }

// execution is a run's first attempt, as the statements name it.
type execution struct {
	partition int16
	id        pgtype.UUID
	attempt   int32
	lock      int64
}

func executionOf(run string) execution {
	hash := sha256.Sum256([]byte(run))
	e := execution{partition: int16(hash[31]), lock: int64(binary.LittleEndian.Uint64(hash[16:]))}
	e.id.Valid = true
	copy(e.id.Bytes[:], hash[:16])
	return e
}

func (s *flowFabricStore) AppendFrame(ctx context.Context, run string, payload []byte) error {
	return s.inOrder(ctx, executionOf(run), "durable", payload, nil)
}

func (s *flowFabricStore) Merge(ctx context.Context, run string, patch []byte) (version int64, err error) {
	e := executionOf(run)
	err = s.inOrder(ctx, e, "summary", patch, func(tx pgx.Tx, now int64) error {
		version, err = mergeSummary(ctx, tx, e, patch, now)
		return err
	})
	return version, err
}

func (s *flowFabricStore) AppendLive(ctx context.Context, run string, payload []byte) error {
	e := executionOf(run)
	return s.inOrder(ctx, e, "best_effort", payload, func(tx pgx.Tx, now int64) error { return trimLive(ctx, tx, e, now) })
}

// inOrder appends a frame under the run's lock, does what its mode asks for besides, and counts the run's frames, all in one transaction.
func (s *flowFabricStore) inOrder(ctx context.Context, e execution, mode string, payload []byte, more func(tx pgx.Tx, now int64) error) error {
	fields, err := json.Marshal(map[string]string{"frame_type": "event", "payload": string(payload), "encoding": "utf8", "source": "worker"})
	if err != nil {
		return err
	}
	tx, err := s.pool.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	now := time.Now().UnixMilli()
	if _, err := tx.Exec(ctx, "select pg_advisory_xact_lock($1)", e.lock); err != nil {
		return err
	}
	var highest *int32
	if err := tx.QueryRow(ctx, "select max(seq) from ff_stream_frame where partition_key = $1 and execution_id = $2 and attempt_index = $3 and ts_ms = $4",
		e.partition, e.id, e.attempt, now).Scan(&highest); err != nil {
		return err
	}
	var seq int32
	if highest != nil {
		seq = *highest + 1
	}
	if _, err := tx.Exec(ctx, `insert into ff_stream_frame (partition_key, execution_id, attempt_index, ts_ms, seq, fields, mode, created_at_ms)
			values ($1, $2, $3, $4, $5, $6, $7, $8)`, e.partition, e.id, e.attempt, now, seq, fields, mode, now); err != nil {
		return err
	}
	if more != nil {
		if err := more(tx, now); err != nil {
			return err
		}
	}
	var frames int64
	if err := tx.QueryRow(ctx, "select count(*)::bigint from ff_stream_frame where partition_key = $1 and execution_id = $2 and attempt_index = $3",
		e.partition, e.id, e.attempt).Scan(&frames); err != nil {
		return err
	}
	return tx.Commit(ctx)
}

// mergeSummary fetches the document, merges in the client and writes it back.
func mergeSummary(ctx context.Context, tx pgx.Tx, e execution, patch []byte, now int64) (int64, error) {
	var change, document any
	if err := json.Unmarshal(patch, &change); err != nil {
		return 0, err
	}
	var text []byte
	var version int32
	err := tx.QueryRow(ctx, `select document_json, version from ff_stream_summary where partition_key = $1 and execution_id = $2 and attempt_index = $3 for update`,
		e.partition, e.id, e.attempt).Scan(&text, &version)
	if err == nil {
		err = json.Unmarshal(text, &document)
	}
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return 0, err
	}
	if text, err = json.Marshal(mergePatch(document, change)); err != nil {
		return 0, err
	}
	version++
	if version == 1 {
		_, err = tx.Exec(ctx, `insert into ff_stream_summary (partition_key, execution_id, attempt_index, document_json, version, patch_kind, last_updated_ms, first_applied_ms)
			values ($1, $2, $3, $4, $5, $6, $7, $8)`, e.partition, e.id, e.attempt, text, version, "json-merge-patch", now, now)
	} else {
		_, err = tx.Exec(ctx, `update ff_stream_summary set document_json = $4, version = $5, patch_kind = $6, last_updated_ms = $7
			where partition_key = $1 and execution_id = $2 and attempt_index = $3`, e.partition, e.id, e.attempt, text, version, "json-merge-patch", now)
	}
	return int64(version), err
}

// mergePatch is RFC 7396.
func mergePatch(target, patch any) any {
	changes, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	object, ok := target.(map[string]any)
	if !ok {
		object = map[string]any{}
	}
	for k, v := range changes {
		if v == nil {
			delete(object, k)
		} else {
			object[k] = mergePatch(object[k], v)
		}
	}
	return object
}

// trimLive follows the rate and deletes all but the newest frames.
func trimLive(ctx context.Context, tx pgx.Tx, e execution, now int64) error {
	var rate float64
	var last int64
	err := tx.QueryRow(ctx, `select ema_rate_hz, last_append_ts_ms from ff_stream_meta where partition_key = $1 and execution_id = $2 and attempt_index = $3 for update`,
		e.partition, e.id, e.attempt).Scan(&rate, &last)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	const alpha = 0.2
	instant := 0.0
	if last > 0 && now > last {
		instant = 1000 / float64(now-last)
	}
	rate = alpha*instant + (1-alpha)*rate
	keep := min(max(int64(math.Ceil(rate*liveSeconds))*2, liveFloor), liveCeiling)
	if _, err := tx.Exec(ctx, `insert into ff_stream_meta (partition_key, execution_id, attempt_index, ema_rate_hz, last_append_ts_ms, maxlen_applied_last)
			values ($1, $2, $3, $4, $5, $6) on conflict (partition_key, execution_id, attempt_index) do update
			set ema_rate_hz = excluded.ema_rate_hz, last_append_ts_ms = excluded.last_append_ts_ms, maxlen_applied_last = excluded.maxlen_applied_last`,
		e.partition, e.id, e.attempt, rate, now, int32(keep)); err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `delete from ff_stream_frame where partition_key = $1 and execution_id = $2 and attempt_index = $3
			and (ts_ms, seq) not in (select ts_ms, seq from ff_stream_frame where partition_key = $1 and execution_id = $2 and attempt_index = $3
				order by ts_ms desc, seq desc limit $4)`, e.partition, e.id, e.attempt, keep)
	return err
}

func (s *flowFabricStore) Summary(ctx context.Context, run string) (document []byte, version int64, err error) {
	e := executionOf(run)
	var kind *string
	var updated, first int64
	err = s.pool.QueryRow(ctx, `select document_json, version, patch_kind, last_updated_ms, first_applied_ms from ff_stream_summary
			where partition_key = $1 and execution_id = $2 and attempt_index = $3`, e.partition, e.id, e.attempt).Scan(&document, &version, &kind, &updated, &first)
	return document, version, err
}

func (s *flowFabricStore) Frames(ctx context.Context, run string) (n int, err error) {
	e := executionOf(run)
	err = s.pool.QueryRow(ctx, "select count(*) from ff_stream_frame where partition_key = $1 and execution_id = $2 and attempt_index = $3",
		e.partition, e.id, e.attempt).Scan(&n)
	return n, err
}

// Follow listens on the run's channel with a connection of its own; the frames are read over the pool, as FlowFabric does.
func (s *flowFabricStore) Follow(ctx context.Context, run string) (Follower, error) {
	e := executionOf(run)
	wake, err := listen(ctx, s.dsn, "ff_stream_"+e.id.String()+"_0")
	if err != nil {
		return nil, err
	}
	f := &flowFabricFollower{store: s, execution: e, waker: wake, ms: math.MinInt64, seq: math.MinInt32}
	err = s.pool.QueryRow(ctx, `select ts_ms, seq from ff_stream_frame where partition_key = $1 and execution_id = $2 and attempt_index = $3
			order by ts_ms desc, seq desc limit 1`, e.partition, e.id, e.attempt).Scan(&f.ms, &f.seq)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, errors.Join(err, wake.Close())
	}
	return f, nil
}

type flowFabricFollower struct {
	store *flowFabricStore
	execution
	*waker
	ms  int64
	seq int32
}

func (f *flowFabricFollower) Next(ctx context.Context) ([][]byte, error) {
	return f.waker.next(ctx, func() ([][]byte, error) {
		rows, err := f.store.pool.Query(ctx, `select ts_ms, seq, fields from ff_stream_frame where partition_key = $1 and execution_id = $2 and attempt_index = $3
				and (ts_ms, seq) > ($4, $5) order by ts_ms, seq limit $6`, f.partition, f.id, f.attempt, f.ms, f.seq, 1000)
		if err != nil {
			return nil, err
		}
		return pgx.CollectRows(rows, func(row pgx.CollectableRow) ([]byte, error) {
			var fields map[string]string
			err := row.Scan(&f.ms, &f.seq, &fields)
			return []byte(fields["payload"]), err
		})
	})
}
