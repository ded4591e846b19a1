// Package lag reads the progress of every consumer group, and less often what every stream holds, once per database and interval instead of
// once per resource, and wakes the resources that it concerns.
//
// Invariants:
//
//	L1  One query per database and interval, whatever the number of groups, and one for streams in every sixth; a database that is slow or dead delays no other.
//	L2  A resource is woken when its own figures change, or when its database is lost or found again, and not otherwise: at rest
//	    nothing is woken and nothing is written. The sizes of a stream wake nobody. What its resource has just made has figures from the beginning, and is not
//	    woken for its first reading.
//	L3  A figure that could not be refreshed is a memory and is marked so (Known is false); it is never shown as a measurement.
package lag
