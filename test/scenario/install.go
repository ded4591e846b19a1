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

// loadImages builds the images and brings them to the node.
func (s *Scenario) loadImages(ctx context.Context) error {
	root, err := source.Root()
	if err != nil {
		return err
	}
	for _, name := range programs {
		archive := filepath.Join(root, "bin", "images", name+".tar")
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

// Install installs Millrace by its Helm chart and returns when the manager is ready.
func (s *Scenario) Install(ctx context.Context) error {
	root, err := source.Root()
	if err != nil {
		return err
	}
	s.installed = true
	_, err = s.Cluster.Helm(ctx, "upgrade", "--install", Release, filepath.Join(root, "charts", "millrace"),
		"--namespace", SystemNamespace, "--create-namespace",
		"--set", "manager.image.tag="+tag, "--set", "processor.image.tag="+tag,
		"--wait", "--timeout", "3m")
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

// removeInstallation removes what Uninstall leaves.
func (s *Scenario) removeInstallation(ctx context.Context) error {
	_, err := s.Cluster.Kubectl(ctx, append([]string{"delete", "crd", "--ignore-not-found", "--timeout=1m"}, crds...)...)
	if err != nil {
		return err
	}
	_, err = s.Cluster.Kubectl(ctx, "delete", "namespace", SystemNamespace, "--ignore-not-found", "--timeout=1m")
	s.installed = false
	return err
}
