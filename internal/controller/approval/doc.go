// Package approval holds changes of a database back until a person has approved them: changePolicy: Plan.
//
// Invariants:
//
//	A1  The hash of a plan covers all that it depends on: the resource and its spec, the database and the state of the object in it, every
//	    step and statement, and whether something is destroyed. What moves with the traffic, such as how much, is not in it, so a plan can be
//	    approved on a busy stream.
//	A2  An approval holds for one hash and once: the hash covers the one that was carried out before it.
//	A3  Before a plan is carried out it is made again, in the transaction that carries it out, and has to have the same hash.
package approval
