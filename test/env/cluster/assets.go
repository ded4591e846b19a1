package cluster

import (
	"context"
	"os"

	"github.com/millrace-dev/millrace/test/env/tools"
)

// Assets returns a directory with kube-apiserver, etcd and kubectl, which is what KUBEBUILDER_ASSETS has to name for
// controller-runtime's envtest. The first call on a machine builds them, which takes some minutes; progress goes to
// standard error. When KUBEBUILDER_ASSETS is set, it is returned as it is.
func Assets(ctx context.Context) (string, error) {
	if given := os.Getenv("KUBEBUILDER_ASSETS"); given != "" {
		return given, nil
	}
	return tools.Ensure(ctx, os.Stderr, "etcd", "kube-apiserver", "kubectl")
}
