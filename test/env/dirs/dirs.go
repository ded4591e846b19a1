// Package dirs says where the test environment keeps its files: a cache that survives, and run directories that
// belong to one process and go away with it.
package dirs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Cache returns a path inside the cache of built and downloaded things. MILLRACE_CACHE names another place.
//
// Root's own cache directory lies in a home that other users cannot enter, and PostgreSQL refuses to run as root, so
// for root the cache is the machine's.
func Cache(elem ...string) (string, error) {
	base := os.Getenv("MILLRACE_CACHE")
	switch {
	case base != "":
	case os.Getuid() == 0:
		base = "/var/cache/millrace"
	default:
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("find the user's cache directory: %w; set MILLRACE_CACHE", err)
		}
		base = filepath.Join(user, "millrace")
	}
	return filepath.Join(append([]string{base}, elem...)...), nil
}

// Run is a directory of this process. The kernel releases its lock when the process ends in whatever way, which is
// how the next process knows that it may remove what is left.
type Run struct {
	Path string
	lock *os.File
}

// NewRun makes a directory for one server of the given kind, and removes those that dead processes left behind.
// Everybody may pass through it (mode 0711), because servers may run as another user than the tests.
func NewRun(kind string) (*Run, error) { return newRun(os.TempDir(), kind) }

// NewMemoryRun is NewRun in a file system that lives in memory, where there is one with enough room: for servers whose files are made
// and removed all the time. ext4 searches long for an inode after many files were removed, which cost two thirds of a test run's CPU time.
func NewMemoryRun(kind string) (*Run, error) {
	const memory, room = "/dev/shm", 4 << 30
	if os.Getenv("TMPDIR") == "" && freeMemory(memory) >= room {
		if run, err := newRun(memory, kind); err == nil {
			return run, nil
		}
	}
	return NewRun(kind)
}

func newRun(parent, kind string) (*Run, error) {
	base := filepath.Join(parent, fmt.Sprintf("millrace-test-%d", os.Getuid()))
	if err := ownDirectory(base); err != nil {
		return nil, err
	}
	sweep(base)
	for {
		lock, err := os.CreateTemp(base, kind+"-*.lock")
		if err != nil {
			return nil, fmt.Errorf("make a run directory: %w", err)
		}
		if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil || !stillThere(lock) {
			// A sweeping process came between creation and lock and took the file for a leftover.
			_ = lock.Close()
			continue
		}
		run := &Run{Path: strings.TrimSuffix(lock.Name(), ".lock"), lock: lock}
		if err := os.Mkdir(run.Path, 0o711); err != nil {
			_ = run.Remove()
			return nil, fmt.Errorf("make a run directory: %w", err)
		}
		return run, nil
	}
}

// Remove deletes the directory and gives the lock back. A second call does nothing.
func (r *Run) Remove() error {
	if r.lock == nil {
		return nil
	}
	err := os.RemoveAll(r.Path)
	err = errors.Join(err, os.Remove(r.lock.Name()), r.lock.Close())
	r.lock = nil
	return err
}

// ownDirectory makes base and refuses one that somebody else made: its name in the shared temporary directory can be
// guessed.
func ownDirectory(base string) error {
	if err := os.Mkdir(base, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make a run directory: %w", err)
	}
	info, err := os.Lstat(base)
	if err != nil {
		return fmt.Errorf("make a run directory: %w", err)
	}
	owner, known := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || known && int(owner.Uid) != os.Getuid() {
		return fmt.Errorf("make a run directory: %s belongs to another user; remove it or set TMPDIR", base)
	}
	return nil
}

// sweep removes the directories whose process has ended. It is best effort: what it cannot remove now, a later call
// removes.
func sweep(base string) {
	locks, err := filepath.Glob(filepath.Join(base, "*.lock"))
	if err != nil {
		return
	}
	for _, name := range locks {
		lock, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil && stillThere(lock) {
			if os.RemoveAll(strings.TrimSuffix(name, ".lock")) == nil {
				_ = os.Remove(name)
			}
		}
		_ = lock.Close()
	}
}

// stillThere tells whether the open file is the one that its name leads to.
func stillThere(f *os.File) bool {
	opened, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(f.Name())
	return err == nil && os.SameFile(opened, named)
}
