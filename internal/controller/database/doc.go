// Package database gives every controller the same few connections to each database.
//
// Invariants:
//
//	D1  There is one small pool per connection string, whatever the number of resources on it.
//	D2  A database that does not answer costs one caller one timeout per breaker interval; every other caller is told at once.
//	    So a dead database never holds the workers that the resources of another need.
//	D3  Every call has an end on both sides: statement_timeout and lock_timeout in the server, a deadline here.
//	D4  Connection strings and passwords are in no error, log line, metric or event. Host, port, database and user are: they are
//	    what a person needs to find the mistake.
//	D5  Secrets are read when needed and never cached; only what identifies a pool, a hash of the connection string, is kept.
//	D6  The engine's schema is brought to this binary's version once per process and database, before its first use. Only Do
//	    installs it where there is none: what nobody has approved yet, and what runs in the background, calls Look.
package database
