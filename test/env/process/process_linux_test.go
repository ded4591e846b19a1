package process_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/env/process"
)

// TestMain lets the test binary be the starter that gets killed: with MILLRACE_TEST_STARTER it starts a sleeper, prints
// its id and waits.
func TestMain(m *testing.M) {
	if os.Getenv("MILLRACE_TEST_STARTER") != "" {
		p, err := process.Start(process.Command{Path: "/bin/sleep", Args: []string{"600"}})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(p.Pid())
		select {}
	}
	os.Exit(m.Run())
}

func TestAProcessEndsWithItsStarter(t *testing.T) {
	starter := exec.Command(os.Args[0])
	starter.Env = append(os.Environ(), "MILLRACE_TEST_STARTER=1")
	out, err := starter.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := starter.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("the starter printed no process id")
	}
	pid, err := strconv.Atoi(lines.Text())
	if err != nil {
		t.Fatal(err)
	}
	if !alive(pid) {
		t.Fatal("the process ended before its starter")
	}
	if err := starter.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = starter.Wait() // it was killed, which is its error
	until(t, func() bool { return !alive(pid) })
}

func TestStop(t *testing.T) {
	t.Run("sends the signal and waits for the whole group", func(t *testing.T) {
		p, child := startWithChild(t, "trap 'exit 0' TERM; sleep 600 & echo $!; wait")
		if err := p.Stop(t.Context(), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		until(t, func() bool { return !alive(child) })
	})
	t.Run("kills what does not listen, and says so", func(t *testing.T) {
		p, child := startWithChild(t, "trap '' TERM; sleep 600 & echo $!; while :; do wait; done")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := p.Stop(ctx, syscall.SIGTERM); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("Stop of a deaf process: %v; want an error that says it was killed", err)
		}
		if p.Running() {
			t.Fatal("it still runs")
		}
		until(t, func() bool { return !alive(child) })
	})
}

func TestFrozen(t *testing.T) {
	p, child := startWithChild(t, "sleep 600 & echo $!; wait")
	for _, pid := range []int{p.Pid(), child} {
		if process.Frozen(pid) {
			t.Fatal("a process that runs is frozen")
		}
		_ = syscall.Kill(pid, syscall.SIGSTOP)
		until(t, func() bool { return process.Frozen(pid) })
		_ = syscall.Kill(pid, syscall.SIGCONT)
		until(t, func() bool { return !process.Frozen(pid) })
	}
	p.Kill()
	if !process.Frozen(p.Pid()) {
		t.Fatal("a process that has ended is not frozen")
	}
	until(t, func() bool { return process.Frozen(child) })
}

func TestExitTellsTheEndOfTheLog(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	p, err := process.Start(process.Command{Path: "/bin/sh", Args: []string{"-c", "echo the reason; exit 3"}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if got := p.Exit().Error(); !strings.Contains(got, "exit status 3") || !strings.Contains(got, "the reason") {
		t.Fatalf("Exit says %q", got)
	}
}

func TestTailBeginsWithAWholeLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("first line\nsecond\nthird\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for size, want := range map[int64]string{1000: "first line\nsecond\nthird\n", 15: "second\nthird\n", 7: "third\n"} {
		if got := process.Tail(path, size); got != want {
			t.Errorf("the last %d bytes: %q, want %q", size, got, want)
		}
	}
}

// startWithChild runs a shell script that starts one process and prints its id.
func startWithChild(t *testing.T, script string) (*process.Process, int) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	p, err := process.Start(process.Command{Path: "/bin/sh", Args: []string{"-c", script}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	var child int
	until(t, func() bool {
		child, err = strconv.Atoi(strings.TrimSpace(process.Tail(log, 100)))
		return err == nil
	})
	return p, child
}

// alive tells whether the process exists and is more than a zombie.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func until(t *testing.T, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen within ten seconds")
		}
		time.Sleep(5 * time.Millisecond)
	}
}
