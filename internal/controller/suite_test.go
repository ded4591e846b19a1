package controller_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/yaml"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/test/env/apiserver"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// Intervals of the manager under test: short, so that what happens on an interval happens within a test.
const (
	verifyInterval = 2 * time.Second
	lagInterval    = 300 * time.Millisecond
	patience       = 2 * time.Second
	deadline       = 90 * time.Second // for anything that has to come true; the machine may be busy with other packages
)

const processorImage = "docker.io/millrace/processor:test"

// suite is what the tests of this package share: an API server, and one manager that runs every controller.
var suite struct {
	client  client.Client // uncached
	cluster string
	kubectl interface {
		Run(args ...string) (stdout, stderr io.Reader, err error)
	}
	kubectlPath, kubeconfig string // the same for shells
	writes                  *writes
	permissions             *permissions
	log                     *safeBuffer
	metrics                 *prometheus.Registry // what the manager exports
}

func TestMain(m *testing.M) {
	// These tests wait for intervals and hardly compute, so more of them than processors may run side by side.
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		if err := f.Value.Set("8"); err != nil {
			panic(err)
		}
	}
	os.Exit(run(m))
}

// run starts Kubernetes and the manager around the tests, and PostgreSQL inside that.
func run(m *testing.M) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	fail := func(err error) int { fmt.Fprintln(os.Stderr, err); return 1 }

	env, err := apiserver.New(ctx, filepath.Join("..", "..", "config", "crd", "bases"))
	if err != nil {
		return fail(err)
	}
	// Before Start: one that fails half-way, at a CRD for example, leaves its servers running.
	defer func() {
		if err := env.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	cfg, err := env.Start()
	if err != nil {
		return fail(err)
	}
	user, err := env.AddUser(envtest.User{Name: "tester", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		return fail(err)
	}
	kubectl, err := user.Kubectl()
	if err != nil {
		return fail(err)
	}
	suite.kubectl, suite.kubectlPath = kubectl, kubectl.Path
	if suite.kubeconfig, err = writeKubeconfig(user); err != nil {
		return fail(err)
	}
	defer func() { _ = os.Remove(suite.kubeconfig) }()
	if suite.client, err = client.New(cfg, client.Options{Scheme: controller.Scheme()}); err != nil {
		return fail(err)
	}

	role, limited, err := managerUser(ctx, env)
	if err != nil {
		return fail(err)
	}
	stopped, err := startManager(ctx, limited)
	if err != nil {
		return fail(err)
	}
	code := postgres.Main(m, postgres.Options{})
	cancel()
	if err := suite.permissions.check(role, code == 0 && flag.Lookup("test.run").Value.String() == ""); err != nil {
		code = fail(err)
	}
	if err := <-stopped; err != nil {
		return fail(err)
	}
	if os.Getenv("MILLRACE_TEST_LOG") != "" {
		fmt.Fprintln(os.Stderr, suite.log.String())
	}
	return code
}

// writeKubeconfig writes the kubeconfig of a user into a file.
func writeKubeconfig(user *envtest.AuthenticatedUser) (string, error) {
	text, err := user.KubeConfig()
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp("", "kubeconfig-")
	if err != nil {
		return "", err
	}
	_, err = f.Write(text)
	return f.Name(), errors.Join(err, f.Close())
}

// managerUser makes a user who may do what config/rbac/role.yaml says and nothing else, so that every test is a test of the
// role as well. The roles of the chart are this one in two parts, which is tested there.
func managerUser(ctx context.Context, env *envtest.Environment) (*rbacv1.ClusterRole, *rest.Config, error) {
	text, err := os.ReadFile(filepath.Join("..", "..", "config", "rbac", "role.yaml"))
	if err != nil {
		return nil, nil, err
	}
	var role rbacv1.ClusterRole
	if err := yaml.UnmarshalStrict(text, &role); err != nil {
		return nil, nil, err
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "manager"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: "manager"}},
	}
	for _, o := range []client.Object{&role, binding} {
		if err := suite.client.Create(ctx, o); err != nil {
			return nil, nil, err
		}
	}
	user, err := env.AddUser(envtest.User{Name: "manager"}, nil)
	if err != nil {
		return nil, nil, err
	}
	return &role, user.Config(), nil
}

