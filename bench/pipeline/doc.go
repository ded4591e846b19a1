// Package pipeline measures processors that bring the entries of a Redis stream into a table of PostgreSQL: the same entries, on the same
// servers, in one run.
//
// A backlog is loaded once, and every system reads it as a consumer group of its own into an empty table. Systems are processes, as
// in production; Millrace is its released binary. After each measurement the table must hold every entry exactly once, nothing may be pending,
// and nothing unread, or there is no figure.
package pipeline
