package cluster

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/test/env/process"
	"github.com/millrace-dev/millrace/test/env/tools"
)

// Options says how to bring a cluster up.
type Options struct {
	// Out gets a line for each step and the progress of builds; default standard error.
	Out io.Writer
	// Keep lets the cluster go on when this process ends. make cluster-down ends it.
	Keep bool
}

// Cluster is a running Kubernetes.
type Cluster struct {
	programs   string // directory of kubectl and the others
	kubeconfig string
	context    string // of the kubeconfig; empty: its current one
	hostIP     string
	slot       *slot // nil: somebody else's cluster
	loadImage  func(ctx context.Context, archive string) error
	faults     faults           // nil: somebody else's cluster
	init       *process.Process // nil when another process started the cluster
}

// Up brings up a cluster and returns when its node is ready. What it is depends on CLUSTER; see the package comment.
func Up(ctx context.Context, o Options) (*Cluster, error) {
	if o.Out == nil {
		o.Out = os.Stderr
	}
	var c *Cluster
	var err error
	switch which := os.Getenv("CLUSTER"); {
	case which == "current":
		c, err = current(ctx, o)
	case which == "up" && !o.Keep:
		c, err = attach(ctx, o)
	case which == "" || which == "up":
		c, err = create(ctx, o)
	default:
		err = fmt.Errorf("CLUSTER=%s means nothing; use CLUSTER=current for your kubeconfig's current context, CLUSTER=up for that of make cluster-up, or leave it out", which)
	}
	if err != nil {
		return nil, fmt.Errorf("bring up the cluster: %w", err)
	}
	return c, nil
}

// Kubeconfig is the path of a kubeconfig for an administrator.
func (c *Cluster) Kubeconfig() string { return c.kubeconfig }

// HostIP is the address at which pods reach servers of this machine. Such servers have to listen on it.
func (c *Cluster) HostIP() string { return c.hostIP }

// Program is the path of one of the programs that come with the cluster, such as kubectl or helm.
func (c *Cluster) Program(name string) string { return filepath.Join(c.programs, name) }

// Env is what kubectl and helm need in their environment to talk to this cluster.
func (c *Cluster) Env() []string { return []string{"KUBECONFIG=" + c.kubeconfig} }

// Kubectl runs kubectl and returns its standard output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.run(ctx, nil, "kubectl", c.withContext("--context", args))
}

// Apply runs kubectl apply on a manifest.
func (c *Cluster) Apply(ctx context.Context, manifest string, args ...string) error {
	_, err := c.run(ctx, strings.NewReader(manifest), "kubectl", c.withContext("--context", append([]string{"apply", "-f", "-"}, args...)))
	return err
}

// Helm runs helm and returns its standard output.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	return c.run(ctx, nil, "helm", c.withContext("--kube-context", args))
}

func (c *Cluster) withContext(flag string, args []string) []string {
	if c.context == "" {
		return args
	}
	return append([]string{flag, c.context}, args...)
}

func (c *Cluster) run(ctx context.Context, stdin io.Reader, name string, args []string) (string, error) {
	cmd := exec.CommandContext(ctx, c.Program(name), args...)
	cmd.Env = append(os.Environ(), c.Env()...)
	cmd.Stdin = stdin
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// LoadImage makes an image archive known to the node, under the name that the archive gives it.
func (c *Cluster) LoadImage(ctx context.Context, archive string) error {
	if err := c.loadImage(ctx, archive); err != nil {
		return fmt.Errorf("load image %s: %w", filepath.Base(archive), err)
	}
	return nil
}

// Logs returns the ends of the logs of the cluster's own programs, for the report of a failed test.
func (c *Cluster) Logs() string {
	if c.slot == nil {
		return ""
	}
	return c.slot.logs(8000)
}

// Down ends a cluster that Up made in this process, and removes what it left. A cluster that Up found stays.
func (c *Cluster) Down(ctx context.Context) error {
	if c.init == nil {
		return nil
	}
	c.init.Kill() // returns when init has ended, and the kernel ends init last of its namespace
	c.init = nil
	if err := c.slot.clear(ctx); err != nil {
		return fmt.Errorf("take down the cluster: %w", err)
	}
	return nil
}

// Down ends the cluster that another process started with Options.Keep, and removes what crashed ones left. It tells
// how many it ended.
func Down(ctx context.Context) (ended int, err error) {
	ended, err = endKept(ctx)
	if err != nil {
		return ended, fmt.Errorf("take down the cluster: %w", err)
	}
	return ended, nil
}

// allPrograms is what a cluster and its users run, the slowest to build first.
func allPrograms(ctx context.Context, out io.Writer) (string, error) {
	return tools.Ensure(ctx, out, "kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler", "kube-proxy",
		"kubelet", "etcd", "containerd", "containerd-shim-runc-v2", "ctr", "helm")
}

// poll asks until the answer is nil. It fails when ctx ends or one of the watched processes does, with the last answer.
func poll(ctx context.Context, what string, watched []*process.Process, ask func(context.Context) error) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask(ctx)
		if err == nil {
			return nil
		}
		for _, p := range watched {
			if exit := p.Exit(); exit != nil {
				return fmt.Errorf("wait for %s: %w", what, exit)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w (last answer: %w)", what, ctx.Err(), err)
		case <-tick.C:
		}
	}
}
