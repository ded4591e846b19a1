package gitops

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/millrace-dev/millrace/test/env/cluster"
	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/process"
	"github.com/millrace-dev/millrace/test/env/redis"
	"github.com/millrace-dev/millrace/test/env/source"
	"github.com/millrace-dev/millrace/test/env/tools"
)

const (
	argocdNamespace = "argocd"
	argocdModule    = "github.com/argoproj/argo-cd/v3"
	startTimeout    = time.Minute
	stopTimeout     = 15 * time.Second
)

// argocdConfiguration is what Argo CD's own installation makes, as far as its controller needs it.
//
//go:embed manifests/argocd.yaml
var argocdConfiguration string

// ArgoCD is a running Argo CD without its web server: application controller, repo server and Redis.
type ArgoCD struct {
	cluster   *cluster.Cluster
	run       *dirs.Run
	redis     *redis.Server
	processes []*process.Process
	crds      []string // files
}

// StartArgoCD brings up Argo CD for a cluster that has none, with the health checks and actions of config/argocd. When it fails, it leaves nothing.
func StartArgoCD(ctx context.Context, c *cluster.Cluster) (_ *ArgoCD, err error) {
	a := &ArgoCD{cluster: c}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start Argo CD: %w\n%s", err, a.Log()), a.Stop(context.WithoutCancel(ctx)))
		}
	}()
	programs, err := tools.Ensure(ctx, os.Stderr, "argocd")
	if err != nil {
		return nil, err
	}
	root, err := source.Root()
	if err != nil {
		return nil, err
	}
	module, err := moduleDir(ctx, filepath.Join(root, "tools", "argocd"), argocdModule)
	if err != nil {
		return nil, err
	}
	if a.run, err = dirs.NewRun("argocd"); err != nil {
		return nil, err
	}
	// The scripts that its image has beside the program.
	for _, script := range []string{"git-verify-wrapper.sh", "gpg-wrapper.sh"} {
		text, err := os.ReadFile(filepath.Join(module, "hack", script))
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(a.run.Path, script), text, 0o755); err != nil {
			return nil, err
		}
	}
	if a.redis, err = redis.Start(ctx, redis.Options{}); err != nil {
		return nil, err
	}

	// Not apply: what Stop removes must not be somebody else's.
	if _, err := c.Kubectl(ctx, "create", "namespace", argocdNamespace); err != nil {
		return nil, err
	}
	for _, kind := range []string{"application", "appproject"} {
		file := filepath.Join(module, "manifests", "crds", kind+"-crd.yaml")
		a.crds = append(a.crds, file)
		if _, err := c.Kubectl(ctx, "create", "-f", file); err != nil {
			return nil, err
		}
	}
	if _, err := c.Kubectl(ctx, "wait", "--for=condition=Established", "crd/applications.argoproj.io", "crd/appprojects.argoproj.io", "--timeout=30s"); err != nil {
		return nil, err
	}
	if err := c.Apply(ctx, argocdConfiguration); err != nil {
		return nil, err
	}
	// The command of docs/gitops.md. Before the controller starts: while it starts, it reads its settings and does not watch them yet.
	_, err = c.Kubectl(ctx, "apply", "--server-side", "--field-manager=millrace", "-f", filepath.Join(root, "config", "argocd", "argocd-cm.yaml"))
	if err != nil {
		return nil, err
	}

	ports := make([]int, 3)
	for i := range ports {
		if ports[i], err = process.FreePort("127.0.0.1"); err != nil {
			return nil, err
		}
	}
	repoServer := "127.0.0.1:" + strconv.Itoa(ports[0])
	program := filepath.Join(programs, "argocd")
	if err := a.start(ctx, program, "argocd-repo-server", repoServer, "--redis", a.redis.Addr(), "--disable-tls", "--client-ca-path=",
		"--address", "127.0.0.1", "--port", strconv.Itoa(ports[0]), "--metrics-address", "127.0.0.1", "--metrics-port", strconv.Itoa(ports[1])); err != nil {
		return nil, err
	}
	if err := a.start(ctx, program, "argocd-application-controller", "127.0.0.1:"+strconv.Itoa(ports[2]), "--redis", a.redis.Addr(),
		"--repo-server", repoServer, "--repo-server-plaintext", "--namespace", argocdNamespace, "--metrics-port", strconv.Itoa(ports[2]),
		// Messages of health belong into the Application, for a test to read.
		"--persist-resource-health"); err != nil {
		return nil, err
	}
	return a, nil
}

