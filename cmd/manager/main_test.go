package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller"
	"github.com/millrace-dev/millrace/test/env/apiserver"
	"github.com/millrace-dev/millrace/test/env/postgres"
	"github.com/millrace-dev/millrace/test/env/process"
	"github.com/millrace-dev/millrace/test/env/tools"
)

func TestOptionsSayWhatToWrite(t *testing.T) {
	t.Setenv("MILLRACE_PROCESSOR_IMAGE", "")
	const image = "--processor-image=i"
	for _, c := range []struct {
		name string
		args []string
		want string // empty: accepted
	}{
		{"the least that is needed", []string{image}, ""},
		{"no image", nil, "--processor-image is empty"},
		{"a policy that does not exist", []string{image, "--processor-image-pull-policy=Sometimes"}, "write Always, IfNotPresent or Never"},
		{"an interval that is no interval", []string{image, "--lag-interval=1ms"}, "write 1s or more"},
		{"no workers", []string{image, "--workers=0"}, "write 1 or more"},
		{"an argument", []string{image, "run"}, "write flags only, or schema or check first"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := parse(c.args, io.Discard)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v", err)
			}
		})
	}
	var help strings.Builder
	if _, err := parse([]string{"--help"}, &help); !errors.Is(err, flag.ErrHelp) || !strings.Contains(help.String(), "  manager schema <verb> ") || !strings.Contains(help.String(), "  -verify-interval ") {
		t.Errorf("%v; the help says\n%s", err, help.String())
	}
	o, err := parse([]string{image, "--namespaces=a, b,", "--processor-image-pull-secrets=c,d"}, io.Discard)
	if err != nil || len(o.namespaces) != 2 || o.namespaces[1] != "b" || len(o.pullSecrets) != 2 || o.pullSecrets[0] != "c" {
		t.Errorf("%v, %v", o, err)
	}
}

