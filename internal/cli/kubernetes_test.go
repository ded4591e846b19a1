package cli_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/test/env/apiserver"
)

// server is the Kubernetes API server of this package's tests; stopKubernetes ends it.
var server *envtest.Environment

// kubernetes starts an API server with our CRDs, once for all tests.
var kubernetes = sync.OnceValues(func() (*envtest.Environment, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var err error
	if server, err = apiserver.New(ctx, filepath.Join("..", "..", "config", "crd", "bases")); err != nil {
		return nil, err
	}
	_, err = server.Start()
	return server, err
})

func stopKubernetes() error {
	if server == nil {
		return nil
	}
	return server.Stop()
}

// kubeconfig writes the kubeconfig of a user of the API server, who is in these groups.
func (w *world) kubeconfig(env *envtest.Environment, name string, groups ...string) string {
	w.t.Helper()
	user, err := env.AddUser(envtest.User{Name: name, Groups: groups}, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	text, err := user.KubeConfig()
	if err != nil {
		w.t.Fatal(err)
	}
	path := filepath.Join(w.dir, name+".kubeconfig")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

func TestKubectlMillraceFindsTheDatabaseOfAStream(t *testing.T) {
	t.Parallel()
	env, err := kubernetes()
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.run("select millrace.create_stream('inside')")
	w.run("select millrace.create_stream('web_orders'), millrace.create_group('web_orders', 'billing'), millrace.publish('web_orders', '{\"id\": 1}')")
	w.env = append(w.env, "MILLRACE_DATABASE_URL=", "PGHOST=", "PGDATABASE=", "PGSERVICE=", "PGPORT=", "PGUSER=")

	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	api, err := client.New(env.Config, client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	const secretWord = "s3cret-word"
	cut, rest, _ := strings.Cut(w.dsn, "@")
	_, path, _ := strings.Cut(rest, "/")
	created := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "shop-"}}
	if err := api.Create(w.ctx, created); err != nil {
		t.Fatal(err)
	}
	shop := created.Name
	stream := func(name, secret, key string) *v1alpha1.Stream {
		s := &v1alpha1.Stream{ObjectMeta: metav1.ObjectMeta{Namespace: shop, Name: name}}
		if secret != "" {
			s.Spec.DatabaseSecretRef = &v1alpha1.SecretKeyReference{Name: secret, Key: key}
		}
		return s
	}
	for _, o := range []client.Object{
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: shop, Name: "db"}, StringData: map[string]string{
			"url": w.dsn + "\n", "down": "postgres://me:" + secretWord + "@127.0.0.1:1/app",
			"inside": cut + "@postgres.databases.svc.cluster.local.invalid:5432/" + path,
		}},
		stream("web-orders", "db", "url"), stream("no-secret", "nowhere", "url"), stream("no-key", "db", "uri"), stream("default-database", "", ""),
		stream("down", "db", "down"), stream("inside", "db", "inside"),
	} {
		if err := api.Create(w.ctx, o); err != nil {
			t.Fatal(err)
		}
	}
	admin := w.kubeconfig(env, "admin", "system:masters")
	viewer := w.kubeconfig(env, "viewer")
	for _, c := range []struct {
		code       int
		want, args string
	}{
		{0, "STREAM …\nweb_orders   billing   1 …", "lag --stream web-orders -n " + shop + " --kubeconfig " + admin},
		{0, `1 message published to "web_orders" at position 2`, "publish --stream web-orders {} -n " + shop + " --kubeconfig " + admin},
		{0, "POSITION …\n1 …", "receive billing --stream web-orders -n " + shop + " --kubeconfig " + admin},
		{1, `error: Stream "web-order" of namespace "` + shop + `" does not exist. Did you mean "web-orders"? There are these Streams there: …`, "lag --stream web-order -n " + shop + " --kubeconfig " + admin},
		{1, `error: Stream "web-orders" of namespace "default" does not exist. There are no Streams there.`, "lag --stream web-orders --kubeconfig " + admin},
		{1, `error: Secret "nowhere", which Stream "no-secret" names, does not exist in namespace "` + shop + `"`, "lag --stream no-secret -n " + shop + " --kubeconfig " + admin},
		{1, `error: Secret "db" of namespace "` + shop + `" has no key "uri", which Stream "no-key" names`, "lag --stream no-key -n " + shop + " --kubeconfig " + admin},
		{1, `error: Stream "default-database" names no Secret: …. Pass --database-url`, "lag --stream default-database -n " + shop + " --kubeconfig " + admin},
		{1, `error: you may not read Stream "web-orders" in namespace "` + shop + `": …`, "lag --stream web-orders -n " + shop + " --kubeconfig " + viewer},
		{1, `error: cannot reach database "app" at 127.0.0.1:1: connection refused`, "lag --stream down -n " + shop + " --kubeconfig " + admin},
		{1, "error: cannot reach database … at postgres.databases.svc.cluster.local.invalid:5432: its host name cannot be resolved\n" +
			"If that address is one inside the cluster, run this beside it, and add --address localhost:5432\n  kubectl -n databases port-forward svc/postgres 5432:5432",
			"lag --stream inside -n " + shop + " --kubeconfig " + admin},
		{0, "there are no consumer groups", "lag --stream inside -n " + shop + " --address " + mustParse(t, w.dsn).Host + " --kubeconfig " + admin},
		{1, "error: there is no kubeconfig for --stream: …", "lag --stream web-orders -n " + shop},
	} {
		r := w.millrace(strings.Fields(c.args)...)
		if r.code != c.code || !like(r.out+r.err, c.want) || strings.Contains(r.err, secretWord) {
			t.Errorf("millrace %s: exit code %d\n%s%swant %d\n%s", c.args, r.code, r.out, r.err, c.code, c.want)
		}
	}

	// Who may read Streams need not be allowed to read Secrets.
	may(t, api, shop, "viewer", "streams")
	w.eventually("the permission", func() bool {
		return strings.Contains(w.millrace("lag", "--stream", "web-orders", "-n", shop, "--kubeconfig", viewer).err,
			`you may not read Secret "db" in namespace "`+shop+`", which holds the connection string: ask for get on it, or pass --database-url`)
	})

	// kubectl finds the plugin by its name.
	kubectl := exec.CommandContext(w.ctx, filepath.Join(env.BinaryAssetsDirectory, "kubectl"), "millrace", "lag", "--stream", "web-orders", "-n", shop, "--kubeconfig", admin, "-o", "json")
	kubectl.Env = append(w.env, "PATH="+w.dir+":"+os.Getenv("PATH"))
	if out, err := kubectl.CombinedOutput(); err != nil || !strings.Contains(string(out), `"group":"billing"`) {
		t.Errorf("kubectl millrace: %v\n%s", err, out)
	}
}

// may lets a user get resources of ours in a namespace.
func may(t *testing.T, api client.Client, namespace, user, resource string) {
	t.Helper()
	role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "get-" + resource},
		Rules: []rbacv1.PolicyRule{{APIGroups: []string{v1alpha1.GroupVersion.Group}, Resources: []string{resource}, Verbs: []string{"get"}}}}
	binding := &rbacv1.RoleBinding{ObjectMeta: role.ObjectMeta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: user}}}
	for _, o := range []client.Object{role, binding} {
		if err := api.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
}
