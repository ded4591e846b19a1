// Package process runs the servers of the test environment so that none of them outlives its test.
//
// Invariants:
//
//	I1  A process started here gets its death signal when the starting process ends, also by SIGKILL (Linux), unless
//	    it was started to outlive it.
//	I2  When Stop or Kill returns, the process and everything in its process group has ended.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Command says what to run, and as whom.
type Command struct {
	Path string
	Args []string
	Env  []string // added to the environment of the caller
	Dir  string
	// Log is the file that standard output and standard error are appended to. Empty: they are dropped.
	Log string
	// User is whom the process runs as; nil is the caller.
	User *User
	// DeathSignal is what the process gets when its starter ends; zero is SIGKILL.
	DeathSignal syscall.Signal
	// Files are open files that the process inherits, from descriptor 3 on.
	Files []*os.File
	// Outlive lets the process go on when its starter ends: it gets a session of its own and no death signal.
	Outlive bool
	// Attributes, when set, changes how the process is made, for example its namespaces.
	Attributes func(*syscall.SysProcAttr)
}

// User is an account of this machine.
type User struct {
	Name     string
	UID, GID int
}

// Unprivileged returns the first of the named accounts that exists when the caller is root, and nil when the caller is
// not root and can only run things as itself.
func Unprivileged(names ...string) (*User, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	for _, name := range names {
		account, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uidErr := strconv.Atoi(account.Uid)
		gid, gidErr := strconv.Atoi(account.Gid)
		if uidErr == nil && gidErr == nil {
			return &User{Name: name, UID: uid, GID: gid}, nil
		}
	}
	return nil, fmt.Errorf("find an account without privileges: none of %q exists", names)
}

// Process is a started command. Its methods may be called from several goroutines.
type Process struct {
	command Command
	cmd     *exec.Cmd
	done    chan struct{}
	err     error // set before done is closed
}

// Start runs the command in a process group of its own.
func Start(c Command) (*Process, error) {
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Dir = c.Dir
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.ExtraFiles = c.Files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: !c.Outlive, Setsid: c.Outlive}
	if c.User != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(c.User.UID), Gid: uint32(c.User.GID)}
		cmd.Env = append(cmd.Env, "HOME=/", "USER="+c.User.Name)
	}
	switch {
	case c.Outlive:
	case c.DeathSignal == 0:
		setDeathSignal(cmd.SysProcAttr, syscall.SIGKILL)
	default:
		setDeathSignal(cmd.SysProcAttr, c.DeathSignal)
	}
	if c.Attributes != nil {
		c.Attributes(cmd.SysProcAttr)
	}

	if c.Log != "" {
		log, err := os.OpenFile(c.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", filepath.Base(c.Path), err)
		}
		defer log.Close()
		cmd.Stdout, cmd.Stderr = log, log
	}
	if err := startOnKeptThread(cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(c.Path), err)
	}
	p := &Process{command: c, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// The kernel sends the death signal when the starting thread ends, not the process, and Go ends threads when it likes
// (golang.org/issue/27505). So one goroutine keeps one thread for good, and everything is started from there.
var starter = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

func startOnKeptThread(cmd *exec.Cmd) error {
	result := make(chan error)
	starter() <- func() { result <- cmd.Start() }
	return <-result
}

// Name is the base name of the program.
func (p *Process) Name() string { return filepath.Base(p.command.Path) }

// Pid is the process id, which is also the id of the process group.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Running tells whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Exit describes an ended process: its status and the last lines of its log. It is nil while the process runs.
func (p *Process) Exit() error {
	if p.Running() {
		return nil
	}
	status := "exit status 0"
	if p.err != nil {
		status = p.err.Error()
	}
	return fmt.Errorf("%s ended: %s\n%s", p.Name(), status, p.LogTail())
}

// LogTail returns the last lines of the log file.
func (p *Process) LogTail() string { return Tail(p.command.Log, 3000) }

// Signal sends a signal to the process alone.
func (p *Process) Signal(s syscall.Signal) error {
	if !p.Running() {
		return os.ErrProcessDone
	}
	return p.cmd.Process.Signal(s)
}

// Stop asks the process to end with the given signal and waits. When ctx ends first, the group is killed, and the
// error says so.
func (p *Process) Stop(ctx context.Context, s syscall.Signal) error {
	if err := p.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.Name(), err)
	}
	select {
	case <-p.done:
		p.killGroup()
		return nil
	case <-ctx.Done():
		p.Kill()
		return fmt.Errorf("stop %s: killed, because it did not end in time: %w\n%s", p.Name(), ctx.Err(), p.LogTail())
	}
}

// Kill ends the process and its process group with SIGKILL and waits until the process is gone.
func (p *Process) Kill() {
	p.killGroup()
	<-p.done
}

func (p *Process) killGroup() {
	// The group's id stays reserved while a member lives, and a group without members answers ESRCH.
	_ = syscall.Kill(-p.Pid(), syscall.SIGKILL)
}

// KillAll ends processes that are not children of the caller, such as the children of a server, and waits until they
// have ended.
func KillAll(ctx context.Context, pids []int) error {
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		for !gone(pid) {
			select {
			case <-ctx.Done():
				return fmt.Errorf("wait for the end of process %d: %w", pid, ctx.Err())
			case <-poll.C:
			}
		}
	}
	return nil
}

// Tail returns at most size bytes of the end of a file, beginning with a whole line; empty when there is no file.
func Tail(path string, size int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return ""
	}
	begin := max(0, end-size)
	text := make([]byte, end-begin)
	n, _ := f.ReadAt(text, begin)
	text = text[:n]
	if begin > 0 {
		if newline := bytes.IndexByte(text, '\n'); newline >= 0 {
			text = text[newline+1:]
		}
	}
	return string(text)
}
