// Package client publishes to Millrace streams, consumes from their groups, and reads and writes event stores, from Go programs that use pgx.
//
// A Client stands on a pool. Its verbs are the methods of Session: on the Client each is a transaction of its own, and on what In returns they take part in the
// caller's transaction. Consume and Tail wait for messages without holding a connection.
//
// Everything is safe for concurrent use. Nothing is written to standard error or to the default logger when Options.Logger is given. Errors that a
// caller decides upon are told by errors.Is and errors.As, see ErrNotFound and the ones beside it.
//
// Streams and groups are declared as Kubernetes resources, or made with the SQL functions millrace.create_stream and millrace.create_group.
package client
