// Package pipeline moves batches from a source to a sink and settles them.
//
//	reader → decoder → state → writer, by key → settler
//
// A reader takes entries of a Redis stream or messages of a consumer group. The decoder makes rows of them. Writers, each
// responsible for its share of the keys, collect rows into batches and write them. When a batch is durable, and only then,
// the settler tells the source. Reading goes on meanwhile, within bounds.
//
// Every item ends as exactly one of: a row or what else the sink makes of it, a duplicate of a row, left out by the filter,
// a dead letter, or still pending in its source. With a fan-out this holds for each of its branches (FanOut).
//
//	I1: nothing is acknowledged before the commit that makes it durable, as a row, as a duplicate, or as a dead letter.
//	I2: nothing is lost: whatever dies or is cut off at any moment, an item that was not settled is delivered again.
//	I3: redelivery is harmless: the key makes a second row a duplicate, and a dead letter is put aside once.
//	I4: memory is bounded: entries and bytes that were read and are not settled stay within batch.maxInFlight and
//	    batch.maxInFlightBytes (bytes may exceed it by one read); when the sink is down, reading stops.
//	I5: no goroutine outlives Run.
//	I6: the state is updated before the write, and an item that comes again changes only its count.
//	I7: what another member has taken over is dropped, never written under a lost right: with a TxSource the ack that
//	    proves the right commits together with the rows. When the answer to such a commit is lost, the items are dropped
//	    too and their claim is given up, so that the source's ledger decides what is delivered again.
//	I8: a key has one writer in a process, and all writers everywhere write rows in the same order, so that they wait for
//	    each other and never deadlock.
//	I9: a problem that a person has to solve acknowledges nothing and sets nothing aside; the processor is unready and
//	    goes on by itself once it is solved.
package pipeline
