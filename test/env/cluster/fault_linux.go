package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/test/env/process"
)

// slotFaults break a cluster of this machine, whichever process started it.
type slotFaults struct {
	slot     *slot
	programs string
}

func (f *slotFaults) signal(ctx context.Context, container, signal string) error {
	return f.slot.ctr(ctx, f.programs, "tasks", "kill", "--signal", signal, container)
}

// running is a process of the cluster, with what is needed to start it again.
type running struct {
	pid  int
	name string
	args []string
}

func (f *slotFaults) stop(ctx context.Context, programs []string) (func(context.Context) error, error) {
	all, err := f.slot.running(programs...)
	if err != nil {
		return nil, err
	}
	for _, name := range programs {
		if !slices.ContainsFunc(all, func(r running) bool { return r.name == name }) {
			return nil, fmt.Errorf("%s does not run", name)
		}
	}
	pids := make([]int, len(all))
	for i, r := range all {
		pids[i] = r.pid
	}
	if err := process.KillAll(ctx, pids); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return f.start(ctx, programs, all) }, nil
}

// start starts what was stopped, in the order of programs, and waits until what others need answers.
func (f *slotFaults) start(ctx context.Context, programs []string, stopped []running) error {
	for _, name := range programs {
		for _, r := range stopped {
			if r.name != name {
				continue
			}
			p, err := f.slot.start(f.programs, f.slot.isKept(), r.name, r.args...)
			if err != nil {
				return err
			}
			if err := f.answers(ctx, p, name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *slotFaults) answers(ctx context.Context, p *process.Process, name string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return poll(ctx, name, []*process.Process{p}, func(ctx context.Context) error {
		switch name {
		case "kube-apiserver":
			_, err := f.slot.cluster(f.programs, nil).Kubectl(ctx, "--request-timeout=5s", "get", "--raw", "/readyz")
			return err
		case "containerd":
			return f.slot.ctr(ctx, f.programs, "containers", "list")
		}
		return nil
	})
}

// running lists the processes of these programs that run in the cluster's own process namespace.
func (s *slot) running(programs ...string) ([]running, error) {
	namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", s.initPid()))
	if err != nil {
		return nil, fmt.Errorf("find the cluster's processes: %w", err)
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var all []running
	for _, dir := range dirs {
		// What ends while we look is not there.
		if of, err := os.Readlink(dir + "/ns/pid"); err != nil || of != namespace {
			continue
		}
		line, err := os.ReadFile(dir + "/cmdline")
		if err != nil {
			continue
		}
		words := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
		if name := filepath.Base(words[0]); slices.Contains(programs, name) {
			pid, err := strconv.Atoi(filepath.Base(dir))
			if err != nil {
				return nil, err
			}
			all = append(all, running{pid: pid, name: name, args: words[1:]})
		}
	}
	return all, nil
}

// forgetMemory unmounts and removes what a machine has in memory only: sandboxes, network namespaces and addresses of pods
// below /run, Secrets below /var/lib/kubelet. Innermost mounts come first.
const forgetMemory = `
mounts() { cut -d' ' -f2 /proc/mounts | grep -e '^/run/' -e '^/var/lib/kubelet/' | sort -r; }
for try in 1 2 3; do
  mounts | while read -r mount; do umount -l "$mount"; done
done
[ -z "$(mounts)" ]
find /run -mindepth 1 -delete
`

func (f *slotFaults) powerOff(ctx context.Context) (func(context.Context) error, error) {
	agents := []string{"containerd", "kubelet"}
	on, err := f.stop(ctx, agents) // first, because they start pods again
	if err != nil {
		return nil, err
	}
	shims, err := f.slot.running("containerd-shim-runc-v2")
	if err != nil {
		return nil, err
	}
	pids := make([]int, len(shims))
	for i, r := range shims {
		pids[i] = r.pid
	}
	inPods, err := processesIn(f.slot.cgroup())
	if err != nil {
		return nil, err
	}
	if err := process.KillAll(ctx, append(pids, inPods...)); err != nil {
		return nil, err
	}
	// The kubelet would look for the containers of every group that it finds, for seconds each.
	if err := removeCgroups(ctx, filepath.Join(f.slot.cgroup(), "kubepods")); err != nil {
		return nil, err
	}
	line := f.slot.inside("/bin/bash", "-ec", forgetMemory)
	if out, err := exec.CommandContext(ctx, line[0], line[1:]...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("forget what was in memory: %w: %s", err, bytes.TrimSpace(out))
	}
	return on, nil
}

// processesIn lists the processes in a cgroup and in those below it.
func processesIn(name string) ([]int, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, root := range roots {
		err := filepath.WalkDir(filepath.Join(root, name), func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, os.ErrNotExist) {
				return nil // a hierarchy without it, or one that went while we looked
			}
			if err != nil || entry.Name() != "cgroup.procs" {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return nil //nolint:nilerr // the group went while we looked
			}
			for _, word := range strings.Fields(string(text)) {
				// Zero is a process that this namespace does not show.
				if pid, err := strconv.Atoi(word); err == nil && pid > 0 && !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list the pods' processes: %w", err)
		}
	}
	return pids, nil
}
