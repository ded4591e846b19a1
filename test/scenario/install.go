package scenario

import (
	"context"
	"fmt"
	"path/filepath"

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
	_, err := s.Cluster.Kubectl(ctx, "delete", "crd", "streams.millrace.dev", "consumergroups.millrace.dev", "processors.millrace.dev",
		"--ignore-not-found", "--timeout=1m")
	if err != nil {
		return err
	}
	_, err = s.Cluster.Kubectl(ctx, "delete", "namespace", SystemNamespace, "--ignore-not-found", "--wait=false")
	s.installed = false
	return err
}
