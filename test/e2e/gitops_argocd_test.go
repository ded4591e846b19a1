package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/gitops"
	"github.com/millrace-dev/millrace/test/scenario"
)

// application is what a test reads of an Application of Argo CD.
type application struct {
	Status struct {
		Sync struct {
			Status   string `json:"status"`
			Revision string `json:"revision"`
		} `json:"sync"`
		Health struct {
			Status string `json:"status"`
		} `json:"health"`
		OperationState struct {
			Phase   string `json:"phase"`
			Message string `json:"message"`
		} `json:"operationState"`
		Resources []struct {
			Kind   string `json:"kind"`
			Name   string `json:"name"`
			Status string `json:"status"`
			Health struct {
				Status  string `json:"status"`
				Message string `json:"message"`
			} `json:"health"`
		} `json:"resources"`
		Conditions []struct {
			Type    string `json:"type"`
			Message string `json:"message"`
		} `json:"conditions"`
	} `json:"status"`
}

func (a *application) String() string {
	var b strings.Builder
	s := a.Status
	fmt.Fprintf(&b, "%s, %s at %.7s; %s: %s", s.Sync.Status, s.Health.Status, s.Sync.Revision, s.OperationState.Phase, s.OperationState.Message)
	for _, r := range s.Resources {
		fmt.Fprintf(&b, "\n  %s %s: %s %s %s", r.Kind, r.Name, r.Status, r.Health.Status, r.Health.Message)
	}
	for _, c := range s.Conditions {
		fmt.Fprintf(&b, "\n  %s: %s", c.Type, c.Message)
	}
	return b.String()
}

func (a *application) healthOf(kind string) string {
	for _, r := range a.Status.Resources {
		if r.Kind == kind {
			return r.Health.Status + ": " + r.Health.Message
		}
	}
	return ""
}

// argo are an Argo CD, and the repository of one Application.
type argo struct {
	*gitops.Repository
	name string
}

func (a *argo) get(ctx context.Context) (*application, error) {
	out, err := world.Cluster.Kubectl(ctx, "--namespace=argocd", "get", "application", a.name, "--output=json")
	if err != nil {
		return nil, err
	}
	app := &application{}
	return app, json.Unmarshal([]byte(out), app)
}

// becomes waits until the Application is as a test wants it.
func (a *argo) becomes(ctx context.Context, t *testing.T, what string, is func(*application) bool) *application {
	t.Helper()
	var app *application
	eventually(ctx, t, 90*time.Second, "Application "+what, func(ctx context.Context) (err error) {
		if app, err = a.get(ctx); err == nil && !is(app) {
			err = fmt.Errorf("it is %s", app)
		}
		return err
	})
	return app
}

func (a *argo) syncedAndHealthy(ctx context.Context, t *testing.T, commit string) *application {
	t.Helper()
	return a.becomes(ctx, t, "Synced and Healthy", func(app *application) bool {
		s := app.Status
		return s.Sync.Status == "Synced" && s.Health.Status == "Healthy" && s.Sync.Revision == commit && s.OperationState.Phase == "Succeeded"
	})
}

// push commits and tells Argo CD, as a webhook would.
func (a *argo) push(ctx context.Context, t *testing.T, message string, files map[string]string) string {
	t.Helper()
	commit, err := a.Commit(ctx, message, files)
	must(t, err)
	a.refresh(ctx, t)
	return commit
}

// refresh makes Argo CD compare git and cluster, and waits until it has.
func (a *argo) refresh(ctx context.Context, t *testing.T) {
	t.Helper()
	_, err := world.Cluster.Kubectl(ctx, "--namespace=argocd", "annotate", "--overwrite", "application", a.name, "argocd.argoproj.io/refresh=hard")
	must(t, err)
	eventually(ctx, t, time.Minute, "a refresh", func(ctx context.Context) error {
		asked, err := world.Cluster.Kubectl(ctx, "--namespace=argocd", "get", "application", a.name, `--output=jsonpath={.metadata.annotations.argocd\.argoproj\.io/refresh}`)
		if err == nil && asked != "" {
			err = errors.New("not yet")
		}
		return err
	})
}

