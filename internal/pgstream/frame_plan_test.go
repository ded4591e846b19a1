package pgstream_test

import (
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// However many frames a key has, a read of a few reads a few: nothing is sorted, whatever the planner believes. Counted by what the indexes of the key's frames have given.
func TestAReadOfFewFramesReadsFew(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.frames(pgstream.Frames{MinLength: 5000, MaxLength: 5000})
	conn := e.connect()
	exec(e, conn, "select millrace.read_frames('runs', 'a')") // a plan for an empty table
	exec(e, conn, `select count(millrace.append_frame('runs', 'a', '{}', case when n % 2 = 0 then 'Durable' else 'BestEffortLive' end)) from generate_series(1, 4000) n`)
	read := func(call string) int64 {
		const fetched = `select sum(pg_stat_get_xact_tuples_fetched(indexrelid)) + sum(pg_stat_get_xact_tuples_returned(indexrelid)) from pg_index i join pg_class c on c.oid = i.indexrelid
			where c.relname ~ '^(segment_1_.*_key_frame|live_frame_._key)_idx$'`
		tx, err := conn.Begin(e.ctx)
		must(t, err)
		var before, after int64 // what was counted before and not yet reported is among them
		must(t, tx.QueryRow(e.ctx, fetched).Scan(&before))
		exec(e, tx, "select count(*) from millrace."+call)
		must(t, tx.QueryRow(e.ctx, fetched).Scan(&after))
		rollback(e, tx)
		return after - before
	}
	middle := one[string](e, "select (select id from millrace.read_frames('runs', 'a', p_max => 2000) order by frame_count desc limit 1)")
	for _, call := range []string{"read_frames('runs', 'a', p_max => 10)", "read_frames('runs', 'a', p_max => 10, p_best_effort => false)",
		"tail_frames('runs', 'a', '" + middle + "', 10)", "append_frame('runs', 'a', '{}')", "append_frame('runs', 'a', '{}', 'BestEffortLive')"} {
		if n := read(call); n > 100 || n == 0 {
			t.Errorf("%s looks at %d index entries", call, n)
		}
	}
}
