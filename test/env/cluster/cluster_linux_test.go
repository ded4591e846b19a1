package cluster_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/millrace-dev/millrace/test/env/cluster"
	"github.com/millrace-dev/millrace/test/env/image"
)

// TestMain lets the test binary be the process that is killed: with MILLRACE_TEST_UP it prints the kubeconfig of a new
// cluster and waits, and with MILLRACE_TEST_ETCD it starts a server as envtest does.
func TestMain(m *testing.M) {
	if os.Getenv("MILLRACE_TEST_ETCD") != "" {
		startEtcd()
	}
	if os.Getenv("MILLRACE_TEST_UP") != "" {
		c, err := cluster.Up(context.Background(), cluster.Options{})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(c.Kubeconfig())
		select {}
	}
	os.Exit(m.Run())
}

const probe = `
apiVersion: v1
kind: Pod
metadata: {name: probe, labels: {app: probe}}
spec:
  containers:
  - name: probe
    image: docker.io/millrace/probe:test
    imagePullPolicy: Never
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
    securityContext: {runAsNonRoot: true, readOnlyRootFilesystem: true, allowPrivilegeEscalation: false}
---
apiVersion: v1
kind: Service
metadata: {name: probe}
spec: {selector: {app: probe}, ports: [{port: 80, targetPort: 8080}]}
`

