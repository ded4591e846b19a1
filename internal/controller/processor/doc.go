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
//	C4  The spec is never written, by scaling either: replicas goes from spec to the Deployment.
//	C5  Pods roll when their configuration changes, or where a Secret that they use leads, and for no other reason of ours. A user,
//	    a password or a certificate that changes reaches them as a file.
package processor
