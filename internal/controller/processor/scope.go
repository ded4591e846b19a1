package processor

import (
	appsv1 "k8s.io/api/apps/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// scope holds the facts of one reconcile. Each field says which phase fills it; until then it is zero.
type scope struct {
	processor *v1alpha1.Processor // what is worked on; report writes its status
	before    *v1alpha1.Processor // as it was read

	inputs  inputs   // resolve
	objects *objects // render

	deployment *appsv1.Deployment // observe
}

// inputs are what a Processor's objects depend on besides its spec.
type inputs struct {
	group *v1alpha1.ConsumerGroup // the source, when it is one

	redis  *v1alpha1.SecretKeyReference // the source's address, when it is Redis
	source *v1alpha1.SecretKeyReference // the source's database, when it is a group
	sink   *v1alpha1.SecretKeyReference // the sink's database

	secretVersions []string // of the Secrets above, as name/key=resourceVersion
	image          string
	pullPolicy     string
}