func TestRealPods(t *testing.T) {
	t.Setenv("CLUSTER", "")
	ctx := t.Context()
	c, err := cluster.Up(ctx, cluster.Options{})
	if err != nil {
		t.Fatal(err)
	}
	state := filepath.Dir(filepath.Dir(c.Kubeconfig()))
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs())
		}
		if err := c.Down(context.Background()); err != nil {
			t.Error(err)
		}
		if left := leftovers(t, state); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})

	archive := filepath.Join(t.TempDir(), "probe.tar")
	if _, err := image.Build(ctx, image.Options{Name: "docker.io/millrace/probe:test", Main: "./test/env/cluster/testdata/probe", Out: archive}); err != nil {
		t.Fatal(err)
	}
	if err := c.LoadImage(ctx, archive); err != nil {
		t.Fatal(err)
	}
	if err := c.Apply(ctx, probe); err != nil {
		t.Fatal(err)
	}
	kubectl(t, c, "wait", "--for=condition=Ready", "pod/probe", "--timeout=60s")
	pod := "http://" + net.JoinHostPort(kubectl(t, c, "get", "pod", "probe", "-o", "jsonpath={.status.podIP}"), "8080")

	t.Run("are reached from this machine", func(t *testing.T) {
		fetch(t, pod, "hello from the probe")
	})
	t.Run("reach servers of this machine at HostIP", func(t *testing.T) {
		listener, err := net.Listen("tcp", net.JoinHostPort(c.HostIP(), "0"))
		if err != nil {
			t.Fatal(err)
		}
		server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "hello from this machine")
		})}}
		server.Start()
		t.Cleanup(server.Close)
		fetch(t, pod+"?url="+url.QueryEscape(server.URL), "hello from this machine")
	})
	t.Run("reach each other by the address of a Service", func(t *testing.T) {
		service := kubectl(t, c, "get", "service", "probe", "-o", "jsonpath={.spec.clusterIP}")
		fetch(t, pod+"?url="+url.QueryEscape("http://"+service), "hello from the probe")
	})
	t.Run("have logs", func(t *testing.T) {
		if got := kubectl(t, c, "logs", "probe"); !strings.Contains(got, "probe is listening") {
			t.Fatalf("logs: %q", got)
		}
	})
	t.Run("go on without the API server, kubelet and containerd", func(t *testing.T) {
		began := started(t, c)
		api, err := c.StopControlPlane(ctx)
		if err != nil {
			t.Fatal(err)
		}
		agents, err := c.StopNodeAgents(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Kubectl(ctx, "get", "nodes", "--request-timeout=2s"); err == nil {
			t.Error("the API server answers, although it was stopped")
		}
		fetch(t, pod, "hello from the probe")
		if err := errors.Join(api(ctx), agents(ctx)); err != nil {
			t.Fatal(err)
		}
		kubectl(t, c, "wait", "--for=condition=Ready", "node", "--all", "--timeout=60s")
		if again := started(t, c); again != began {
			t.Errorf("the pod started at %s and again at %s", began, again)
		}
	})
	t.Run("start again when the node was off", func(t *testing.T) {
		began := started(t, c)
		on, err := c.PowerOff(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if response, err := (&http.Client{Timeout: time.Second}).Get(pod); err == nil {
			response.Body.Close()
			t.Error("the pod answers, although its node is off")
		}
		if err := on(ctx); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(time.Minute)
		for again := ""; again == "" || again == began; again = started(t, c) {
			if time.Now().After(deadline) {
				t.Fatal("the pod did not start again")
			}
			time.Sleep(100 * time.Millisecond)
		}
		kubectl(t, c, "wait", "--for=condition=Ready", "pod/probe", "--timeout=60s")
		fetch(t, "http://"+net.JoinHostPort(kubectl(t, c, "get", "pod", "probe", "-o", "jsonpath={.status.podIP}"), "8080"), "hello from the probe")
	})
	t.Run("end when they are deleted", func(t *testing.T) {
		kubectl(t, c, "delete", "pod", "probe", "--timeout=60s")
	})
	t.Run("have a server with the version that is pinned", func(t *testing.T) {
		if got := kubectl(t, c, "version", "-o", "json"); strings.Contains(got, "v0.0.0") {
			t.Fatalf("version: %s", got)
		}
	})
}

func TestAClusterEndsWithItsStarter(t *testing.T) {
	t.Setenv("CLUSTER", "")
	starter := exec.Command(os.Args[0])
	starter.Env = append(os.Environ(), "MILLRACE_TEST_UP=1")
	starter.Stderr = os.Stderr
	out, err := starter.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := starter.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatalf("the starter printed no kubeconfig: %v", starter.Wait())
	}
	state := filepath.Dir(filepath.Dir(lines.Text()))
	if left := leftovers(t, state); len(left) < 3 {
		t.Fatalf("a running cluster shows only %v; this test looks for the wrong things", left)
	}
	if err := starter.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = starter.Wait() // it was killed, which is its error

	// Files and cgroups wait for the next start; Down does the same.
	deadline := time.Now().Add(30 * time.Second)
	for {
		if _, err := cluster.Down(t.Context()); err != nil {
			t.Fatal(err)
		}
		left := leftovers(t, state)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind: %v", left)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestAKeptClusterIsFoundAndEnded(t *testing.T) {
	t.Setenv("CLUSTER", "up")
	if _, err := cluster.Up(t.Context(), cluster.Options{}); err == nil {
		t.Fatal("make cluster-up has started a cluster, and this test would end it; run: make cluster-down")
	}
	kept, err := cluster.Up(t.Context(), cluster.Options{Keep: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kept.Down(context.Background()) })
	found, err := cluster.Up(t.Context(), cluster.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := found.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	kubectl(t, found, "get", "nodes") // Down of a cluster that was only found leaves it alone
	ended, err := cluster.Down(t.Context())
	if err != nil || ended != 1 {
		t.Fatalf("ended %d clusters, error %v; want one", ended, err)
	}
	// Its processes are killed from inside; what started them outside notices a moment later.
	deadline := time.Now().Add(30 * time.Second)
	for {
		left := leftovers(t, filepath.Dir(filepath.Dir(found.Kubeconfig())))
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind: %v", left)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// started is when the probe's container was started; empty while it does not run.
func started(t *testing.T, c *cluster.Cluster) string {
	t.Helper()
	return kubectl(t, c, "get", "pod", "probe", "-o", "jsonpath={.status.containerStatuses[0].state.running.startedAt}")
}

// leftovers lists what a cluster with this state directory shows on the machine.
func leftovers(t *testing.T, state string) []string {
	t.Helper()
	slot := filepath.Base(state)
	var left []string
	for _, pattern := range []string{state, "/sys/class/net/millrace" + slot, "/sys/fs/cgroup/*/millrace-" + slot, "/sys/fs/cgroup/millrace-" + slot} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), state) {
		left = append(left, "mounts of "+state)
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range commands {
		if command, err := os.ReadFile(file); err == nil && strings.Contains(string(command), state+"/") {
			left = append(left, strings.ReplaceAll(string(command), "\x00", " "))
		}
	}
	return left
}

func kubectl(t *testing.T, c *cluster.Cluster, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// fetch waits until the URL gives the text; a new Service takes a moment to reach the node's rules.
func fetch(t *testing.T, url, want string) {
	t.Helper()
	client := http.Client{Timeout: 5 * time.Second}
	ask := func() string {
		response, err := client.Get(url)
		if err != nil {
			return err.Error()
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			return err.Error()
		}
		return string(body)
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		got := ask()
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s gives %q, want %q", url, got, want)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
