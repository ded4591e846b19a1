package pipeline

import (
	"context"
	"log/slog"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Sink makes a batch durable.
type Sink interface {
	// Write returns one outcome per item: Written or Duplicate. A sink that learns the fate of every item by itself may
	// also return Rejected, which needs no halving, and Retry, which the pipeline writes again after a pause, both with a
	// reason. In a batch that is InOrder everything after the first of these must be Retry, and must not have been written.
	//
	// An error concerns the whole batch, of which nothing can be assumed; it is always safe to write it again, except what
	// a sink that settles has marked as Fenced, with an error of class ClassFenced. An error of class ClassRow says that at
	// least one row is at fault: the pipeline finds it by halving the batch.
	Write(ctx context.Context, b *Batch) ([]Outcome, error)
}

// SettlingSink is a sink in a database of PostgreSQL. When the source is in the same database, effect and ack become one
// transaction, and every item has its effect exactly once.
type SettlingSink interface {
	Sink
	// SettleWith makes Write settle each batch in the transaction that writes it, and set Batch.Settled.
	SettleWith(source TxSource)
}

// TxSink is a SettlingSink that can also write inside a transaction of somebody else.
type TxSink interface {
	SettlingSink
	// WriteTx writes the batch inside a transaction that the caller commits. Its outcomes and errors are those of Write.
	WriteTx(ctx context.Context, tx pgx.Tx, b *Batch) ([]Outcome, error)
}

// Sharder is a sink for which some items belong together, such as those with one key. The pipeline gives items of equal
// shard to one writer, in the order of the source. Without it, items that have no message key go to any writer.
type Sharder interface {
	Shard(it *Item) uint64
}

// SinkOptions are what a sink is made from.
type SinkOptions struct {
	Config  *config.Config
	Pool    *pgxpool.Pool // of the sink's database; nil when the configuration needs none
	Metrics *Metrics
	Logger  *slog.Logger
}

// NewSink returns the sink that the configuration asks for. Migrate comes before it. Its errors are of class
// ClassConfiguration when a person has to act.
func NewSink(ctx context.Context, o SinkOptions) (Sink, error) {
	memory, err := openMemory(ctx, o.Pool, o.Config)
	if err != nil {
		return nil, err
	}
	switch s := o.Config.Sink; {
	case len(s.FanOut) > 0:
		return NewFanOut(ctx, o)
	case s.Table != nil:
		table, err := NewTableSink(ctx, o.Pool, o.Config)
		if err != nil {
			return nil, err
		}
		table.metrics = o.Metrics
		return table, nil
	case s.Stream != nil:
		return NewStreamSink(ctx, o.Pool, o.Config)
	case s.SQL != nil:
		return NewSQLSink(ctx, o.Pool, o.Config)
	case s.HTTP != nil && memory != nil:
		return newStatefulHTTPSink(o, memory)
	case s.HTTP != nil:
		return NewHTTPSink(o.Config, o.Metrics)
	}
	return nil, NewConfigurationError("sink: write one of table, stream, sql and http")
}

// ofBranch is the configuration of a pipeline whose only sink is a branch.
func ofBranch(c *config.Config, b config.Branch) *config.Config {
	alone := *c
	alone.Mapping = *b.Mapping
	if b.Name != "" {
		alone.Name += "/" + b.Name // so that ids of events and of published items differ between branches
	}
	alone.Sink = config.Sink{Table: b.Table, Stream: b.Stream, SQL: b.SQL, HTTP: b.HTTP}
	return &alone
}

// NeedsSinkDatabase says whether the pipeline writes into PostgreSQL: rows, messages, states of workflows or dead letters.
func NeedsSinkDatabase(c *config.Config) bool {
	return needsDeadLetters(c) || c.Memory != nil || slices.ContainsFunc(c.Branches(), inDatabase)
}

func inDatabase(b config.Branch) bool { return b.Table != nil || b.Stream != nil || b.SQL != nil }

// SettleTogether makes the sink settle in its own transactions, when it is in the database of the source. It reports
// whether every item then has its effect exactly once. Otherwise an item may be written again after a failure; it is
// an error of class ClassConfiguration when nothing would make that harmless.
func SettleTogether(ctx context.Context, c *config.Config, source TxSource, sourcePool *pgxpool.Pool, sink Sink, sinkPool *pgxpool.Pool) (bool, error) {
	if s, ok := sink.(SettlingSink); ok && sinkPool != nil {
		same, err := SameDatabase(ctx, sourcePool, sinkPool)
		if err != nil {
			return false, err
		}
		if same {
			s.SettleWith(source)
			return !slices.ContainsFunc(c.Branches(), func(b config.Branch) bool { return !inDatabase(b) }), nil
		}
	}
	if c.Memory != nil {
		return false, NewConfigurationError("source and sink are different databases, and the memory %q writes a state in the transaction of the ack; leave %s out", c.Memory.Name, config.EnvSinkDatabaseURL)
	}
	for _, b := range c.Branches() {
		if b.Table != nil && len(b.Table.Key) == 0 {
			at := "sink.table.key"
			if b.Name != "" {
				at = "the table.key of branch " + b.Name
			}
			return false, NewConfigurationError("source and sink are different databases, so redelivery is possible: write %s, which makes it harmless", at)
		}
	}
	return false, nil
}
