package scenario

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/millrace-dev/millrace/test/env/image"
	"github.com/millrace-dev/millrace/test/env/source"
)

// Where Millrace is installed.
const (
	Release         = "millrace"
	SystemNamespace = "millrace-system"
)

// tag of the images. It is no release's, so that no node has another image of this name.
const tag = "dev"

var programs = []string{"manager", "processor"}

// LoadImages builds the images and brings them to the node under a tag. Whatever the tag, they are built from this tree.
func (s *Scenario) LoadImages(ctx context.Context, tag string) error {
	root, err := source.Root()
	if err != nil {
		return err
	}
	for _, name := range programs {
		archive := filepath.Join(root, "bin", "images", name+"-"+tag+".tar")
		_, err := image.Build(ctx, image.Options{Name: "docker.io/millrace/" + name + ":" + tag, Main: "./cmd/" + name, Out: archive})
		if err != nil {
			return err
		}
		if err := s.Cluster.LoadImage(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

var crds = []string{"streams.millrace.dev", "consumergroups.millrace.dev", "processors.millrace.dev"}

// refuseOccupied keeps us from a cluster in which somebody uses Millrace: Stop would remove theirs with ours.
func (s *Scenario) refuseOccupied(ctx context.Context) error {
	for _, object := range []string{"namespace/" + SystemNamespace, "crd/" + crds[0]} {
		out, err := s.Cluster.Kubectl(ctx, "get", object, "--ignore-not-found", "--output", "name")
		if err != nil {
			return err
		}
		if strings.TrimSpace(out) != "" {
			return fmt.Errorf("this cluster has %s already; take a cluster without Millrace, or uninstall it, delete its CRDs and namespace", object)
		}
	}
	return nil
}

// Install installs Millrace by its Helm chart, or upgrades it, and returns when the manager is ready. Each of values is one of
// the chart's, as in "manager.replicas=2"; what is not given has its default, whatever it was before.
func (s *Scenario) Install(ctx context.Context, values ...string) error {
	root, err := source.Root()
	if err != nil {
		return err
	}
	s.installed = true
	args := []string{"upgrade", "--install", Release, filepath.Join(root, "charts", "millrace"),
		"--namespace", SystemNamespace, "--create-namespace", "--wait", "--timeout", "3m"}
	for _, value := range append([]string{"manager.image.tag=" + tag, "processor.image.tag=" + tag}, values...) {
		args = append(args, "--set", value)
	}
	_, err = s.Cluster.Helm(ctx, args...)
	if err != nil {
		return fmt.Errorf("install Millrace: %w", err)
	}
	return nil
}

// Uninstall removes the Helm release, as a user would. CustomResourceDefinitions and resources stay, if the chart keeps them.
func (s *Scenario) Uninstall(ctx context.Context) error {
	_, err := s.Cluster.Helm(ctx, "uninstall", Release, "--namespace", SystemNamespace, "--ignore-not-found", "--wait", "--timeout", "2m")
	if err != nil {
		return fmt.Errorf("uninstall Millrace: %w", err)
	}
	return nil
}

// RemoveCRDs deletes what Uninstall leaves of Millrace, and with it every Stream, ConsumerGroup and Processor of the cluster.
func (s *Scenario) RemoveCRDs(ctx context.Context) error {
	_, err := s.Cluster.Kubectl(ctx, append([]string{"delete", "crd", "--ignore-not-found", "--timeout=1m"}, crds...)...)
	return err
}

// removeInstallation removes what Uninstall leaves.
func (s *Scenario) removeInstallation(ctx context.Context) error {
	if err := s.RemoveCRDs(ctx); err != nil {
		return err
	}
	_, err := s.Cluster.Kubectl(ctx, "delete", "namespace", SystemNamespace, "--ignore-not-found", "--timeout=1m")
	s.installed = false
	return err
}
