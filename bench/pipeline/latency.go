package pipeline

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/bench/report"
)

// Of the latency work.
const (
	latencyRate = 1000 // entries per second
	// One entry of so many is watched until its row can be seen. Watching all would keep PostgreSQL busy with being asked.
	watchEvery  = 5
	warmUpTime  = 2 * time.Second
	lookEvery   = 100 * time.Microsecond
	lastWaiting = 10 * time.Second
)

// latency sends entries at a steady rate and returns the percentiles, in milliseconds, of the time from just before XADD to when another session sees the
// row. A late producer is not spared: an entry's time begins when it was due.
func (r *runner) latency(ctx context.Context, n int, group string, members *members, begin func(int) error) ([]float64, error) {
	if err := r.client.Do(ctx, r.client.B().Del().Key(streamName).Build()).Error(); err != nil {
		return nil, err
	}
	if err := r.prepare(ctx, group); err != nil {
		return nil, err
	}
	if err := begin(1); err != nil {
		return nil, err
	}
	warm := int(warmUpTime.Seconds() * latencyRate)
	backlog := NewBacklog(warm+n, 0, false)
	watched := make(chan watchedEntry, n)
	sent := make(chan error, 1)
	go func() {
		defer close(watched)
		sent <- r.send(ctx, backlog.Entries, warm, watched)
	}()
	took, err := watch(ctx, r.DSN(), watched)
	if err = errors.Join(<-sent, err, members.running()); err != nil {
		return nil, err
	}
	if err := r.drained(ctx, group, measureLimit, members.running); err != nil {
		return nil, err
	}
	return []float64{report.Percentile(took, 50), report.Percentile(took, 99)}, r.check(ctx, backlog.Distinct, backlog.Sum)
}

type watchedEntry struct {
	*Entry
	due time.Time
}

// send adds the entries at the rate, and names one of watchEvery that come after the warm-up, unless it is a copy.
func (r *runner) send(ctx context.Context, entries []Entry, warm int, watched chan<- watchedEntry) error {
	start := time.Now()
	newest := int64(-1)
	for i := range entries {
		due := start.Add(time.Duration(i) * time.Second / latencyRate)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Until(due)):
		}
		e := &entries[i]
		isNew := e.Seq > newest
		newest = max(newest, e.Seq)
		if i >= warm && i%watchEvery == 0 && isNew {
			watched <- watchedEntry{e, due}
		}
		if err := r.client.Do(ctx, r.add(e)).Error(); err != nil {
			return err
		}
	}
	return nil
}

// watch looks for the rows of the entries over and over, and returns how long each took in milliseconds.
func watch(ctx context.Context, dsn string, watched <-chan watchedEntry) ([]float64, error) {
	db, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return nil, err
	}
	defer db.Close(context.WithoutCancel(ctx))
	// Without statistics the planner would read the whole table.
	for _, sql := range []string{"set enable_hashjoin = off", "set enable_mergejoin = off", "set enable_seqscan = off", "set jit = off"} {
		if _, err := db.Exec(ctx, sql); err != nil {
			return nil, err
		}
	}
	const query = `select p.seq from unnest($1::text[], $2::timestamptz[]) as k(d, t) join positions p on p.device_id = k.d and p.ts = k.t`
	open := map[int64]watchedEntry{}
	var took []float64
	var last time.Time // when nothing more came
	for watched != nil || len(open) > 0 {
		for more := watched != nil; more; {
			select {
			case e, ok := <-watched:
				if !ok {
					watched, more, last = nil, false, time.Now()
					break
				}
				open[e.Seq] = e
			default:
				more = false
			}
		}
		if watched == nil && time.Since(last) > lastWaiting {
			return nil, errors.New("rows were not seen in ten seconds")
		}
		if len(open) > 0 {
			var ids []string
			var times []time.Time
			for _, e := range open {
				ids, times = append(ids, e.DeviceID()), append(times, e.Time())
			}
			rows, err := db.Query(ctx, query, ids, times)
			if err != nil {
				return nil, err
			}
			seen, err := pgx.CollectRows(rows, pgx.RowTo[int64])
			if err != nil {
				return nil, err
			}
			now := time.Now()
			for _, seq := range seen {
				took = append(took, float64(now.Sub(open[seq].due).Microseconds())/1000)
				delete(open, seq)
			}
		}
		time.Sleep(lookEvery)
	}
	return took, nil
}
