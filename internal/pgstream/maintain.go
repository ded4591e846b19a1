package pgstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Expired dedupe keys, summaries and completed workflows are removed in steps that hold their locks for a moment, and in a round no more than this many, for the rest has a next one.
const (
	purgeStep  = 1000
	purgeSteps = 500
)

// LedgerRingBytes is the size at which the ledgers of claims and settlements, and best-effort frames, move on to their next ring.
const LedgerRingBytes = 16 << 20

// Maintain does one round of upkeep in a database: it rotates segments and removes what retention no longer keeps, it keeps
// the ledgers and best-effort frames short, it forgets expired dedupe keys and summaries, it copies to queued groups what nobody receives, and it removes completed
// workflows. Publishing and consuming never wait for it and never need it: without it only disk space grows, and what no handler takes is not counted. Any
// number of processes may call it at once. It returns what it did, and an error that joins those of single streams, so that one busy
// stream does not keep the others waiting.
func Maintain(ctx context.Context, db DB) ([]string, error) {
	return maintain(ctx, db, LedgerRingBytes)
}

func maintain(ctx context.Context, db DB, ringBytes int64) ([]string, error) {
	type stream struct {
		ID   int32
		Name string
	}
	rows, err := db.Query(ctx, "select id, name from millrace_engine.streams_to_maintain()")
	if err != nil {
		return nil, fmt.Errorf("list streams: %w", translate(err))
	}
	streams, err := pgx.CollectRows(rows, pgx.RowToStructByPos[stream])
	if err != nil {
		return nil, fmt.Errorf("list streams: %w", translate(err))
	}
	var did []string
	var failed []error
	for _, s := range streams {
		var actions []string
		if err := db.QueryRow(ctx, "select millrace_engine.maintain_stream($1)", s.ID).Scan(&actions); err != nil {
			if !IsTransient(err) || ctx.Err() != nil {
				failed = append(failed, fmt.Errorf("maintain stream %q: %w", s.Name, translate(err)))
			}
			continue // a segment that readers keep busy waits for the next round
		}
		for _, a := range actions {
			did = append(did, s.Name+": "+a)
		}
	}
	if err := enqueue(ctx, db); err != nil && (!IsTransient(err) || ctx.Err() != nil) {
		failed = append(failed, fmt.Errorf("queue messages: %w", translate(err)))
	}
	ledger, err := maintainLedger(ctx, db, ringBytes)
	if err != nil && (!IsTransient(err) || ctx.Err() != nil) {
		failed = append(failed, fmt.Errorf("maintain the ledgers: %w", translate(err)))
	}
	did = append(did, ledger...)
	purged, err := purgeExpired(ctx, db, "select millrace_engine.purge_dedupe($1)")
	if err != nil && (!IsTransient(err) || ctx.Err() != nil) {
		failed = append(failed, fmt.Errorf("remove expired dedupe keys: %w", translate(err)))
	}
	if purged > 0 {
		did = append(did, fmt.Sprintf("removed %d expired dedupe keys", purged))
	}
	var rotated *string
	err = db.QueryRow(ctx, "select millrace_engine.rotate_frames($1)", ringBytes).Scan(&rotated)
	if err != nil && (!IsTransient(err) || ctx.Err() != nil) {
		failed = append(failed, fmt.Errorf("maintain the rings of best-effort frames: %w", translate(err)))
	}
	if rotated != nil {
		did = append(did, *rotated)
	}
	purged, err = purgeExpired(ctx, db, "select millrace_engine.purge_frames($1)")
	if err != nil && (!IsTransient(err) || ctx.Err() != nil) {
		failed = append(failed, fmt.Errorf("remove old summaries: %w", translate(err)))
	}
	if purged > 0 {
		did = append(did, fmt.Sprintf("removed %d old summaries", purged))
	}
	cleaned, err := cleanMemories(ctx, db)
	if err != nil {
		failed = append(failed, err)
	}
	return append(did, cleaned...), errors.Join(failed...)
}

// enqueueSteps bounds a round: what a group has not come to then waits for the next one, or for a receive.
const enqueueSteps = 100

// enqueue copies messages of the log to the groups that hand out from the delivery table, so that what nobody receives is counted, and kept.
func enqueue(ctx context.Context, db DB) error {
	rows, err := db.Query(ctx, "select * from millrace_engine.groups_to_enqueue()")
	if err != nil {
		return err
	}
	groups, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	if err != nil {
		return err
	}
	for _, g := range groups {
		more := true
		for n := 0; more && n < enqueueSteps; n++ {
			if err := db.QueryRow(ctx, "select millrace_engine.enqueue_group($1)", g).Scan(&more); err != nil {
				return err
			}
		}
	}
	return nil
}

func maintainLedger(ctx context.Context, db DB, ringBytes int64) ([]string, error) {
	rows, err := db.Query(ctx, "select * from millrace_engine.groups_to_carry()")
	if err != nil {
		return nil, err
	}
	groups, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		var done bool
		if err := db.QueryRow(ctx, "select millrace_engine.carry_over($1)", g).Scan(&done); err != nil {
			return nil, err
		}
		if !done {
			return nil, nil // a claim is being settled this moment; next round
		}
	}
	var empty, moved bool
	if err := db.QueryRow(ctx, "select millrace_engine.truncate_ledger()").Scan(&empty); err != nil || !empty {
		return nil, err
	}
	if err := db.QueryRow(ctx, "select millrace_engine.rotate_ledger($1)", ringBytes).Scan(&moved); err != nil || !moved {
		return nil, err
	}
	return []string{"moved the ledgers to the next ring"}, nil
}

// purgeExpired calls a function that removes at most $1 rows until it removes fewer.
func purgeExpired(ctx context.Context, db DB, sql string) (total int, err error) {
	for range purgeSteps {
		var n int
		if err := db.QueryRow(ctx, sql, purgeStep).Scan(&n); err != nil {
			return total, err
		}
		total += n
		if n < purgeStep {
			break
		}
	}
	return total, nil
}

// RunMaintenance calls Maintain at every interval until ctx ends, and hands errors to report.
func RunMaintenance(ctx context.Context, db DB, every time.Duration, report func(error)) {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if _, err := Maintain(ctx, db); err != nil && ctx.Err() == nil {
			report(err)
		}
	}
}
