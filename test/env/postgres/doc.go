// Package postgres starts private PostgreSQL servers for tests, the demo and the benchmarks, from binaries on this
// machine.
//
// A test package shares one server and gives every test a database of its own, so tests run in parallel:
//
//	func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }
//
//	func TestClaim(t *testing.T) {
//		t.Parallel()
//		conn, err := pgx.Connect(t.Context(), postgres.NewDatabase(t))
//		…
//
// A test that hurts its server takes one for itself with NewServer.
//
// Environment: PG chooses the major version; MILLRACE_TEST_POSTGRES is the DSN of a server that Main uses instead of
// starting one (its role must be a superuser).
//
// Invariants:
//
//	I1  A server ends with the process that started it, and its directory is removed, at the latest by the next start.
//	I2  What a server acknowledged as committed survives Kill, although fsync is off: the kernel outlives the server.
//	I3  A server keeps its port and its data over Kill, Restart, Pause and Resume.
package postgres
