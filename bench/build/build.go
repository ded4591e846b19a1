// Package build builds the programs that benchmarks run.
package build

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/source"
)

// Program builds a program of a module in the source tree into the cache, and returns its path. Go's own cache makes it quick when nothing has changed.
// Peers are modules of their own, so that what they need is linked with nothing of ours.
func Program(ctx context.Context, log func(string), name, module, pkg string) (string, error) {
	root, err := source.Root()
	if err != nil {
		return "", err
	}
	cache, err := dirs.Cache("bench")
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	program := filepath.Join(cache, name)
	log("building " + name)
	c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, pkg)
	c.Dir = filepath.Join(root, module)
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-buildvcs=false")
	if out, err := c.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", name, err, out)
	}
	return program, nil
}