// TestArgoCDSyncsTheExample runs the Application of examples/gitops through its life, by a real Argo CD: waves wait for the database, what
// works inside the cluster never makes it OutOfSync, a broken change is Degraded, and what leaves git leaves the database as its policy says.
func TestArgoCDSyncsTheExample(t *testing.T) {
	ctx, ns := begin(t, "argocd")
	server, err := gitops.StartArgoCD(ctx, world.Cluster)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(server.Log())
		}
		if err := server.Stop(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	})
	// The namespace comes with this Secret, and git has its own.
	_, err = ns.Kubectl(ctx, "delete", "secret", "app-db")
	must(t, err)

	repository, err := gitops.NewRepository(ctx, t.TempDir())
	must(t, err)
	a := &argo{Repository: repository, name: "orders"}
	const database = "argocd_later"
	execute(ctx, t, ns.DSN, "create database "+database+" allow_connections false")
	later := beside(ns, database)
	files := shop(t, later)
	commit, err := repository.Commit(ctx, "the shop", files)
	must(t, err)
	manifest := replaced(t, example(t, "argocd/application.yaml"), "https://git.example.com/shop.git", repository.URL())
	must(t, world.Cluster.Apply(ctx, replaced(t, manifest, "namespace: shop", "namespace: "+ns.Name)))

	step(t, "a wave waits for the one before it", func(t *testing.T) {
		app := a.becomes(ctx, t, "waits for the Stream", func(app *application) bool {
			return app.Status.OperationState.Phase == "Running" && strings.Contains(app.Status.OperationState.Message, "healthy state of millrace.dev/Stream/orders")
		})
		saysSo(ctx, t, ns, "stream", "orders", "DatabaseUnreachable", "not currently accepting connections")
		t.Logf("the Application is %s", app)
		if got := app.healthOf("Stream"); !strings.HasPrefix(got, "Progressing: ") {
			t.Errorf("the Stream is %s, want Progressing", got)
		}
		out, err := ns.Kubectl(ctx, "get", "consumergroups,processors", "--output=name")
		must(t, err)
		if out != "" {
			t.Errorf("later waves have begun: %s", out)
		}
		execute(ctx, t, ns.DSN, "alter database "+database+" allow_connections true")
		app = a.syncedAndHealthy(ctx, t, commit)
		t.Logf("the Application is %s", app)
	})

	publishOneOrder(ctx, t, later)

	step(t, "it stays Synced while the autoscaler works", func(t *testing.T) { a.staysSynced(ctx, t, ns, later) })

	step(t, "a plan that waits for approval is Suspended", func(t *testing.T) {
		commit := a.push(ctx, t, "more partitions, if somebody approves", map[string]string{
			"orders/stream.yaml": replaced(t, files["orders/stream.yaml"], "partitions: 8", "partitions: 16\n  changePolicy: Plan"),
		})
		app := a.becomes(ctx, t, "Suspended", func(app *application) bool { return app.Status.Health.Status == "Suspended" })
		t.Logf("the Application is %s", app)
		if got := app.healthOf("Stream"); !strings.HasPrefix(got, "Suspended: ApprovalPending: ") {
			t.Errorf("the Stream is %s", got)
		}
		hash, err := ns.Kubectl(ctx, "get", "stream", "orders", "--output=jsonpath={.status.plan.hash}")
		must(t, err)
		_, err = ns.Kubectl(ctx, "annotate", "stream", "orders", "millrace.dev/approve-plan="+hash) // as the action does
		must(t, err)
		a.syncedAndHealthy(ctx, t, commit)
	})

	step(t, "a broken mapping is Degraded and says why", func(t *testing.T) {
		a.push(ctx, t, "a type that is none", map[string]string{
			"orders/processor.yaml": replaced(t, files["orders/processor.yaml"], "type: numeric", "type: money"),
		})
		app := a.becomes(ctx, t, "Degraded", func(app *application) bool { return app.Status.Health.Status == "Degraded" })
		t.Logf("the Application is %s", app)
		if err := contains(app.healthOf("Processor"), "Degraded: InvalidConfiguration", "spec.mapping.columns[1].type", "money"); err != nil {
			t.Error(err)
		}
		a.syncedAndHealthy(ctx, t, a.push(ctx, t, "back again", map[string]string{"orders/processor.yaml": files["orders/processor.yaml"]}))
	})

	step(t, "what leaves git goes as its deletion policy says", func(t *testing.T) {
		commit := a.push(ctx, t, "no more orders", map[string]string{"orders/stream.yaml": "", "orders/consumergroup.yaml": "", "orders/processor.yaml": ""})
		a.syncedAndHealthy(ctx, t, commit)
		ordersAreGone(ctx, t, ns, later, 1+backlog)
	})
}

// backlog is what makes the autoscaler of the example want three pods.
const backlog = 2500

// staysSynced watches the Application while the autoscaler adds pods.
func (a *argo) staysSynced(ctx context.Context, t *testing.T, ns *scenario.Namespace, dsn string) {
	watching, stop := context.WithCancel(ctx)
	defer stop()
	seen := make(chan string, 1)
	go func() {
		out, _ := world.Cluster.Kubectl(watching, "--namespace=argocd", "get", "application", a.name, "--watch",
			`--output=jsonpath={.status.sync.status}{"\n"}`)
		seen <- out
	}()

	// Nothing can be written, so that a backlog stays.
	conn, err := pgx.Connect(ctx, dsn)
	must(t, err)
	defer conn.Close(context.WithoutCancel(ctx))
	tx, err := conn.Begin(ctx)
	must(t, err)
	_, err = tx.Exec(ctx, "lock table invoices in share row exclusive mode")
	must(t, err)
	execute(ctx, t, dsn, fmt.Sprintf(`select millrace.publish('orders', jsonb_build_object('order_id', 'b-' || i, 'amount', i)) from generate_series(1, %d) i`, backlog))
	_, err = ns.Kubectl(ctx, "wait", "--for=jsonpath={.spec.replicas}=3", "deployment/billing-processor", "--timeout=1m")
	must(t, err)
	a.refresh(ctx, t)
	must(t, tx.Rollback(ctx))
	awaitInvoices(ctx, t, dsn, 1+backlog)
	_, err = ns.Kubectl(ctx, "wait", "--for=jsonpath={.status.readyReplicas}=3", "processor/billing", "--timeout=1m")
	must(t, err)
	a.refresh(ctx, t)
	a.becomes(ctx, t, "Healthy with three pods", func(app *application) bool {
		return app.healthOf("Processor") == "Healthy: Ready: 3 of 3 pods are ready"
	})

	stop()
	statuses := <-seen
	if !strings.Contains(statuses, "Synced") {
		t.Errorf("the watch has seen nothing: %q", statuses)
	}
	for _, s := range strings.Fields(statuses) {
		if s != "Synced" {
			t.Errorf("the Application was %s", s)
		}
	}
}
