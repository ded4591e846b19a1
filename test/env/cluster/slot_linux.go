package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/millrace-dev/millrace/test/env/process"
)

// slots is how many clusters one machine can run at a time; each needs addresses of its own.
const slots = 8

// slot is the place of one cluster: its lock, its state directory and its addresses. The addresses are of
// 198.18.0.0/15, which is set aside for tests between networks and so is unlikely to be in use (RFC 2544).
type slot struct {
	number int
	dir    string
	lock   *os.File // nil when another process runs the cluster
}

func (s *slot) link() string        { return fmt.Sprintf("millrace%d", s.number) }
func (s *slot) cgroup() string      { return fmt.Sprintf("millrace-%d", s.number) }
func (s *slot) hostIP() string      { return fmt.Sprintf("198.18.%d.1", s.number*32) }
func (s *slot) nodeIP() string      { return fmt.Sprintf("198.18.%d.2", s.number*32) }
func (s *slot) podCIDR() string     { return fmt.Sprintf("198.18.%d.0/24", s.number*32+1) }
func (s *slot) serviceCIDR() string { return fmt.Sprintf("198.18.%d.0/20", s.number*32+16) }

// serviceIP is the first address of the services, which the API server takes for itself.
func (s *slot) serviceIP() string { return fmt.Sprintf("198.18.%d.1", s.number*32+16) }

func (s *slot) server() string                { return "https://" + s.nodeIP() + ":6443" }
func (s *slot) path(elem ...string) string    { return filepath.Join(append([]string{s.dir}, elem...)...) }
func (s *slot) logFile(program string) string { return s.path("log", program+".log") }

// initFile holds the process id of init. Who reads it must know that the slot is locked: then the id is not another's.
func (s *slot) initFile() string { return s.path("init.pid") }

// keptFile exists when the cluster is to go on after the process that started it.
func (s *slot) keptFile() string { return s.path("kept") }

// stateRoot is the same for everybody, because links and cgroups are the machine's. Only root gets this far.
const stateRoot = "/var/cache/millrace/cluster"

func slotAt(number int) *slot {
	return &slot{number: number, dir: filepath.Join(stateRoot, strconv.Itoa(number))}
}

// takeSlot locks the first free slot and clears it of what a crashed cluster left.
func takeSlot(ctx context.Context) (*slot, error) {
	for number := range slots {
		s := slotAt(number)
		taken, err := s.tryLock()
		if err != nil {
			return nil, err
		}
		if !taken {
			continue
		}
		if err := s.remove(ctx); err != nil {
			return nil, errors.Join(err, s.unlock())
		}
		return s, nil
	}
	return nil, fmt.Errorf("%d clusters run on this machine, and there is no place for more; end one with make cluster-down", slots)
}

// tryLock takes the slot's lock unless a running cluster has it.
func (s *slot) tryLock() (bool, error) {
	if err := os.MkdirAll(filepath.Dir(s.dir), 0o755); err != nil {
		return false, err
	}
	lock, err := os.OpenFile(s.dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return false, err
	}
	err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, lock.Close()
	}
	if err != nil {
		return false, errors.Join(fmt.Errorf("lock %s: %w", lock.Name(), err), lock.Close())
	}
	s.lock = lock
	return true, nil
}

// unlock closes this process's share of the lock. Init has one too, so the slot of a running cluster stays locked.
func (s *slot) unlock() error {
	if s.lock == nil {
		return nil
	}
	err := s.lock.Close()
	s.lock = nil
	return err
}

// initPid is the process id of the running cluster's init; zero when there is none yet.
func (s *slot) initPid() int {
	text, err := os.ReadFile(s.initFile())
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0
	}
	return pid
}

func (s *slot) exists() bool {
	_, err := os.Stat(s.dir)
	return err == nil
}

func (s *slot) isKept() bool {
	_, err := os.Stat(s.keptFile())
	return err == nil
}

// remove deletes what the kernel does not: cgroups and files. The cluster's mounts were never visible here, so the
// state directory holds plain files only. The caller has the lock and no process of the cluster is left.
func (s *slot) remove(ctx context.Context) error {
	return errors.Join(s.removeLink(ctx), removeCgroups(ctx, s.cgroup()), os.RemoveAll(s.dir))
}

// removeLink waits until the link to the cluster's network namespace is gone. The kernel ends a namespace some time after
// its last process, on a busy machine seconds later, and until then the next cluster could not make its own link.
func (s *slot) removeLink(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return poll(ctx, "the end of link "+s.link(), nil, func(ctx context.Context) error {
		if _, err := os.Stat("/sys/class/net/" + s.link()); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if out, err := exec.CommandContext(ctx, "ip", "link", "delete", s.link()).CombinedOutput(); err != nil {
			return fmt.Errorf("ip link delete: %w: %s", err, bytes.TrimSpace(out)) // the kernel may have been first
		}
		return nil
	})
}

// clear removes what is left of an ended cluster and gives the slot back, unless somebody else has taken it meanwhile,
// who then has cleared it.
func (s *slot) clear(ctx context.Context) error {
	if s.lock == nil {
		if free, err := s.tryLock(); err != nil || !free {
			return err
		}
	}
	return errors.Join(s.remove(ctx), s.unlock())
}

// logs returns the ends of all logs.
func (s *slot) logs(each int64) string {
	files, err := filepath.Glob(s.path("log", "*.log"))
	if err != nil {
		return err.Error()
	}
	slices.Sort(files)
	var all strings.Builder
	for _, file := range files {
		fmt.Fprintf(&all, "== %s\n%s\n", filepath.Base(file), process.Tail(file, each))
	}
	return all.String()
}

// attach returns the cluster that make cluster-up started.
func attach(ctx context.Context, o Options) (*Cluster, error) {
	for number := range slots {
		s := slotAt(number)
		if !s.exists() {
			continue
		}
		free, err := s.tryLock()
		if err != nil {
			return nil, err
		}
		if free {
			if err := s.unlock(); err != nil {
				return nil, err
			}
			continue
		}
		if !s.isKept() {
			continue
		}
		programs, err := allPrograms(ctx, o.Out)
		if err != nil {
			return nil, err
		}
		return s.cluster(programs, nil), nil
	}
	return nil, errors.New("CLUSTER=up, but no cluster is up; run: make cluster-up")
}

// endKept ends the clusters that were started to be kept, and clears the slots of crashed ones.
func endKept(ctx context.Context) (ended int, err error) {
	for number := range slots {
		s := slotAt(number)
		if !s.exists() {
			continue
		}
		free, err := s.tryLock()
		if err != nil {
			return ended, err
		}
		if !free {
			if !s.isKept() {
				continue // a test that runs now ends it
			}
			if err := s.killInit(ctx); err != nil {
				return ended, err
			}
			ended++
		}
		if err := s.clear(ctx); err != nil {
			return ended, err
		}
	}
	return ended, nil
}

// killInit ends the cluster of a slot that another process locked, and takes the lock that this frees.
func (s *slot) killInit(ctx context.Context) error {
	pid := s.initPid()
	if pid == 0 {
		return fmt.Errorf("the cluster in slot %d is just starting; try again", s.number)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return poll(ctx, "the end of the cluster's processes", nil, func(context.Context) error {
		free, err := s.tryLock()
		if err == nil && !free {
			err = errors.New("the slot is still locked")
		}
		return err
	})
}
