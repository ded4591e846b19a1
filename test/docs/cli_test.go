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

	"github.com/jackc/pgx/v5"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// asProgram makes this binary the program millrace.
const asProgram = "MILLRACE_TEST_CLI"

// TestEveryCommandPrintsWhatThePageShows runs the blocks of docs/cli.md in order, on an empty database: SQL, and what begins with $ in blocks of the kind
// console, where the lines up to the next $ are compared with what it prints. … stands for anything within a line.
func TestEveryCommandPrintsWhatThePageShows(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	dsn := postgres.NewDatabase(t)
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	env := shop(ctx, t, dsn)
	text, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, block := range regexp.MustCompile("(?ms)^```(sql|console)\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		if block[1] == "sql" {
			for _, x := range examples(t, block[2]) {
				x.run(ctx, t, conn, map[string]string{})
			}
			continue
		}
		for _, part := range strings.Split("\n"+block[2], "\n$ ")[1:] {
			command, want, _ := strings.Cut(part, "\n")
			shell := exec.CommandContext(ctx, "bash", "-c", command)
			shell.Env = env
			out, _ := shell.CombinedOutput() // some commands show an error; its text is compared
			if !like(string(out), want) {
				t.Errorf("$ %s\n%sthe page shows\n%s", command, out, want)
			}
			ran++
		}
	}
	if ran == 0 {
		t.Fatal("the page shows no command")
	}
}

// shop makes the namespace of the page, and returns the environment of its commands.
func shop(ctx context.Context, t *testing.T, dsn string) []string {
	t.Helper()
	cfg, err := kubernetes()
	if err != nil {
		t.Fatal(err)
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	api, err := client.New(cfg, client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	stream := &v1alpha1.Stream{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "orders"}}
	stream.Spec.DatabaseSecretRef = &v1alpha1.SecretKeyReference{Name: "app-db", Key: "dsn"}
	for _, o := range []client.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "app-db"}, StringData: map[string]string{"dsn": dsn}},
		stream,
	} {
		if err := api.Create(ctx, o); err != nil {
			t.Fatal(err)
		}
	}
	user, err := server.AddUser(envtest.User{Name: "reader", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := user.KubeConfig()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "kubeconfig"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"millrace": os.Args[0], "kubectl-millrace": os.Args[0], "kubectl": filepath.Join(server.BinaryAssetsDirectory, "kubectl"),
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return append(os.Environ(), asProgram+"=1", "PATH="+dir+":"+os.Getenv("PATH"), "MILLRACE_DATABASE_URL="+dsn, "KUBECONFIG="+filepath.Join(dir, "kubeconfig"))
}

// like compares what was printed with what a page shows.
func like(printed, shown string) bool {
	lines, patterns := strings.Split(strings.TrimSpace(printed), "\n"), strings.Split(strings.TrimSpace(shown), "\n")
	if len(lines) != len(patterns) {
		return false
	}
	for i, line := range lines {
		pattern := strings.ReplaceAll(regexp.QuoteMeta(patterns[i]), "…", ".*")
		if !regexp.MustCompile("^" + pattern + "$").MatchString(line) {
			return false
		}
	}
	return true
}
