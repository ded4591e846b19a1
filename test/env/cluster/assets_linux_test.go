package cluster_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/env/cluster"
)

// startEtcd is what envtest does, in a process that is then killed.
func startEtcd() {
	assets, err := cluster.Assets(context.Background())
	if err == nil {
		err = exec.Command(filepath.Join(assets, "etcd"), "--data-dir", os.Getenv("MILLRACE_TEST_ETCD"),
			"--listen-client-urls=http://127.0.0.1:0", "--advertise-client-urls=http://127.0.0.1:0", "--listen-peer-urls=http://127.0.0.1:0").Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("started")
	select {}
}

func TestServersOfEnvtestEndWithAKilledTest(t *testing.T) {
	data := t.TempDir()
	starter := exec.Command(os.Args[0])
	starter.Env = append(os.Environ(), "MILLRACE_TEST_ETCD="+data, "KUBEBUILDER_ASSETS=")
	starter.Stderr = os.Stderr
	out, err := starter.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := starter.Start(); err != nil {
		t.Fatal(err)
	}
	if !bufio.NewScanner(out).Scan() {
		t.Fatalf("the starter started nothing: %v", starter.Wait())
	}
	running := func() bool {
		commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range commands {
			if command, err := os.ReadFile(file); err == nil && strings.HasPrefix(filepath.Base(strings.Split(string(command), "\x00")[0]), "etcd") &&
				strings.Contains(string(command), data) {
				return true
			}
		}
		return false
	}
	await(t, "etcd runs", running)
	if err := starter.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = starter.Wait() // it was killed, which is its error
	await(t, "etcd has ended", func() bool { return !running() })
}

func await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("not within twenty seconds: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