func TestTheDefaultDatabaseComesFromAFileOrTheEnvironment(t *testing.T) {
	t.Setenv(envDatabaseURL, "postgres://from-env/d")
	o := &options{}
	if dsn, err := o.databaseURL(); err != nil || dsn != "postgres://from-env/d" {
		t.Errorf("%s, %v", dsn, err)
	}
	o.databaseURLFile = filepath.Join(t.TempDir(), "dsn")
	if _, err := o.databaseURL(); err == nil {
		t.Error("a file that does not exist is accepted")
	}
	if err := os.WriteFile(o.databaseURLFile, []byte("postgres://from-file/d\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if dsn, err := o.databaseURL(); err != nil || dsn != "postgres://from-file/d" {
		t.Errorf("%s, %v", dsn, err)
	}
}

func TestABadDefaultDatabaseIsNotRepeated(t *testing.T) {
	t.Setenv(envDatabaseURL, "hush-hush")
	err := run(t.Context(), &options{logLevel: "error"})
	if err == nil || strings.Contains(err.Error(), "hush") || !strings.Contains(err.Error(), "write postgres://") {
		t.Errorf("%v", err)
	}
}

// The whole program against a real API server, as the chart installs it for one namespace: with the chart's roles it becomes
// leader, is healthy, looks after that namespace and no other, from the creation of every kind to its deletion, shows its
// metrics to whom Kubernetes lets in and to nobody else, and stops when asked. manager check says the same as this test.
func TestManagerRuns(t *testing.T) {
	ctx := t.Context()
	env, admin := start(t)
	server, appear := absent(t, strings.Trim(strings.TrimPrefix(env.Config.Host, "https://"), "/"))
	kubeconfig := asChart(t, env, "default", server)
	t.Setenv("KUBECONFIG", kubeconfig)
	t.Setenv(envDatabaseURL, "")
	t.Setenv(envPodName, "millrace-1")
	// The pod's manager led until it was killed, a moment ago.
	left := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: leaseName}}
	left.Spec.HolderIdentity, left.Spec.LeaseDurationSeconds = ptr.To("millrace-1"), ptr.To[int32](3600)
	left.Spec.AcquireTime, left.Spec.RenewTime = ptr.To(metav1.NowMicro()), ptr.To(metav1.NowMicro())
	if err := admin.Create(ctx, left); err != nil {
		t.Fatal(err)
	}

	metrics, probes := freeAddress(t), freeAddress(t)
	checkArgs := []string{"--leader-election-namespace=default", "--namespaces=default", "--metrics-service=millrace-metrics"}
	if err := checkCommand(checkArgs, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "MILLRACE_METRICS_SERVICE_HOST") {
		t.Errorf("a Service that does not exist: %v", err)
	}
	setService(t, metrics)
	manager := startProcess(t, kubeconfig, "--leader-elect", "--leader-election-namespace=default", "--log-level=error", "--namespaces=default",
		"--metrics-bind-address="+metrics, "--health-probe-bind-address="+probes)
	// A manager that has ended will never do what is waited for.
	eventually := func(t *testing.T, f func() error) {
		t.Helper()
		eventually(t, func() error {
			select {
			case <-manager.ended:
				t.Fatalf("the manager has ended: %s", manager.ProcessState)
			default:
			}
			return f()
		})
	}

	// Without an API server it is alive and not ready.
	eventually(t, func() error { return get("http://"+probes+"/healthz", "", http.StatusOK) })
	if err := get("http://"+probes+"/readyz", "", http.StatusServiceUnavailable); err != nil {
		t.Error(err)
	}
	appear()
	for _, path := range []string{"/healthz", "/readyz"} {
		eventually(t, func() error { return get("http://"+probes+path, "", http.StatusOK) })
	}
	eventually(t, func() error {
		var lease coordinationv1.Lease
		if err := admin.Get(ctx, client.ObjectKeyFromObject(left), &lease); err != nil {
			return err
		}
		if ptr.Deref(lease.Spec.HolderIdentity, "") != "millrace-1" || !lease.Spec.RenewTime.After(left.Spec.RenewTime.Time) {
			return fmt.Errorf("%q leads, renewed at %s", ptr.Deref(lease.Spec.HolderIdentity, ""), lease.Spec.RenewTime)
		}
		return nil
	})

	life(ctx, t, admin)
	wantCheck(t, checkArgs, "", "ok    the CRDs are those", "ok    the manager may read", "ok    a manager works", "ok    the metrics are refused")
	wantCheck(t, []string{"--leader-election-namespace=default"}, "1 of the checks failed", "FAIL  the manager may read", `cannot list resource "streams"`, "roles of the chart")

	stream := &v1alpha1.Stream{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "orders"}}
	stream.Spec.DatabaseSecretRef = &v1alpha1.SecretKeyReference{Name: "app-db", Key: "dsn"}
	if err := admin.Create(ctx, stream); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if err := admin.Get(ctx, client.ObjectKeyFromObject(stream), stream); err != nil {
			return err
		}
		if c := meta.FindStatusCondition(stream.Status.Conditions, v1alpha1.ConditionReady); c == nil || c.Reason != v1alpha1.ReasonSecretMissing {
			return fmt.Errorf("Ready is %+v", c)
		}
		var events eventsv1.EventList
		if err := admin.List(ctx, &events, client.InNamespace("default")); err != nil {
			return err
		}
		if !slices.ContainsFunc(events.Items, func(e eventsv1.Event) bool { return e.Reason == v1alpha1.ReasonSecretMissing }) {
			return fmt.Errorf("no event tells")
		}
		return nil
	})

	url := "https://" + metrics + "/metrics"
	eventually(t, func() error { return get(url, "", http.StatusUnauthorized) })
	stranger, prometheus := token(t, admin, "stranger"), token(t, admin, "prometheus")
	eventually(t, func() error { return get(url, stranger, http.StatusForbidden) })
	letIn(t, admin, "prometheus")
	eventually(t, func() error { return get(url, prometheus, http.StatusOK) })

	if err := manager.stop(); err != nil {
		t.Errorf("the manager stops: %v", err)
	}
}