// start runs one part of Argo CD and waits until it listens.
func (a *ArgoCD) start(ctx context.Context, program, part, address string, args ...string) error {
	p, err := process.Start(process.Command{
		Path: program, Args: args, Dir: a.run.Path, Log: filepath.Join(a.run.Path, part+".log"),
		Env: append(a.cluster.Env(), "ARGOCD_BINARY_NAME="+part, "PATH="+a.run.Path+":"+os.Getenv("PATH"), "TMPDIR="+a.run.Path, "ARGOCD_ASK_PASS_SOCK="+filepath.Join(a.run.Path, "ask-pass.sock"),
			// The destination https://kubernetes.default.svc is this cluster, though the process is not in it.
			"ARGOCD_FAKE_IN_CLUSTER=true",
			"ARGOCD_GPG_ENABLED=false", "ARGOCD_TLS_DATA_PATH="+a.run.Path, "ARGOCD_SSH_DATA_PATH="+a.run.Path,
			"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1"),
	})
	if err != nil {
		return err
	}
	a.processes = append(a.processes, p)
	return listening(ctx, p, part, address)
}

// listening waits until a process takes connections.
func listening(ctx context.Context, p *process.Process, name, address string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-p.Done():
			return fmt.Errorf("%s: %w", name, p.Exit())
		case <-ctx.Done():
			return fmt.Errorf("%s does not listen on %s: %w", name, address, ctx.Err())
		case <-tick.C:
		}
	}
}

// Log is the end of what the parts said.
func (a *ArgoCD) Log() string {
	var b strings.Builder
	for _, p := range a.processes {
		b.WriteString(p.LogTail())
	}
	return b.String()
}

// Stop removes the Applications, which removes what they had applied, then Argo CD with its CRDs.
func (a *ArgoCD) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var errs []error
	if len(a.processes) == 2 {
		_, err := a.cluster.Kubectl(ctx, "--namespace", argocdNamespace, "delete", "applications", "--all", "--timeout=1m")
		errs = append(errs, err)
	}
	errs = append(errs, stopAll(ctx, a.processes))
	a.processes = nil
	for _, file := range a.crds {
		_, err := a.cluster.Kubectl(ctx, "delete", "-f", file, "--ignore-not-found", "--timeout=30s")
		errs = append(errs, err)
	}
	if a.crds != nil {
		_, err := a.cluster.Kubectl(ctx, "delete", "namespace", argocdNamespace, "--ignore-not-found", "--timeout=1m")
		errs = append(errs, err)
		a.crds = nil
	}
	if a.redis != nil {
		errs = append(errs, a.redis.Stop(ctx))
		a.redis = nil
	}
	if a.run != nil {
		errs = append(errs, a.run.Remove())
		a.run = nil
	}
	return errors.Join(errs...)
}

func stopAll(ctx context.Context, processes []*process.Process) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	var errs []error
	for _, p := range processes {
		errs = append(errs, p.Stop(ctx, syscall.SIGTERM))
	}
	return errors.Join(errs...)
}

// moduleDir is where Go keeps a module that the go.mod in dir requires.
func moduleDir(ctx context.Context, dir, module string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", module)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("find module %s: %w", module, err)
	}
	return strings.TrimSpace(string(out)), nil
}
