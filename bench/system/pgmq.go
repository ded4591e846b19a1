package system

import (
	"context"
	"fmt"
	"os"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/bench/engine"
)

// PGMQFile is the path of pgmq.sql, from the pgmq repository: the installation without an extension, where the server has none.
var PGMQFile string

// pgmq is the queue extension pgmq. A message is read, which hides it for a time and counts the read, and deleted when it was handled: each is
// an UPDATE and a DELETE of its row. Its own documentation suggests no settings of tables; here they are vacuumed as skip-locked's is. Keys are
// headers. Deleting the last messages and reading the next are separate transactions that wait for the disk.
type pgmq struct{ SQL }

var pgmqSystem = pgmq{SQL{
	name: "pgmq",
	setup: `select pgmq.create('bench');
		alter table pgmq.q_bench set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0,
			autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_scale_factor = 0.5)`,
	publish: "select pgmq.send('bench', $2::jsonb, jsonb_build_object('key', $1::text))",
	publishBatch: `select count(*) from pgmq.send_batch('bench', $2::jsonb[],
		array(select jsonb_build_object('key', k) from unnest($1::text[]) with ordinality as u (k, i) order by i))`,
	receive: "select msg_id, headers->>'key', headers, message, enqueued_at from pgmq.read('bench', 60, $1)",
	ack:     "select pgmq.delete('bench', $1::bigint[])",
	cannot: map[string]string{
		"backlog-10m":        "filling and emptying ten million would take minutes each",
		"consume-prefetch-1": "has no client of its own; see the batches",
	},
}}

// Open installs the extension, or its SQL file.
func (p pgmq) Open(ctx context.Context, pool *pgxpool.Pool, shape engine.Shape) (engine.Queue, error) {
	install := "create extension pgmq"
	if PGMQFile != "" {
		text, err := os.ReadFile(PGMQFile)
		if err != nil {
			return nil, fmt.Errorf("read pgmq's SQL: %w", err)
		}
		install = string(text)
	} else {
		var there bool
		if err := pool.QueryRow(ctx, "select exists (select from pg_available_extensions where name = 'pgmq')").Scan(&there); err != nil {
			return nil, err
		}
		if !there {
			return nil, engine.Unavailable("this server has no extension pgmq; -pgmq takes the SQL file of its repository instead")
		}
	}
	if _, err := pool.Exec(ctx, install); err != nil {
		return nil, fmt.Errorf("install pgmq: %w", err)
	}
	return p.SQL.Open(ctx, pool, shape)
}
