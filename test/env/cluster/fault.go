package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// faults break parts of a cluster of our own. Nobody can do that to somebody else's, where it is nil and every method that
// needs it returns errors.ErrUnsupported.
type faults interface {
	// signal sends a signal to the first process of a container.
	signal(ctx context.Context, container, signal string) error
	// stop ends programs of the cluster with SIGKILL and returns what starts them again as they were.
	stop(ctx context.Context, programs []string) (start func(context.Context) error, err error)
	// powerOff ends everything that runs on the node and forgets what a machine forgets.
	powerOff(ctx context.Context) (powerOn func(context.Context) error, err error)
}

// Crash ends the first container of a pod with SIGKILL, as a machine that fails would; kubectl cannot do that, because the
// kubelet sends SIGTERM first, whatever the grace period. It returns errors.ErrUnsupported in somebody else's cluster.
func (c *Cluster) Crash(ctx context.Context, namespace, pod string) error {
	return c.Signal(ctx, namespace, pod, "SIGKILL")
}

// Signal sends a signal to the first container of a pod; SIGSTOP and SIGCONT make a process stand still and go on. It
// returns errors.ErrUnsupported in somebody else's cluster.
func (c *Cluster) Signal(ctx context.Context, namespace, pod, signal string) error {
	if c.faults == nil {
		return errors.ErrUnsupported
	}
	id, err := c.Kubectl(ctx, "--namespace", namespace, "get", "pod", pod, "--output", "jsonpath={.status.containerStatuses[0].containerID}")
	if err != nil {
		return err
	}
	id, found := strings.CutPrefix(id, "containerd://")
	if !found {
		return fmt.Errorf("send %s to pod %s: its container does not run yet", signal, pod)
	}
	return c.faults.signal(ctx, id, signal)
}

// StopControlPlane ends the API server with SIGKILL. Pods, kubelet and controllers go on without it. start brings it back
// and returns when it answers. It returns errors.ErrUnsupported in somebody else's cluster.
func (c *Cluster) StopControlPlane(ctx context.Context) (start func(context.Context) error, err error) {
	return c.stop(ctx, "kube-apiserver")
}

// StopNodeAgents ends kubelet and containerd with SIGKILL. The pods' processes go on, and nobody looks after them. start
// brings both back. It returns errors.ErrUnsupported in somebody else's cluster.
func (c *Cluster) StopNodeAgents(ctx context.Context) (start func(context.Context) error, err error) {
	return c.stop(ctx, "containerd", "kubelet")
}

func (c *Cluster) stop(ctx context.Context, programs ...string) (func(context.Context) error, error) {
	if c.faults == nil {
		return nil, errors.ErrUnsupported
	}
	start, err := c.faults.stop(ctx, programs)
	if err != nil {
		return nil, fmt.Errorf("stop %s: %w", strings.Join(programs, " and "), err)
	}
	return start, nil
}

// PowerOff ends the node as the loss of its power does: kubelet, containerd and the processes of all pods get SIGKILL, and
// what lies in memory, sandboxes and mounted Secrets among it, is gone. What is on its disk stays. powerOn starts it again.
// It returns errors.ErrUnsupported in somebody else's cluster.
func (c *Cluster) PowerOff(ctx context.Context) (powerOn func(context.Context) error, err error) {
	if c.faults == nil {
		return nil, errors.ErrUnsupported
	}
	powerOn, err = c.faults.powerOff(ctx)
	if err != nil {
		return nil, fmt.Errorf("turn the node off: %w", err)
	}
	return powerOn, nil
}
