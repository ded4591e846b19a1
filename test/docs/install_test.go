package docs

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/millrace-dev/millrace/internal/controller"
	"github.com/millrace-dev/millrace/test/env/apiserver"
	"github.com/millrace-dev/millrace/test/env/tools"
)

// TestSeed_D03_HelmInstall does what install.md, upgrade.md and security.md say, from top to bottom, with real helm and kubectl on a Kubernetes API
// server of its own, from the root of the source tree. This test plays the nodes: every Deployment gets its pods, and the pod of helm test
// succeeds; what that pod really says is tested in cmd/manager. What a text block shows has to be
// printed by the command before it.
func TestSeed_D03_HelmInstall(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	env, err := apiserver.New(ctx)
	must(t, err)
	// Before Start: one that fails half-way leaves its servers running.
	t.Cleanup(func() { must(t, env.Stop()) })
	cfg, err := env.Start()
	must(t, err)
	user, err := env.AddUser(envtest.User{Name: "reader-of-the-docs", Groups: []string{"system:masters"}}, nil)
	must(t, err)
	text, err := user.KubeConfig()
	must(t, err)
	home := t.TempDir()
	kubeconfig := filepath.Join(home, "kubeconfig")
	must(t, os.WriteFile(kubeconfig, text, 0o600))
	programs, err := tools.Ensure(ctx, os.Stderr, "helm", "kubectl")
	must(t, err)
	environment := append(os.Environ(), "KUBECONFIG="+kubeconfig, "PATH="+programs+":"+os.Getenv("PATH"),
		"HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	api, err := client.New(cfg, client.Options{Scheme: controller.Scheme()})
	must(t, err)
	playing, stop := context.WithCancel(ctx)
	played := make(chan struct{})
	go func() {
		defer close(played)
		playNodes(playing, api)
	}()
	t.Cleanup(func() {
		stop()
		<-played
	})

	run := func(script, shows string) {
		t.Helper()
		cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", script)
		cmd.Dir, cmd.Env = filepath.Join("..", ".."), environment
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s\n%v\n%s", script, err, out)
		}
		if !strings.Contains(string(out), shows) {
			t.Fatalf("%s\nprints\n%s\nand not\n%s", script, out, shows)
		}
	}
	follow := func(document string) {
		t.Helper()
		text, err := os.ReadFile(filepath.Join("..", "..", "docs", document))
		must(t, err)
		blocks := regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$").FindAllStringSubmatch(string(text), -1)
		for i, b := range blocks {
			kind, body, shows := b[1], b[2], ""
			if i+1 < len(blocks) && blocks[i+1][1] == "text" {
				shows = blocks[i+1][2]
			}
			switch kind {
			case "sh":
				run(body, shows)
			case "yaml":
				file := filepath.Join(home, "manifest.yaml")
				must(t, os.WriteFile(file, []byte(body), 0o600))
				run("kubectl apply --filename "+file, "")
			case "text", "sql": // shown by the block before; run by TestEverySQLBlockRuns
			default:
				t.Errorf("%s: a block of %q that nobody runs:\n%s", document, kind, body)
			}
		}
	}
	follow("install.md")
	// The state in which upgrade.md finds its reader.
	run("helm install millrace charts/millrace/testdata/millrace-0.1.0.tgz --namespace millrace-system --wait", "")
	follow("upgrade.md")
	follow("security.md")
}

// playNodes gives every Deployment its pods at once, and lets pods of helm test succeed, until ctx ends.
func playNodes(ctx context.Context, api client.Client) {
	for {
		var deployments appsv1.DeploymentList
		var pods corev1.PodList
		_ = api.List(ctx, &deployments)
		_ = api.List(ctx, &pods, client.MatchingLabels{"app.kubernetes.io/component": "test"})
		for _, d := range deployments.Items {
			n := *d.Spec.Replicas
			d.Status = appsv1.DeploymentStatus{
				ObservedGeneration: d.Generation, Replicas: n, UpdatedReplicas: n, ReadyReplicas: n, AvailableReplicas: n,
				Conditions: []appsv1.DeploymentCondition{
					{Type: appsv1.DeploymentAvailable, Status: corev1.ConditionTrue},
					{Type: appsv1.DeploymentProgressing, Status: corev1.ConditionTrue, Reason: "NewReplicaSetAvailable"},
				},
			}
			_ = api.Status().Update(ctx, &d) // the next round tries again
		}
		for _, p := range pods.Items {
			p.Status.Phase = corev1.PodSucceeded
			_ = api.Status().Update(ctx, &p)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}
