package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/millrace-dev/millrace/test/env/tools"
)

// current is the cluster of the user's current kubeconfig context. Its images and its way to this machine depend on
// what it is, so for kind, k3d and minikube we know, and for others the user tells:
//
//	MILLRACE_HOST_IP=<address>  where its pods reach this machine; PostgreSQL and Redis of the tests listen there
//	MILLRACE_IMAGES=present     the images docker.io/millrace/*:<tag> are already where its nodes find them
func current(ctx context.Context, o Options) (*Cluster, error) {
	programs, err := tools.Ensure(ctx, o.Out, "kubectl", "helm")
	if err != nil {
		return nil, err
	}
	c := &Cluster{programs: programs, kubeconfig: os.Getenv("KUBECONFIG"), hostIP: os.Getenv("MILLRACE_HOST_IP")}
	if c.kubeconfig == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, err
		}
		c.kubeconfig = filepath.Join(home, ".kube", "config")
	}
	name, err := c.Kubectl(ctx, "config", "current-context")
	if err != nil {
		return nil, fmt.Errorf("CLUSTER=current: %w", err)
	}
	// Fixed here: a user who switches the context during a test must not get the rest of it there.
	c.context = strings.TrimSpace(name)
	if _, err := c.Kubectl(ctx, "get", "--raw", "/readyz"); err != nil {
		return nil, fmt.Errorf("CLUSTER=current: context %s does not answer: %w", c.context, err)
	}
	c.loadImage = loader(c.context)
	if c.hostIP == "" {
		if c.hostIP, err = dockerGateway(ctx, c.context); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// loader picks the command that loads an image archive, by the name that the cluster's tool gave to the context.
func loader(name string) func(ctx context.Context, archive string) error {
	command := func(args ...string) func(context.Context, string) error {
		return func(ctx context.Context, archive string) error {
			full := append(args[1:len(args):len(args)], archive)
			if out, err := exec.CommandContext(ctx, args[0], full...).CombinedOutput(); err != nil {
				return fmt.Errorf("%s %s: %w\n%s", args[0], strings.Join(full, " "), err, out)
			}
			return nil
		}
	}
	switch {
	case os.Getenv("MILLRACE_IMAGES") == "present":
		return func(context.Context, string) error { return nil }
	case strings.HasPrefix(name, "kind-"):
		return command("kind", "load", "image-archive", "--name", strings.TrimPrefix(name, "kind-"))
	case strings.HasPrefix(name, "k3d-"):
		return command("k3d", "image", "import", "--cluster", strings.TrimPrefix(name, "k3d-"))
	case name == "minikube":
		return command("minikube", "image", "load")
	default:
		return func(context.Context, string) error {
			return fmt.Errorf("do not know how to bring an image to the cluster of context %s; make images, bring the archives in bin/images there yourself, and set MILLRACE_IMAGES=present", name)
		}
	}
}

// dockerGateway is the address of this machine in the Docker network of a kind or k3d cluster.
func dockerGateway(ctx context.Context, name string) (string, error) {
	network := ""
	switch {
	case strings.HasPrefix(name, "kind-"):
		network = "kind"
	case strings.HasPrefix(name, "k3d-"):
		network = name
	case name == "minikube":
		network = "minikube"
	default:
		return "", errors.New("set MILLRACE_HOST_IP to the address at which the cluster's pods reach this machine")
	}
	out, err := exec.CommandContext(ctx, "docker", "network", "inspect", network, "--format", "{{range .IPAM.Config}}{{.Gateway}} {{end}}").Output()
	if err != nil {
		return "", fmt.Errorf("find this machine's address in the Docker network %s: %w; set MILLRACE_HOST_IP", network, err)
	}
	for _, address := range strings.Fields(string(out)) {
		if !strings.Contains(address, ":") {
			return address, nil
		}
	}
	return "", fmt.Errorf("the Docker network %s has no IPv4 gateway; set MILLRACE_HOST_IP", network)
}
