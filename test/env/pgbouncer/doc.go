// Package pgbouncer puts a PgBouncer in transaction mode before a test's PostgreSQL, from the pgbouncer of this machine.
//
//	func TestThroughAPool(t *testing.T) {
//		pool := pgbouncer.New(t, dsn, pgbouncer.Options{})
//		conn, err := pgx.Connect(ctx, pool.DSN()+"&default_query_exec_mode=cache_describe")
//		…
//
// Few server connections serve all clients, and they are handed to another client after every transaction, so what a client leaves in its session is soon
// in another's.
//
// Invariant: a PgBouncer ends with the process that started it, and its directory is removed, at the latest by the next start.
package pgbouncer