// life brings a resource of each kind to Ready and deletes it with its data. Those of another namespace stay as they are.
func life(ctx context.Context, t *testing.T, admin client.Client) {
	t.Helper()
	if err := admin.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "other"}}); err != nil {
		t.Fatal(err)
	}
	dsn := postgres.NewDatabase(t)
	database := &v1alpha1.SecretKeyReference{Name: "life-db", Key: "dsn"}
	var all []client.Object
	for _, namespace := range []string{"default", "other"} {
		at := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: namespace, Name: name} }
		secret := &corev1.Secret{ObjectMeta: at("life-db"), StringData: map[string]string{"dsn": dsn}}
		s, g, p := &v1alpha1.Stream{ObjectMeta: at("life")}, &v1alpha1.ConsumerGroup{ObjectMeta: at("life")}, &v1alpha1.Processor{ObjectMeta: at("life")}
		s.Spec.DatabaseSecretRef, s.Spec.DeletionPolicy = database, v1alpha1.DeletionDelete
		g.Spec.StreamRef.Name, g.Spec.DeletionPolicy = "life", v1alpha1.DeletionDelete
		p.Spec.Source.ConsumerGroup = &v1alpha1.ConsumerGroupSource{Name: "life"}
		p.Spec.Mapping.Columns = []v1alpha1.Column{{Name: "id", Path: "id", Type: "text", Required: true}}
		p.Spec.Sink.Table = &v1alpha1.TableSink{Name: "life", Key: []string{"id"}, DatabaseSecretRef: database}
		for _, o := range []client.Object{secret, s, g, p} {
			if err := admin.Create(ctx, o); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, s, g, p)
	}
	eventually(t, func() error { // no Deployment becomes available without nodes, so this test says that it has
		var d appsv1.Deployment
		if err := admin.Get(ctx, client.ObjectKey{Namespace: "default", Name: "life-processor"}, &d); err != nil {
			for _, o := range all[:3] {
				_ = admin.Get(ctx, client.ObjectKeyFromObject(o), o)
				err = fmt.Errorf("%w; %T has conditions %+v", err, o, o.(interface{ GetConditions() []metav1.Condition }).GetConditions())
			}
			return err
		}
		n := *d.Spec.Replicas
		d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: n, UpdatedReplicas: n, ReadyReplicas: n, AvailableReplicas: n}
		return admin.Status().Update(ctx, &d)
	})
	for _, o := range all[:3] {
		eventually(t, func() error {
			if err := admin.Get(ctx, client.ObjectKeyFromObject(o), o); err != nil {
				return err
			}
			if list := o.(interface{ GetConditions() []metav1.Condition }).GetConditions(); !meta.IsStatusConditionTrue(list, v1alpha1.ConditionReady) {
				return fmt.Errorf("%T is not ready: %+v", o, list)
			}
			return nil
		})
	}
	for _, o := range all[3:] {
		if err := admin.Get(ctx, client.ObjectKeyFromObject(o), o); err != nil || len(o.(interface{ GetConditions() []metav1.Condition }).GetConditions()) > 0 {
			t.Errorf("%T of another namespace was looked after: %v", o, err)
		}
	}
	for _, o := range []client.Object{all[2], all[1], all[0]} {
		if err := admin.Delete(ctx, o); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			if err := admin.Get(ctx, client.ObjectKeyFromObject(o), o); !apierrors.IsNotFound(err) {
				return fmt.Errorf("%T is still there: %w", o, err)
			}
			return nil
		})
	}
}

// wantCheck runs "manager check": its output contains every text, and its error is as said; empty means none. A check that waits for what does not come takes
// the whole timeout, so it is short at first, and longer where the machine needs more for the other checks.
func wantCheck(t *testing.T, args []string, wantErr string, texts ...string) (said string) {
	t.Helper()
	for timeout := 2 * time.Second; ; timeout *= 2 {
		var out bytes.Buffer
		err := checkCommand(append(slices.Clone(args), "--timeout="+timeout.String()), &out, &out)
		asSaid := wantErr == "" && err == nil || err != nil && err.Error() == wantErr
		missing := slices.DeleteFunc(slices.Clone(texts), func(text string) bool { return strings.Contains(out.String(), text) })
		if asSaid && len(missing) == 0 {
			return out.String()
		}
		if timeout > time.Minute {
			t.Fatalf("check %v: %v, without %q:\n%s", args, err, missing, out.String())
		}
	}
}

