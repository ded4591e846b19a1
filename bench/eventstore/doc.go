// Package eventstore measures Millrace as an event store and as a log of frames, beside a plain table, Emmett (emmett-postgresql, a program of Node) and the statements of
// FlowFabric's streams. The rules are those of package engine: a database for each measurement, systems interleaved, and no figure without a check. See bench/README.md.
package eventstore
