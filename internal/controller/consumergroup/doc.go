// Package consumergroup brings a ConsumerGroup to its stream's database and keeps it there, and shows its progress.
//
// Invariants:
//
//	G1  Nothing in the database is touched before it is certain that this ConsumerGroup owns it.
//	G2  A wake-up for new figures asks no database: figures come from the lag poller, and comparing spec with the database is for
//	    changes and for the interval.
//	G3  Figures that could not be refreshed stay in status and are marked by LagKnown; they never turn into zero.
//	G4  The spec is never written. The finalizer goes on after the database has answered and before anything is made there.
//	G5  With changePolicy: Plan nothing is made, changed or repaired in the database that a person has not approved (package approval).
package consumergroup
