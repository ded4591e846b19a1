// Package redis starts private Redis servers for tests, the demo and the benchmarks, from the redis-server (or
// valkey-server) of this machine.
//
// A server takes a few milliseconds to start, so New gives each test its own:
//
//	func TestReclaim(t *testing.T) {
//		t.Parallel()
//		server := redis.New(t)
//		client, err := rueidis.NewClient(rueidis.MustParseURL(server.URL()))
//		…
//
// Invariants:
//
//	I1  A server ends with the process that started it, and its directory is removed, at the latest by the next start.
//	I2  A server keeps its port over Kill, Restart, Pause and Resume.
//	I3  With Options.Persist, what a server acknowledged survives Kill (an append-only file, written before the answer).
//	    Without it, Restart brings back an empty server, as when a Redis without a volume is rescheduled.
package redis
