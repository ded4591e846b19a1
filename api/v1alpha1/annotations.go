package v1alpha1

const (
	// AnnotationAbandon with the value "true" on a resource that is being deleted lets it go without touching its database.
	// What it had made there stays, and nobody owns it.
	AnnotationAbandon = "millrace.dev/abandon"

	// AnnotationAdoptFrom holds the id of a cluster (the UID of its kube-system namespace). A Stream or ConsumerGroup that
	// carries it may take over what a resource of that cluster owned: for a cluster that no longer exists.
	AnnotationAdoptFrom = "millrace.dev/adopt-from"

	// AnnotationApprovePlan on a Stream or ConsumerGroup with changePolicy: Plan holds the hash of the plan in its status that may be
	// carried out. It approves that plan once and no other.
	AnnotationApprovePlan = "millrace.dev/approve-plan"

	// AnnotationConfigHash on the pods of a Processor changes with its configuration, so that a new one rolls them.
	AnnotationConfigHash = "millrace.dev/config-hash"

	// AnnotationSecretHash on the pods of a Processor changes with where its Secrets lead, so that another server rolls them. A password
	// that is rotated does not: pods read it again.
	AnnotationSecretHash = "millrace.dev/secret-hash"

	// LabelProcessor on the objects and pods of a Processor holds its name.
	LabelProcessor = "millrace.dev/processor"

	// Finalizer stands on resources whose deletion policy removes something from the database.
	Finalizer = "millrace.dev/database"
)