func startManager(ctx context.Context, cfg *rest.Config) (<-chan error, error) {
	suite.log, suite.metrics = &safeBuffer{}, prometheus.NewRegistry()
	log := logr.FromSlogHandler(slog.NewJSONHandler(suite.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctrl.SetLogger(log)
	klog.SetLogger(log)

	cfg = rest.CopyConfig(cfg)
	cfg.QPS = -1
	suite.writes, suite.permissions = &writes{}, &permissions{}
	cfg.Wrap(suite.permissions.note)
	cfg.Wrap(func(next http.RoundTripper) http.RoundTripper { return &recorder{next, suite.writes} })
	mgr, err := ctrl.NewManager(cfg, ctrl.Options{
		Scheme: controller.Scheme(), Cache: controller.CacheOptions(nil),
		Metrics: metricsserver.Options{BindAddress: "0"}, HealthProbeBindAddress: "0",
	})
	if err != nil {
		return nil, err
	}
	if suite.cluster, err = controller.ClusterID(ctx, suite.client); err != nil {
		return nil, err
	}
	if err := controller.Setup(ctx, mgr, controller.Options{
		Cluster: suite.cluster, ProcessorImage: processorImage, ProcessorImagePullPolicy: "Never", ProcessorImagePullSecrets: []string{"registry"},
		VerifyInterval: verifyInterval, LagInterval: lagInterval, MaintenanceInterval: time.Second, DeletionPatience: patience,
		Database: database.Options{ConnectTimeout: 2 * time.Second, CallTimeout: 10 * time.Second},
		Metrics:  suite.metrics,
	}); err != nil {
		return nil, err
	}
	stopped := make(chan error, 1)
	go func() { stopped <- mgr.Start(ctx) }()
	return stopped, nil
}

// safeBuffer is a log that may be written and read at the same time.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// writes are the requests of the manager that change something, and, apart from them, those that read.
type writes struct {
	mu     sync.Mutex
	list   []*write
	gotten []read
}

type write struct {
	method, path, body string
	status             int // of the answer; 0: there is none yet, -1: there was none
}

type read struct{ path, accept string }

// reads returns the reading requests so far that pass.
func (w *writes) reads(pass func(read) bool) []read {
	w.mu.Lock()
	defer w.mu.Unlock()
	var list []read
	for _, r := range w.gotten {
		if pass(r) {
			list = append(list, r)
		}
	}
	return list
}

// recorder notes every write on its way to the API server.
type recorder struct {
	next   http.RoundTripper
	writes *writes
}

func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Method == http.MethodGet {
		r.writes.mu.Lock()
		r.writes.gotten = append(r.writes.gotten, read{req.URL.Path, req.Header.Get("Accept")})
		r.writes.mu.Unlock()
	} else {
		w := &write{method: req.Method, path: req.URL.Path}
		if req.GetBody != nil {
			if body, err := req.GetBody(); err == nil {
				var b bytes.Buffer
				_, _ = b.ReadFrom(body)
				w.body = b.String()
			}
		}
		r.writes.mu.Lock()
		r.writes.list = append(r.writes.list, w)
		r.writes.mu.Unlock()
		answer, err := r.next.RoundTrip(req)
		status := -1
		if err == nil {
			status = answer.StatusCode
		}
		r.writes.mu.Lock()
		w.status = status
		r.writes.mu.Unlock()
		return answer, err
	}
	return r.next.RoundTrip(req)
}

// in returns the writes to a namespace so far.
func (w *writes) in(namespace string) []write {
	w.mu.Lock()
	defer w.mu.Unlock()
	var list []write
	for _, x := range w.list {
		if strings.Contains(x.path, "/namespaces/"+namespace+"/") {
			list = append(list, *x)
		}
	}
	return list
}

// world is one test's namespace.
type world struct {
	*testing.T
	namespace string
}

// newWorld makes a namespace for a test and lets it run beside the others.
func newWorld(t *testing.T) *world {
	t.Helper()
	t.Parallel()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}}
	if err := suite.client.Create(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	w := &world{t, ns.Name}
	t.Cleanup(w.clean)
	return w
}

// clean deletes the test's resources, so that the manager lets go of databases that are about to be dropped. It runs when
// the test's own context has ended.
func (w *world) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	for _, o := range []client.Object{&v1alpha1.Processor{}, &v1alpha1.ConsumerGroup{}, &v1alpha1.Stream{}} {
		kind := fmt.Sprintf("%T", o)
		if err := suite.client.DeleteAllOf(ctx, o, client.InNamespace(w.namespace)); err != nil {
			w.Errorf("clean up %s: %v", kind, err)
		}
	}
	var streams v1alpha1.StreamList
	var groups v1alpha1.ConsumerGroupList
	_ = suite.client.List(ctx, &streams, client.InNamespace(w.namespace))
	_ = suite.client.List(ctx, &groups, client.InNamespace(w.namespace))
	for i := range streams.Items {
		w.abandon(ctx, &streams.Items[i])
	}
	for i := range groups.Items {
		w.abandon(ctx, &groups.Items[i])
	}
}

