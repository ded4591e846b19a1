// Package phase runs the phases of a reconcile and turns their errors into conditions, events and the next wake-up.
//
// The place that fails knows the cause, so it chooses the class: Stall when a person has to act, Wait when another object or
// the database has to, Again when nothing can be said yet. Any other error is transient. Every other layer only obeys.
//
// Invariants:
//
//	P1  The conditions of a resource follow from the outcome of one reconcile alone; nothing is kept between calls but what
//	    is in the object and when it was last verified.
//	P2  An unchanged status is not written, so a resource at rest causes no request to the API server.
//	P3  observedGeneration moves when there is a verdict on that generation: done, waiting or stalled. Again moves nothing.
//	P4  An event is sent when the status or reason of Ready changes, and never for a repeat.
package phase