// setService sets the variables that Kubernetes sets in pods beside the Service of the metrics.
func setService(t *testing.T, address string) {
	t.Helper()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("MILLRACE_METRICS_SERVICE_HOST", host)
	t.Setenv("MILLRACE_METRICS_SERVICE_PORT", port)
}

// The checks of the CRDs, the metrics and the default database say what is wrong.
func TestCheckSaysWhatIsWrong(t *testing.T) {
	env, admin := start(t)
	dsn := postgres.NewDatabase(t)
	t.Setenv("KUBECONFIG", asChart(t, env, "default", strings.Trim(strings.TrimPrefix(env.Config.Host, "https://"), "/")))
	t.Setenv(envDatabaseURL, "")
	setService(t, freeAddress(t))
	wantCheck(t, []string{"--leader-election-namespace=default", "--namespaces=default", "--metrics-service=millrace-metrics"},
		"2 of the checks failed", "FAIL  a manager works: leases.coordination.k8s.io", "FAIL  the metrics are refused", "look at")
	t.Setenv(envDatabaseURL, dsn)
	open := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer open.Close()
	expired := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: leaseName}, Spec: coordinationv1.LeaseSpec{
		HolderIdentity: ptr.To("manager-1"), LeaseDurationSeconds: ptr.To[int32](15), RenewTime: ptr.To(metav1.NewMicroTime(time.Now().Add(-time.Hour))),
	}}
	if err := admin.Create(t.Context(), expired); err != nil {
		t.Fatal(err)
	}
	args := []string{"--leader-election-namespace=default", "--namespaces=default", "--metrics-service=millrace-metrics"}
	setService(t, open.Listener.Addr().String())
	wantCheck(t, args, "2 of the checks failed", "manager-1 has not renewed Lease manager.millrace.dev for 1h",
		"they answer 200 OK to a request without a token: set metrics.secure", "ok    the default database answers")

	conn, err := pgx.Connect(t.Context(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, err := conn.Exec(context.Background(), "drop role if exists checked_only")
		if err := errors.Join(err, conn.Close(context.Background())); err != nil {
			t.Error(err)
		}
	})
	if _, err := conn.Exec(t.Context(), "create role checked_only login password 'hush'"); err != nil {
		t.Fatal(err)
	}
	poor, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	poor.User = url.UserPassword("checked_only", "hush")
	t.Setenv(envDatabaseURL, poor.String())
	crd := &unstructured.Unstructured{}
	crd.SetGroupVersionKind(schema.GroupVersionKind{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition"})
	eventually(t, func() error { // the API server writes the status of CRDs as well
		if err := admin.Get(t.Context(), client.ObjectKey{Name: "streams.millrace.dev"}, crd); err != nil {
			return err
		}
		versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
		unstructured.RemoveNestedField(versions[0].(map[string]any), "schema", "openAPIV3Schema", "properties", "spec", "properties", "dedupeWindow")
		if err := unstructured.SetNestedSlice(crd.Object, versions, "spec", "versions"); err != nil {
			return err
		}
		return admin.Update(t.Context(), crd)
	})
	said := wantCheck(t, args, "4 of the checks failed",
		"FAIL  the CRDs are those of this version: they lack Stream.spec.dedupeWindow: upgrade them", `grant create on database`, `to "checked_only"`)
	if strings.Contains(said, "hush") {
		t.Error("the check tells the password")
	}
}

// start runs an API server with our CRDs and returns a client that may do everything.
func start(t *testing.T) (*envtest.Environment, client.Client) {
	t.Helper()
	env, err := apiserver.New(t.Context(), filepath.Join("..", "..", "config", "crd", "bases"))
	if err != nil {
		t.Fatal(err)
	}
	// Before Start: one that fails half-way, at a CRD for example, leaves its servers running.
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Error(err)
		}
	})
	cfg, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	admin, err := client.New(cfg, client.Options{Scheme: controller.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	return env, admin
}

// absent is the address of an API server that is not there until appear is called.
func absent(t *testing.T, server string) (address string, appear func()) {
	t.Helper()
	address = freeAddress(t)
	return address, func() {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = listener.Close() })
		go func() {
			for {
				in, err := listener.Accept()
				if err != nil {
					return
				}
				out, err := net.Dial("tcp", server)
				if err != nil {
					_ = in.Close()
					continue
				}
				for _, way := range [][2]net.Conn{{in, out}, {out, in}} {
					go func() {
						_, _ = io.Copy(way[0], way[1])
						_ = way[0].Close()
					}()
				}
			}
		}()
	}
}

