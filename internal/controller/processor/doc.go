// Package processor turns a Processor into a ConfigMap, a ServiceAccount, a Deployment and a PodDisruptionBudget.
//
// Invariants:
//
//	C1  A configuration that the processor would refuse reaches no pod: the pods that run go on with the last good one, and
//	    the condition says what is wrong.
//	C2  Objects are written by server-side apply under one field owner, and only when what we own in them differs from what we
//	    want. Fields of others stay. An object of the wanted name that belongs to someone else is not touched.
//	C3  Connection strings go from Secret to pod by reference; they pass through no ConfigMap, annotation, status or event, but for a
//	    hash of them without user and password.
//	C4  The spec is never written, by scaling either: the number of pods goes from spec, or from the autoscaler, to the Deployment. When spec
//	    says neither, that field of the Deployment belongs to others.
//	C5  Pods roll when their configuration changes, or where a Secret that they use leads, and for no other reason of ours. A user,
//	    a password or a certificate that changes reaches them as a file.
//	C6  The autoscaler moves on measurements only (L3): while the lag is unknown, or pods roll, their number stays. What decide promises is
//	    in scale.go.
//	C7  Pods are added only as far as the database has connections for them, counting those that other autoscaled Processors have been
//	    promised.
package processor
