package dirs_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/millrace-dev/millrace/test/env/dirs"
)

// TestMain lets the test binary be the other process: with MILLRACE_TEST_HOLD it makes a run directory, prints it and
// waits to be killed.
func TestMain(m *testing.M) {
	if os.Getenv("MILLRACE_TEST_HOLD") != "" {
		run, err := dirs.NewRun("held")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(run.Path)
		select {}
	}
	os.Exit(m.Run())
}

func TestADirectoryLivesAsLongAsItsProcess(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	other := exec.Command(os.Args[0])
	other.Env = append(os.Environ(), "MILLRACE_TEST_HOLD=1")
	other.Stderr = os.Stderr
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("the other process printed no directory")
	}
	held := lines.Text()
	if err := os.WriteFile(filepath.Join(held, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}

	sweepBy(t)
	if _, err := os.Stat(filepath.Join(held, "file")); err != nil {
		t.Fatalf("a start removed the directory of a living process: %v", err)
	}
	if err := other.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = other.Wait() // it was killed, which is its error
	sweepBy(t)
	if _, err := os.Stat(held); !os.IsNotExist(err) {
		t.Fatalf("a start left the directory of a dead process: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(held), "*")); err != nil || len(left) != 0 {
		t.Fatalf("left behind: %v, error %v", left, err)
	}
}

// sweepBy makes and removes a run directory, because making one sweeps.
func sweepBy(t *testing.T) {
	t.Helper()
	run, err := dirs.NewRun("sweeper")
	if err != nil {
		t.Fatal(err)
	}
	if err := run.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := run.Remove(); err != nil {
		t.Fatalf("a second Remove: %v", err)
	}
}

func TestCacheIsWhereTheVariableSays(t *testing.T) {
	t.Setenv("MILLRACE_CACHE", "/somewhere")
	got, err := dirs.Cache("a", "b")
	if err != nil || got != "/somewhere/a/b" {
		t.Fatalf("Cache is %q, error %v", got, err)
	}
}
