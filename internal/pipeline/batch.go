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
	// Headers of a message: a JSON object, nil when there are none.
	Headers []byte

	// Row holds one value per mapped column once the item is decoded.
	Row []Value

	// Problem says why the item cannot be decoded; empty when it can.
	Problem string
	// Filtered says that the filter leaves the item out: it is acknowledged and not written.
	Filtered bool

	// Fenced is set by a TxSource when the right to this item has moved to another member, and by a sink when nobody here
	// knows whether its transaction was committed. The item is dropped; its source delivers it again if it has to.
	Fenced bool

	// Redriven says that the item is a dead letter that is tried again: refused, it stays one.
	Redriven bool
	// Branch is the only branch of a fan-out that the item is for; empty: all of them.
	Branch string

	decoder *Transform // that decoded it
	before  *Record    // what the state knew of its key before it, when an expression asks for that
	fanned  *fanned    // what a fan-out knows of it
	size    int        // bytes counted against the bounds
	origin  any        // what the source needs to settle it
	trace   *itemTrace // nil without a Tracer
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

	whole *Batch // the batch with its filtered items, when the sink gets it without
}

// Bytes is the size of the batch as it counts against the bounds.
func (b *Batch) Bytes() int {
	n := 0
	for _, it := range b.Items {
		n += it.size
	}
	return n
}

// wanted returns the batch without its filtered items, which no sink sees.
func (b *Batch) wanted() *Batch {
	n := 0
	for _, it := range b.Items {
		if it.Filtered {
			n++
		}
	}
	if n == 0 {
		return b
	}
	part := &Batch{Items: make([]*Item, 0, len(b.Items)-n), InOrder: b.InOrder, Together: b.Together, whole: b}
	for _, it := range b.Items {
		if !it.Filtered {
			part.Items = append(part.Items, it)
		}
	}
	return part
}

// complete returns the batch with its filtered items, and the outcomes of all of them.
func (b *Batch) complete(os []Outcome) (*Batch, []Outcome) {
	if b.whole == nil {
		return b, os
	}
	all := make([]Outcome, len(b.whole.Items))
	next := 0
	for i, it := range b.whole.Items {
		if it.Filtered {
			all[i] = Outcome{Result: Filtered}
		} else {
			all[i] = os[next]
			next++
		}
	}
	return b.whole, all
}

// Result is what became of one item.
type Result uint8

// Results.
const (
	Written      Result = iota // it is durable
	Duplicate                  // its key was there already, in the sink or earlier in its batch
	Rejected                   // it cannot be decoded or written; the error policy applies
	Retry                      // nothing is known against it; the source shall deliver it again
	Fenced                     // this processor has no right to it any more, or does not know; its source does
	Filtered                   // the filter left it out; it is acknowledged and not written
	DeadLettered               // the sink has set it aside itself, for those of its branches that refuse it
	numResults                 // how many there are
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
	case Filtered:
		return "filtered"
	case DeadLettered:
		return "dead_letter"
	}
	return fmt.Sprintf("result %d", uint8(r))
}

// ResultNames are the names of all results.
func ResultNames() []string {
	names := make([]string, numResults)
	for r := range numResults {
		names[r] = r.String()
	}
	return names
}

// Acknowledge says whether the source is to acknowledge an item of this result.
func (r Result) Acknowledge() bool {
	switch r {
	case Written, Duplicate, Filtered, DeadLettered:
		return true
	}
	return false
}

// Outcome is a result and, unless it is Written, Duplicate or Filtered, its reason.
type Outcome struct {
	Result Result
	Reason string
	// Mismatch says of a Duplicate that the row with its key has other content, when the sink was asked to look. A fan-out says
	// so of what is a duplicate for one of its branches, whatever it is for the others.
	Mismatch bool
}

// outcomes returns n times the same outcome.
func outcomes(n int, o Outcome) []Outcome {
	os := make([]Outcome, n)
	for i := range os {
		os[i] = o
	}
	return os
}