func (w *world) abandon(ctx context.Context, o client.Object) {
	patch := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"annotations":{"millrace.dev/abandon":"true"}}}`))
	if err := suite.client.Patch(ctx, o, patch); client.IgnoreNotFound(err) != nil {
		w.Errorf("abandon: %v", err)
	}
}

// create makes an object in the test's namespace.
func (w *world) create(o client.Object) {
	w.Helper()
	o.SetNamespace(w.namespace)
	if err := suite.client.Create(w.Context(), o); err != nil {
		w.Fatalf("create: %v", err)
	}
}

// secret makes or replaces a Secret with one key.
func (w *world) secret(name, key, value string) {
	w.Helper()
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: w.namespace}, StringData: map[string]string{key: value}}
	err := suite.client.Create(w.Context(), s)
	if apierrors.IsAlreadyExists(err) {
		err = suite.client.Update(w.Context(), s)
	}
	if err != nil {
		w.Fatalf("secret: %v", err)
	}
}

// update changes an object as it is now, again and again until nobody else did in between.
func update[T client.Object](w *world, o T, change func(T)) {
	w.Helper()
	w.eventually("update", func() error {
		if err := suite.client.Get(w.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			return err
		}
		change(o)
		return suite.client.Update(w.Context(), o)
	})
}

// eventually repeats f until it returns nil, or fails the test at the deadline with its last error.
func (w *world) eventually(what string, f func() error) {
	w.Helper()
	end := time.Now().Add(deadline)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			w.Fatalf("%s: %v", what, err)
		}
		select {
		case <-w.Context().Done():
			w.Fatalf("%s: %v", what, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// object is one of our kinds.
type object interface {
	client.Object
	GetConditions() []metav1.Condition
}

// want waits until a condition has a status and a reason, and a message that contains every text.
func (w *world) want(o object, kind string, status metav1.ConditionStatus, reason string, texts ...string) {
	w.Helper()
	w.eventually(fmt.Sprintf("%s %s", o.GetName(), kind), func() error {
		if err := suite.client.Get(w.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			return err
		}
		c := meta.FindStatusCondition(o.GetConditions(), kind)
		if c == nil {
			return fmt.Errorf("there is no condition %s in %+v", kind, o.GetConditions())
		}
		if c.Status != status || c.Reason != reason || c.ObservedGeneration != o.GetGeneration() {
			return fmt.Errorf("%s is %s, %s (%s) for generation %d of %d", kind, c.Status, c.Reason, c.Message, c.ObservedGeneration, o.GetGeneration())
		}
		for _, text := range texts {
			if !strings.Contains(c.Message, text) {
				return fmt.Errorf("the message lacks %q: %s", text, c.Message)
			}
		}
		return nil
	})
}

func (w *world) wantReady(o object) {
	w.Helper()
	w.want(o, v1alpha1.ConditionReady, metav1.ConditionTrue, v1alpha1.ReasonReady)
}

func (w *world) wantNotReady(o object, reason string, texts ...string) {
	w.Helper()
	w.want(o, v1alpha1.ConditionReady, metav1.ConditionFalse, reason, texts...)
}

// wantGone waits until an object is gone.
func (w *world) wantGone(o client.Object) {
	w.Helper()
	w.eventually(o.GetName()+" is gone", func() error {
		err := suite.client.Get(w.Context(), client.ObjectKeyFromObject(o), o)
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		return fmt.Errorf("it is still there with finalizers %v", o.GetFinalizers())
	})
}

// events returns the notes of the events with a reason about an object.
func (w *world) events(about client.Object, reason string) []string {
	w.Helper()
	var list eventsv1.EventList
	if err := suite.client.List(w.Context(), &list, client.InNamespace(w.namespace)); err != nil {
		w.Fatal(err)
	}
	var notes []string
	for _, e := range list.Items {
		if e.Regarding.UID == about.GetUID() && e.Reason == reason {
			notes = append(notes, e.Note)
		}
	}
	return notes
}

func (w *world) wantEvent(about client.Object, reason string, texts ...string) {
	w.Helper()
	w.eventually("event "+reason, func() error {
		notes := w.events(about, reason)
		if len(notes) == 0 {
			return fmt.Errorf("there is none")
		}
		for _, text := range texts {
			if !strings.Contains(strings.Join(notes, "\n"), text) {
				return fmt.Errorf("it lacks %q: %v", text, notes)
			}
		}
		return nil
	})
}

// kubectl runs kubectl in the test's namespace and returns what it prints.
func (w *world) kubectl(args ...string) string {
	w.Helper()
	stdout, stderr, err := suite.kubectl.Run(append([]string{"--namespace", w.namespace}, args...)...)
	if err != nil {
		w.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
	text, err := io.ReadAll(io.MultiReader(stdout, stderr))
	if err != nil {
		w.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
	}
	return string(text)
}

// sql opens a connection to a test's database.
func (w *world) sql(dsn string) *pgx.Conn {
	w.Helper()
	conn, err := pgx.Connect(w.Context(), dsn)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func (w *world) exec(conn *pgx.Conn, sql string, args ...any) {
	w.Helper()
	if _, err := conn.Exec(w.Context(), sql, args...); err != nil {
		w.Fatalf("%s: %v", sql, err)
	}
}

// scalar returns the one value of a query.
func scalar[T any](w *world, conn *pgx.Conn, sql string, args ...any) T {
	w.Helper()
	var v T
	if err := conn.QueryRow(w.Context(), sql, args...).Scan(&v); err != nil {
		w.Fatalf("%s: %v", sql, err)
	}
	return v
}

// readyDeployments plays the deployment controller and the nodes for a namespace until the test ends: every Deployment has
// all its pods ready at once. Real pods are in test/e2e.
func (w *world) readyDeployments() {
	ctx := w.Context()
	done := make(chan struct{})
	w.Cleanup(func() { <-done })
	go func() {
		defer close(done)
		for {
			var list appsv1.DeploymentList
			if err := suite.client.List(ctx, &list, client.InNamespace(w.namespace)); err == nil {
				for i := range list.Items {
					markReady(ctx, &list.Items[i])
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
}

func markReady(ctx context.Context, d *appsv1.Deployment) {
	n := *d.Spec.Replicas
	want := appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: n, UpdatedReplicas: n, ReadyReplicas: n, AvailableReplicas: n}
	if d.Status.ObservedGeneration == want.ObservedGeneration && d.Status.AvailableReplicas == n {
		return
	}
	d.Status = want
	_ = suite.client.Status().Update(ctx, d) // a conflict is tried again at the next turn
}

// withPassword returns the DSN with another password.
func withPassword(t testing.TB, dsn, password string) string {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(u.User.Username(), password)
	return u.String()
}

// password returns the password in a DSN.
func password(t testing.TB, dsn string) string {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	p, ok := u.User.Password()
	if !ok || len(p) < 8 {
		t.Fatalf("the DSN has no password long enough to look for")
	}
	return p
}

// wantNoLeak fails when one of the texts is in anything but a Secret: resources, their objects, events, or the manager's log.
func (w *world) wantNoLeak(secrets ...string) {
	w.Helper()
	seen := map[string]string{"the manager's log": suite.log.String()}
	lists := map[string]client.ObjectList{
		"Streams": &v1alpha1.StreamList{}, "ConsumerGroups": &v1alpha1.ConsumerGroupList{}, "Processors": &v1alpha1.ProcessorList{},
		"ConfigMaps": &corev1.ConfigMapList{}, "Deployments": &appsv1.DeploymentList{}, "Events": &eventsv1.EventList{},
	}
	for name, list := range lists {
		if err := suite.client.List(w.Context(), list, client.InNamespace(w.namespace)); err != nil {
			w.Fatal(err)
		}
		text, err := json.Marshal(list)
		if err != nil {
			w.Fatal(err)
		}
		seen[name] = string(text)
	}
	for where, text := range seen {
		for _, secret := range secrets {
			if strings.Contains(text, secret) {
				w.Errorf("a secret is in %s", where)
			}
		}
	}
}

// cleanupContext is for cleanups, which run when the test's own context has ended. Its deadline is that of the test binary.
func cleanupContext() context.Context { return context.Background() }

// postgresCleanup connects for a cleanup.
func postgresCleanup(t testing.TB, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(cleanupContext(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}
