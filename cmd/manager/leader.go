package main

import (
	"fmt"
	"os"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	coordinationv1 "k8s.io/client-go/kubernetes/typed/coordination/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// envPodName is the variable that holds the name of the manager's pod.
const envPodName = "POD_NAME"

// leaseName is the name of the Lease.
const leaseName = "manager.millrace.dev"

// podLock is the Lease that the leader holds, in the name of its pod, which has no two managers at the same time. So a manager
// that was killed and started again in its pod leads on at once, where a stranger has to wait until the Lease expires. Outside of a
// pod, or without a namespace, it is nil, and the process holds the Lease in a name of its own.
func podLock(cfg *rest.Config, o *options) (*resourcelock.LeaseLock, error) {
	pod := os.Getenv(envPodName)
	if !o.leaderElect || pod == "" || o.leaderElectionNamespace == "" {
		return nil, nil
	}
	cfg = rest.AddUserAgent(rest.CopyConfig(cfg), "leader-election") // a copy: AddUserAgent changes what it is given
	cfg.Timeout = apiTimeout                                         // one request that hangs must not cost the Lease
	client, err := coordinationv1.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("create a client for leader election: %w", err)
	}
	return &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: o.leaderElectionNamespace, Name: leaseName},
		Client:     client,
		LockConfig: resourcelock.ResourceLockConfig{Identity: pod},
	}, nil
}
