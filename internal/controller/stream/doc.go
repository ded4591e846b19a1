// Package stream brings a Stream to its database and keeps it there.
//
// Invariants:
//
//	S1  Nothing in the database is touched before it is certain that this Stream owns it. Of two Streams for one name the
//	    older wins, and the other says Conflict.
//	S2  The spec is never written. Metadata is written only for the finalizer, and only where the deletion policy needs one.
//	S3  The finalizer goes on after the database has answered and before anything is made there: a Stream that never
//	    reached its database can always be deleted, and one that did is never forgotten silently.
//	S4  What a repeat would do twice is not done: every phase reads the database first.
//	S5  With changePolicy: Plan nothing is made, changed or repaired in the database that a person has not approved (package approval).
package stream
