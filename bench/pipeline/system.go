package pipeline

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/millrace-dev/millrace/bench/proc"
	"github.com/millrace-dev/millrace/test/env/process"
)

// System is a processor program, and how it is told what to do.
type System struct {
	Name string
	// Build returns the program, after making it when it is missing.
	Build func(ctx context.Context, log func(string)) (string, error)
	// Command completes the arguments and environment of a member of the group.
	Command func(m Member) (args, env []string, err error)
	// Cannot says why the system does not do a work; nothing when it does.
	Cannot func(work string) string
}

// Member is one process of a group.
type Member struct {
	Dir       string // where its files may stand
	RedisURL  string
	DSN       string
	Group     string
	Name      string
	BatchRows int // rows of a write at most; zero: what the system is tuned to
}

// members are running processes of one group.
type members struct {
	system    *System
	processes []*process.Process
}

func (m *members) start(program string, member Member) error {
	dir := filepath.Join(member.Dir, member.Name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	member.Dir = dir
	args, env, err := m.system.Command(member)
	if err != nil {
		return err
	}
	p, err := process.Start(process.Command{Path: program, Args: args, Env: env, Dir: dir, Log: filepath.Join(dir, "log")})
	if err != nil {
		return err
	}
	m.processes = append(m.processes, p)
	return nil
}

// running tells when one of them has ended.
func (m *members) running() error {
	for _, p := range m.processes {
		if !p.Running() {
			return fmt.Errorf("%s has ended: %w", m.system.Name, p.Exit())
		}
	}
	return nil
}

func (m *members) cpu() (time.Duration, error) {
	var sum time.Duration
	for _, p := range m.processes {
		d, err := proc.CPU(p.Pid())
		if err != nil {
			return 0, err
		}
		sum += d
	}
	return sum, nil
}

// stop ends them as Kubernetes would.
func (m *members) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var err error
	for _, p := range m.processes {
		if p.Running() {
			err = errors.Join(err, p.Stop(ctx, syscall.SIGTERM))
		}
	}
	m.processes = nil
	return err
}

// environment is what the configuration files refer to.
func environment(m Member, rows int) []string {
	if m.BatchRows > 0 {
		rows = m.BatchRows
	}
	return []string{"REDIS_URL=" + m.RedisURL, "DATABASE_URL=" + m.DSN, "STREAM=" + streamName, "GROUP=" + m.Group, "CONSUMER=" + m.Name,
		"BATCH=" + strconv.Itoa(rows)}
}