// asChart applies the chart for one namespace and returns a kubeconfig of its service account that leads to server.
func asChart(t *testing.T, env *envtest.Environment, namespace, server string) string {
	t.Helper()
	user, err := env.AddUser(envtest.User{Name: "installer", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	programs, err := tools.Ensure(t.Context(), os.Stderr, "helm")
	if err != nil {
		t.Fatal(err)
	}
	rendered, err := exec.CommandContext(t.Context(), filepath.Join(programs, "helm"), "template", "millrace", filepath.Join("..", "..", "charts", "millrace"),
		"--namespace", namespace, "--skip-tests", "--set", "crds.enabled=false", "--set", "namespaces={"+namespace+"}").Output()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	manifest := filepath.Join(dir, "chart.yaml")
	if err := os.WriteFile(manifest, rendered, 0o600); err != nil {
		t.Fatal(err)
	}
	kubectl, err := user.Kubectl()
	if err != nil {
		t.Fatal(err)
	}
	if _, complaint, err := kubectl.Run("apply", "-f", manifest); err != nil {
		text, _ := io.ReadAll(complaint)
		t.Fatalf("apply the chart: %v\n%s", err, text)
	}
	text, err := user.KubeConfig()
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.Load(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, auth := range config.AuthInfos {
		auth.Impersonate = "system:serviceaccount:" + namespace + ":millrace"
	}
	for _, c := range config.Clusters {
		c.Server = "https://" + server
	}
	file := filepath.Join(dir, "kubeconfig")
	if err := clientcmd.WriteToFile(*config, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// freeAddress is an address where nobody listens, out of the range from which the kernel gives ports to others.
func freeAddress(t *testing.T) string {
	t.Helper()
	port, err := process.FreePort("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
}

// patience is how long tests wait for what must come: longer than a machine needs that is busy with other packages.
const patience = 3 * time.Minute

// eventually repeats f until it returns nil.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	end := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
		<-time.After(50 * time.Millisecond)
	}
}

// insecure skips verification, because the certificate is self-signed.
var insecure = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 10 * time.Second}

func get(url, token string, want int) error {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := insecure.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != want {
		return fmt.Errorf("%s answers %s, not %d", url, resp.Status, want)
	}
	return nil
}

// token makes a service account and returns a token of it.
func token(t *testing.T, c client.Client, name string) string {
	t.Helper()
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	if err := c.Create(t.Context(), account); err != nil {
		t.Fatal(err)
	}
	request := &authenticationv1.TokenRequest{}
	if err := c.SubResource("token").Create(t.Context(), account, request); err != nil {
		t.Fatal(err)
	}
	return request.Status.Token
}

// letIn lets a service account read the metrics, by the role that the chart has for it.
func letIn(t *testing.T, c client.Client, name string) {
	t.Helper()
	if err := c.Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "prometheus-reads-millrace"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "millrace-metrics-reader"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: "default", Name: name}},
	}); err != nil {
		t.Fatal(err)
	}
}
