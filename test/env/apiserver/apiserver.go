// Package apiserver is controller-runtime's envtest with our programs, and with time for a machine that has other work.
package apiserver

import (
	"context"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/millrace-dev/millrace/test/env/cluster"
)

// patience is for each program to start and to stop, and for the CRDs. Envtest's own, 20 and 10 seconds, do not do where all packages are tested at
// once, and a server that was slow to start is no faster when envtest starts it again.
const patience = 3 * time.Minute

// New returns a Kubernetes API server that is not started yet, with the CRDs in these files and directories. Stop it also when Start has failed: one that
// fails half-way, at a CRD for example, leaves its servers running.
func New(ctx context.Context, crds ...string) (*envtest.Environment, error) {
	assets, err := cluster.Assets(ctx)
	if err != nil {
		return nil, err
	}
	return &envtest.Environment{
		BinaryAssetsDirectory: assets, ControlPlaneStartTimeout: patience, ControlPlaneStopTimeout: patience,
		CRDInstallOptions: envtest.CRDInstallOptions{Paths: crds, ErrorIfPathMissing: true, MaxTime: patience},
	}, nil
}
