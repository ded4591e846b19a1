package pipeline

import "context"

// Sink makes a batch durable.
type Sink interface {
	// Write returns one outcome per item: Written or Duplicate. An error concerns the whole batch, of which nothing can be
	// assumed; it is always safe to write it again, except what a sink that settles has marked as Fenced, with an error of
	// class ClassFenced. An error of class ClassRow says that at least one row is at fault:
	// the pipeline finds it by halving the batch.
	Write(ctx context.Context, b *Batch) ([]Outcome, error)
}
