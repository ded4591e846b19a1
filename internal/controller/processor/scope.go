package processor

import (
	appsv1 "k8s.io/api/apps/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/lag"
)

// scope holds the facts of one reconcile. Each field says which phase fills it; until then it is zero.
type scope struct {
	processor *v1alpha1.Processor // what is worked on; report writes its status
	before    *v1alpha1.Processor // as it was read

	inputs  inputs   // resolve, and scale for the replicas
	objects *objects // render
	written int64    // apply: the generation of the Deployment, when apply changed it

	figures  lag.Figures // scale: of the group, with spec.autoscaling
	decision *decision   // scale, with spec.autoscaling
	scaled   *scaled     // scale: the change that the decision is; nil when there is none
	applied  bool        // announceScale: the objects are as render made them

	deployment *appsv1.Deployment // observe
	wanted     int32              // observe: pods
}

// inputs are what a Processor's objects depend on besides its spec.
type inputs struct {
	group *v1alpha1.ConsumerGroup // the source, when it is one

	secrets       []secretFile             // what pods read from Secrets, by variable
	tls           *v1alpha1.LocalReference // the certificates for Redis
	addresses     []string                 // where those Secrets lead, without user and password
	descriptorSet string                   // the codec's, in base64

	logins   map[string]login // where connection strings of PostgreSQL lead, by variable
	replicas *int32           // of the Deployment; nil leaves them to whoever scales it

	image       string
	pullPolicy  string
	pullSecrets []string
}

// secretFile is one key of a Secret that pods read as a file.
type secretFile struct {
	variable string // that names the file, with _FILE appended
	ref      v1alpha1.SecretKeyReference
	check    func(value string) error
	// address says where the value leads, without what may be rotated while pods run. Nil: all of it may.
	address func(value string) string
}
