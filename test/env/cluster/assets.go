package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"github.com/millrace-dev/millrace/test/env/tools"
)

// Assets returns a directory with kube-apiserver, etcd and kubectl, which is what KUBEBUILDER_ASSETS has to name for
// controller-runtime's envtest. The first call on a machine builds them, which takes some minutes; progress goes to
// standard error. When KUBEBUILDER_ASSETS is set, it is returned as it is.
func Assets(ctx context.Context) (string, error) {
	if given := os.Getenv("KUBEBUILDER_ASSETS"); given != "" {
		return given, nil
	}
	programs, err := tools.Ensure(ctx, os.Stderr, "etcd", "kube-apiserver", "kubectl")
	if err != nil {
		return "", err
	}
	if runtime.GOOS != "linux" {
		return programs, nil
	}
	wrapped, err := wrap(programs)
	if err != nil {
		return "", fmt.Errorf("make the directory for envtest: %w", err)
	}
	return wrapped, nil
}

// wrap makes a directory in which the servers get a death signal before they start. Envtest stops its servers only when
// the test lets it, which a test that is killed or runs out of time does not.
func wrap(programs string) (string, error) {
	dir := filepath.Join(filepath.Dir(programs), "envtest-"+filepath.Base(programs))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := os.Symlink(filepath.Join(programs, "kubectl"), filepath.Join(dir, "kubectl")); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	prefix := ""
	if setpriv, err := exec.LookPath("setpriv"); err == nil { // of util-linux, which nearly every system has
		prefix = setpriv + " --pdeathsig KILL "
	}
	for _, name := range []string{"etcd", "kube-apiserver"} {
		script := fmt.Sprintf("#!/bin/sh\nexec %s'%s' \"$@\"\n", prefix, filepath.Join(programs, name))
		if err := replace(filepath.Join(dir, name), script); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// replace writes an executable file so that other processes see the old or the new one, never half of it.
func replace(path, content string) (err error) {
	if there, err := os.ReadFile(path); err == nil && string(there) == content {
		return nil
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	if err := errors.Join(err, f.Chmod(0o755), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), path)
}
