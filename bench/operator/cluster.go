package operator

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/millrace-dev/millrace/internal/controller"
	"github.com/millrace-dev/millrace/test/env/cluster"
	"github.com/millrace-dev/millrace/test/env/process"
	"github.com/millrace-dev/millrace/test/env/tools"
)

//go:embed stages.yaml
var stages []byte

// The controller manager's own limit is 20 requests per second for each of its controllers. With it, two hundred Deployments would take most of a minute
// whatever the manager does.
const controllerManagerQPS = 200

// podsPerNode is what a node takes by default, less a few.
const podsPerNode = 100

// Cluster is a Kubernetes whose nodes and pods are played by KWOK.
type Cluster struct {
	env       *envtest.Environment
	config    *rest.Config
	client    client.WithWatch
	programs  string
	dir       string
	processes []*process.Process
}

// StartCluster starts the control plane with room for the pods. dir is for logs and configuration.
func StartCluster(ctx context.Context, dir string, pods int) (_ *Cluster, err error) {
	assets, err := cluster.Assets(ctx)
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir}
	if c.programs, err = tools.Ensure(ctx, os.Stderr, "kube-controller-manager", "kube-scheduler", "kwok", "helm"); err != nil {
		return nil, err
	}
	if err := os.WriteFile(c.path("audit.yaml"), []byte(auditPolicy), 0o600); err != nil {
		return nil, err
	}
	// The file has to be there for who reads it before the manager's first request.
	if err := os.WriteFile(c.path("audit.log"), nil, 0o600); err != nil {
		return nil, err
	}
	c.env = &envtest.Environment{BinaryAssetsDirectory: assets, ControlPlaneStopTimeout: 30 * time.Second}
	c.env.ControlPlane.GetAPIServer().Configure().
		Set("audit-policy-file", c.path("audit.yaml")).Set("audit-log-path", c.path("audit.log")).
		Set("enable-priority-and-fairness", "true")
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if c.config, err = c.env.Start(); err != nil {
		return nil, fmt.Errorf("start the control plane: %w", err)
	}
	c.config.QPS = -1
	if c.client, err = client.NewWithWatch(c.config, client.Options{Scheme: controller.Scheme()}); err != nil {
		return nil, err
	}
	return c, c.populate(ctx, pods)
}

// populate starts the rest of the control plane and makes nodes.
func (c *Cluster) populate(ctx context.Context, pods int) error {
	admin, err := c.env.AddUser(envtest.User{Name: "bench-admin", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		return err
	}
	text, err := admin.KubeConfig()
	if err != nil {
		return err
	}
	kubeconfig := c.path("admin.kubeconfig")
	if err := os.WriteFile(kubeconfig, text, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(c.path("stages.yaml"), stages, 0o600); err != nil {
		return err
	}
	qps := strconv.Itoa(controllerManagerQPS)
	if err := errors.Join(
		c.start("kube-controller-manager", "--kubeconfig="+kubeconfig, "--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0",
			"--kube-api-qps="+qps, "--kube-api-burst="+qps, "--cert-dir="+c.path("controller-manager")),
		c.start("kube-scheduler", "--kubeconfig="+kubeconfig, "--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=0",
			"--kube-api-qps="+qps, "--kube-api-burst="+qps, "--cert-dir="+c.path("scheduler")),
		c.start("kwok", "--kubeconfig="+kubeconfig, "--config="+c.path("stages.yaml"), "--manage-all-nodes=true", "--node-lease-duration-seconds=40"),
	); err != nil {
		return err
	}
	var making errgroup.Group
	for i := range pods/podsPerNode + 1 {
		making.Go(func() error { return c.client.Create(ctx, node(i)) })
	}
	if err := making.Wait(); err != nil {
		return fmt.Errorf("make nodes: %w", err)
	}
	return c.await(ctx, "the nodes", time.Minute, func() error {
		var nodes corev1.NodeList
		if err := c.client.List(ctx, &nodes); err != nil {
			return err
		}
		for _, n := range nodes.Items {
			ready := false
			for _, condition := range n.Status.Conditions {
				ready = ready || condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue
			}
			if !ready || len(n.Spec.Taints) > 0 {
				return fmt.Errorf("%s is not ready", n.Name)
			}
		}
		return nil
	})
}

func node(i int) *corev1.Node {
	room := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("1k"), corev1.ResourceMemory: resource.MustParse("1Ti"), corev1.ResourcePods: *resource.NewQuantity(2*podsPerNode, resource.DecimalSI),
	}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("kwok-%d", i), Labels: map[string]string{corev1.LabelHostname: fmt.Sprintf("kwok-%d", i)}},
		Status:     corev1.NodeStatus{Allocatable: room, Capacity: room},
	}
}

func (c *Cluster) path(name string) string { return filepath.Join(c.dir, name) }

func (c *Cluster) start(name string, args ...string) error {
	p, err := process.Start(process.Command{Path: filepath.Join(c.programs, name), Args: args, Log: c.path(name + ".log"), Dir: c.dir})
	if err == nil {
		c.processes = append(c.processes, p)
	}
	return err
}

// running says which process has ended, if one has.
func (c *Cluster) running() error {
	for _, p := range c.processes {
		if err := p.Exit(); err != nil {
			return err
		}
	}
	return nil
}

// await asks until the answer is nil, and returns the last one when the time is over.
func (c *Cluster) await(ctx context.Context, what string, limit time.Duration, ask func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		if ended := c.running(); ended != nil {
			return fmt.Errorf("wait for %s: %w", what, ended)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w (%w)", what, err, ctx.Err())
		case <-tick.C:
		}
	}
}

// Stop ends everything.
func (c *Cluster) Stop(ctx context.Context) error {
	var errs []error
	for _, p := range c.processes {
		if p.Running() {
			errs = append(errs, p.Stop(ctx, syscall.SIGKILL)) // nothing of theirs is kept
		}
	}
	return errors.Join(append(errs, c.env.Stop())...)
}
