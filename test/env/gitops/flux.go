package gitops

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/millrace-dev/millrace/test/env/cluster"
	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/process"
	"github.com/millrace-dev/millrace/test/env/source"
	"github.com/millrace-dev/millrace/test/env/tools"
)

const (
	fluxNamespace = "flux-system"
	fluxModule    = "github.com/fluxcd/kustomize-controller"
)

// fluxSources are the kinds of source that kustomize-controller watches.
//
//go:embed manifests/flux-sources.yaml
var fluxSources string

// Flux is a running kustomize-controller. What a source-controller would do, publish archives of commits, Publish does.
type Flux struct {
	cluster    *cluster.Cluster
	run        *dirs.Run
	controller *process.Process
	archives   *httptest.Server
	crds       []string // files; nil: nothing was made in the cluster
}

// StartFlux brings up kustomize-controller for a cluster that has no Flux, and returns when it works. When it fails, it leaves nothing.
func StartFlux(ctx context.Context, c *cluster.Cluster) (_ *Flux, err error) {
	f := &Flux{cluster: c}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start Flux: %w\n%s", err, f.Log()), f.Stop(context.WithoutCancel(ctx)))
		}
	}()
	programs, err := tools.Ensure(ctx, os.Stderr, "kustomize-controller")
	if err != nil {
		return nil, err
	}
	root, err := source.Root()
	if err != nil {
		return nil, err
	}
	module, err := moduleDir(ctx, filepath.Join(root, "tools", "flux"), fluxModule)
	if err != nil {
		return nil, err
	}
	if f.run, err = dirs.NewRun("flux"); err != nil {
		return nil, err
	}
	sources := filepath.Join(f.run.Path, "sources.yaml")
	if err := os.WriteFile(sources, []byte(fluxSources), 0o600); err != nil {
		return nil, err
	}

	// Not apply: what Stop removes must not be somebody else's.
	if _, err := c.Kubectl(ctx, "create", "namespace", fluxNamespace); err != nil {
		return nil, err
	}
	for _, file := range []string{filepath.Join(module, "config", "crd", "bases", "kustomize.toolkit.fluxcd.io_kustomizations.yaml"), sources} {
		f.crds = append(f.crds, file)
		if _, err := c.Kubectl(ctx, "create", "-f", file); err != nil {
			return nil, err
		}
		if _, err := c.Kubectl(ctx, "wait", "--for=condition=Established", "-f", file, "--timeout=30s"); err != nil {
			return nil, err
		}
	}

	f.archives = httptest.NewServer(http.FileServer(http.Dir(f.run.Path)))
	var ports [2]int
	for i := range ports {
		if ports[i], err = process.FreePort("127.0.0.1"); err != nil {
			return nil, err
		}
	}
	health := "127.0.0.1:" + strconv.Itoa(ports[0])
	f.controller, err = process.Start(process.Command{
		Path: filepath.Join(programs, "kustomize-controller"), Dir: f.run.Path, Log: filepath.Join(f.run.Path, "kustomize-controller.log"),
		Args: []string{"--feature-gates=ExternalArtifact=true", "--health-addr=" + health, "--metrics-addr=127.0.0.1:" + strconv.Itoa(ports[1])},
		Env:  append(c.Env(), "RUNTIME_NAMESPACE="+fluxNamespace, "TMPDIR="+f.run.Path),
	})
	if err != nil {
		return nil, err
	}
	return f, listening(ctx, f.controller, "kustomize-controller", health)
}

// Publish makes the ExternalArtifact of a name hold the last commit of a repository.
func (f *Flux) Publish(ctx context.Context, name string, r *Repository, commit string) error {
	archive := commit + ".tar.gz"
	file := filepath.Join(f.run.Path, archive)
	if err := r.archive(ctx, file); err != nil {
		return err
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	manifest := fmt.Sprintf("apiVersion: source.toolkit.fluxcd.io/v1\nkind: ExternalArtifact\nmetadata: {name: %s, namespace: %s}\n", name, fluxNamespace)
	if err := f.cluster.Apply(ctx, manifest); err != nil {
		return err
	}
	now := time.Now().UTC().Format(time.RFC3339)
	status := fmt.Sprintf(`{"status": {"artifact": {"url": %q, "path": %q, "revision": %q, "digest": "sha256:%x", "lastUpdateTime": %q},
		"conditions": [{"type": "Ready", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": %q}]}}`,
		f.archives.URL+"/"+archive, archive, "main@sha1:"+commit, sha256.Sum256(content), now, now)
	_, err = f.cluster.Kubectl(ctx, "--namespace", fluxNamespace, "patch", "externalartifact", name, "--subresource=status", "--type=merge", "--patch", status)
	return err
}

// Log is the end of what the controller said.
func (f *Flux) Log() string {
	if f.controller == nil {
		return ""
	}
	return f.controller.LogTail()
}

// Stop removes the Kustomizations, which removes what they had applied, then Flux with its CRDs.
func (f *Flux) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var errs []error
	if f.controller != nil {
		_, err := f.cluster.Kubectl(ctx, "--namespace", fluxNamespace, "delete", "kustomizations", "--all", "--timeout=1m")
		errs = append(errs, err, stopAll(ctx, []*process.Process{f.controller}))
		f.controller = nil
	}
	for _, file := range f.crds {
		_, err := f.cluster.Kubectl(ctx, "delete", "-f", file, "--ignore-not-found", "--timeout=30s")
		errs = append(errs, err)
	}
	if f.crds != nil {
		_, err := f.cluster.Kubectl(ctx, "delete", "namespace", fluxNamespace, "--ignore-not-found", "--timeout=1m")
		errs = append(errs, err)
		f.crds = nil
	}
	if f.archives != nil {
		f.archives.Close()
		f.archives = nil
	}
	if f.run != nil {
		errs = append(errs, f.run.Remove())
		f.run = nil
	}
	return errors.Join(errs...)
}
