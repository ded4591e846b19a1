package system

// skipLocked is the queue of every textbook: lock the first rows that nobody else has locked, work, delete them, commit. Its table
// leaves no free space in pages, because rows are never updated, and is vacuumed as soon as a small number of rows is dead,
// without pauses.
var skipLocked = SQL{
	name: "skip-locked",
	setup: `create table queue (
			id         bigint generated always as identity primary key,
			created_at timestamptz not null default now(),
			key        text,
			headers    jsonb,
			payload    jsonb not null
		) with (fillfactor = 100, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0,
			autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_scale_factor = 0.5)`,
	publish:      "insert into queue (key, payload) values ($1, $2)",
	publishBatch: "insert into queue (key, payload) select * from unnest($1::text[], $2::jsonb[])",
	receive:      "select id, key, headers, payload, created_at from queue order by id limit $1 for update skip locked",
	ack:          "delete from queue where id = any($1)",
	transaction:  true,
}

// skipLockedAsync is the same queue with consumers that do not wait for the disk. After a crash of the server the last messages come
// again, as they do with Millrace.
var skipLockedAsync = func() SQL {
	s := skipLocked
	s.name = "skip-locked-async"
	s.asynchronous = true
	const same = "publishes as skip-locked does"
	s.cannot = map[string]string{"publish-single": same, "publish-batch-1000": same,
		"held-xmin": "the same rows die as of skip-locked", "idle": "waits as skip-locked does",
		"backlog-10m": "finds messages as skip-locked does", "foreign-locks-10k": "finds messages as skip-locked does",
		"footprint": "writes what skip-locked writes", "footprint-batch": "writes what skip-locked writes"}
	return s
}()
