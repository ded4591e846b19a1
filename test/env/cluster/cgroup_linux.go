package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const cgroupMount = "/sys/fs/cgroup"

// hierarchies are the roots of the machine's cgroup trees: one on cgroup v2, one for each controller on v1.
func hierarchies() ([]string, error) {
	if _, err := os.Stat(filepath.Join(cgroupMount, "cgroup.controllers")); err == nil {
		return []string{cgroupMount}, nil
	}
	entries, err := os.ReadDir(cgroupMount)
	if err != nil {
		return nil, fmt.Errorf("find the cgroups: %w", err)
	}
	var roots []string
	for _, entry := range entries {
		// A link is a second name (cpu for cpu,cpuacct).
		if root := filepath.Join(cgroupMount, entry.Name()); entry.IsDir() {
			roots = append(roots, root)
		}
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("find the cgroups: nothing is mounted below %s", cgroupMount)
	}
	return roots, nil
}

// makeCgroups makes the parent of everything that the kubelet puts into cgroups.
func makeCgroups(name string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		group := filepath.Join(root, name)
		if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make a cgroup: %w", err)
		}
		if err := delegate(root, group); err != nil {
			return fmt.Errorf("make a cgroup: %w", err)
		}
		// On v1 a new cpuset has no processors and no memory, and nothing can join it.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if err := copyFile(filepath.Join(root, file), filepath.Join(group, file)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("make a cgroup: %w", err)
			}
		}
	}
	return nil
}

// delegate lets groups below group use the controllers that the kubelet asks for. It is for cgroup v2, where a group has
// no more than its parent hands down; on v1 there is nothing to do.
func delegate(root, group string) error {
	available, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if errors.Is(err, os.ErrNotExist) || root != cgroupMount {
		return nil // v1, or the tree without controllers beside v1
	}
	if err != nil {
		return err
	}
	for _, parent := range []string{root, group} {
		file := filepath.Join(parent, "cgroup.subtree_control")
		enabled, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		for _, controller := range []string{"cpu", "cpuset", "memory", "hugetlb", "pids"} {
			if !slices.Contains(strings.Fields(string(available)), controller) || slices.Contains(strings.Fields(string(enabled)), controller) {
				continue
			}
			if err := os.WriteFile(file, []byte("+"+controller), 0); err != nil {
				return fmt.Errorf("hand down the controller %s: %w; in a container, its processes have to be in a group below its root", controller, err)
			}
		}
	}
	return nil
}

func copyFile(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, 0)
}

// removeCgroups removes the groups of a cluster without processes, children first.
func removeCgroups(ctx context.Context, name string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for _, root := range roots {
		var groups []string
		err := filepath.WalkDir(filepath.Join(root, name), func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				groups = append(groups, path)
			}
			return err
		})
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		for _, group := range slices.Backward(groups) {
			// The kernel lets go of a process's group shortly after the process.
			err := poll(ctx, "an empty cgroup", nil, func(context.Context) error {
				if err := syscall.Rmdir(group); err != nil && !errors.Is(err, syscall.ENOENT) {
					return fmt.Errorf("remove %s: %w", group, err)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
