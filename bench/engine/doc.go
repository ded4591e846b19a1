// Package engine measures streams and queues in PostgreSQL: the same works, on every system, on one server, in one run.
//
// Each measurement has an empty database of its own, in which the system sets itself up, warms up and is analysed before
// the clock runs. Repetitions are interleaved: every system is measured once before any is measured again, and each time
// another one begins, so that a machine that slows down slows all of them.
//
// Invariants:
//
//	I1  No figure without a check: every message that was published has been received, once. A measurement that fails the
//	    check ends the whole run, or makes a rival's row say so.
//	I2  All systems get the same messages, the same connection settings and the same number of producers and consumers.
//	I3  A system that cannot do a work says why; it is never left out silently.
package engine
