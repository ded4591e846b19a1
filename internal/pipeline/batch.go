package pipeline

import (
	"fmt"
	"time"

	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// Item is one entry or message on its way from the source to the sink.
//
// An Item has one owner at a time: the reader, then the decoder, then a writer, then the settler. Nobody keeps it after
// handing it on, so its fields need no lock.
type Item struct {
	// ID identifies the item in its source: the id of a Redis entry, the position of a message.
	ID string
	// Stream is where it came from.
	Stream string
	// Key of a message; nil when it has none, and for Redis.
	Key *string
	// Position of a message; 0 for Redis.
	Position int64
	// Created is when the source took the item; Received is when this processor did.
	Created, Received time.Time
	// Deliveries is how often the item has been handed out, this time included; 0 when the source would have to ask.
	Deliveries int
	// Fields are a Redis entry's, in order.
	Fields []redisstream.Field
	// Payload is a message's.
	Payload string

	// Row holds one value per mapped column once the item is decoded.
	Row []Value

	// Problem says why the item cannot be decoded; empty when it can.
	Problem string

	// Fenced is set by a TxSource when the right to this item has moved to another member, and by a sink when nobody here
	// knows whether its transaction was committed. The item is dropped; its source delivers it again if it has to.
	Fenced bool

	size   int // bytes counted against the bounds
	origin any // what the source needs to settle it
}

// Batch is a number of items that travel together.
type Batch struct {
	Items []*Item
	// More says that the source has more at hand, so that waiting for a fuller batch may pay.
	More bool
	// Together keeps the batch in one write: the source settles it cheaper as a whole.
	Together bool
	// InOrder asks that no item is written after one before it has failed, and that the batch stays by itself.
	InOrder bool
	// Settled says that the sink has settled the batch inside its own transaction.
	Settled bool
}

// Bytes is the size of the batch as it counts against the bounds.
func (b *Batch) Bytes() int {
	n := 0
	for _, it := range b.Items {
		n += it.size
	}
	return n
}

// Result is what became of one item.
type Result uint8

// Results.
const (
	Written   Result = iota // it is durable
	Duplicate               // its key was there already, in the sink or earlier in its batch
	Rejected                // it cannot be decoded or written; the error policy applies
	Retry                   // nothing is known against it; the source shall deliver it again
	Fenced                  // this processor has no right to it any more, or does not know; its source does
)

// String names the result as metrics do.
func (r Result) String() string {
	switch r {
	case Written:
		return "written"
	case Duplicate:
		return "duplicate"
	case Rejected:
		return "rejected"
	case Retry:
		return "retry"
	case Fenced:
		return "fenced"
	}
	return fmt.Sprintf("result %d", uint8(r))
}

// Outcome is a result and, for Rejected, its reason.
type Outcome struct {
	Result Result
	Reason string
}

// outcomes returns n times the same outcome.
func outcomes(n int, o Outcome) []Outcome {
	os := make([]Outcome, n)
	for i := range os {
		os[i] = o
	}
	return os
}
