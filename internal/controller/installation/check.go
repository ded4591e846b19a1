package installation

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
)

// Options say what was installed.
type Options struct {
	// Namespaces that the manager looks after. Empty: all.
	Namespaces []string
	// LeaseNamespace and LeaseName of the Kubernetes Lease that a working manager holds. Required.
	LeaseNamespace, LeaseName string
	// MetricsURL of the manager, which has to refuse strangers. Empty: not looked at.
	MetricsURL string
	// DatabaseURL of the default database. Empty: there is none.
	DatabaseURL string
}

// Check writes a line to out for everything it looks at. Its error counts what is wrong; the lines say what that is. What
// only takes time, such as a manager that starts, is waited for until ctx ends.
func Check(ctx context.Context, cfg *rest.Config, o Options, out io.Writer) error {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return err
		}
	}
	api, err := client.New(cfg, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("create a client: %w", err)
	}
	checks := []struct {
		what string
		do   func(ctx context.Context) error
		skip bool
	}{
		{"the CRDs are those of this version", func(ctx context.Context) error { return checkDefinitions(ctx, cfg) }, false},
		{"the manager may read what it looks after", func(ctx context.Context) error { return checkAccess(ctx, api, o.Namespaces) }, false},
		{"a manager works", func(ctx context.Context) error { return untilNil(ctx, func() error { return checkLease(ctx, api, o) }) }, false},
		{"the metrics are refused to strangers", func(ctx context.Context) error {
			return untilNil(ctx, func() error { return checkMetrics(ctx, o.MetricsURL) })
		}, o.MetricsURL == ""},
		{"the default database answers", func(ctx context.Context) error { return checkDatabase(ctx, o.DatabaseURL) }, o.DatabaseURL == ""},
	}
	// Side by side: one that waits until the end leaves no time to those after it.
	results := make([]error, len(checks))
	var running sync.WaitGroup
	for i, c := range checks {
		if !c.skip {
			running.Go(func() { results[i] = c.do(ctx) })
		}
	}
	running.Wait()
	failed := 0
	for i, c := range checks {
		switch err := results[i]; {
		case c.skip:
		case err != nil:
			failed++
			fmt.Fprintf(out, "FAIL  %s: %v\n", c.what, err)
		default:
			fmt.Fprintf(out, "ok    %s\n", c.what)
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of the checks failed", failed)
	}
	return nil
}

// untilNil repeats f every second until it returns nil or ctx ends.
func untilNil(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Second):
		}
	}
}

func checkDefinitions(ctx context.Context, cfg *rest.Config) error {
	missing, err := MissingFields(ctx, cfg)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("they lack %s: upgrade them, by crds.enabled of the chart or kubectl apply --server-side", strings.Join(missing, ", "))
	}
	return nil
}

// checkAccess reads one object of every kind that the manager watches.
func checkAccess(ctx context.Context, api client.Client, namespaces []string) error {
	if len(namespaces) == 0 {
		namespaces = []string{metav1.NamespaceAll}
	}
	secrets := &metav1.PartialObjectMetadataList{}
	secrets.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("SecretList"))
	var errs []error
	for _, namespace := range namespaces {
		for _, list := range []client.ObjectList{
			&v1alpha1.StreamList{}, &v1alpha1.ConsumerGroupList{}, &v1alpha1.ProcessorList{}, &appsv1.DeploymentList{},
			&corev1.ConfigMapList{}, &corev1.ServiceAccountList{}, &policyv1.PodDisruptionBudgetList{}, secrets,
		} {
			if err := api.List(ctx, list, client.InNamespace(namespace), client.Limit(1)); err != nil {
				errs = append(errs, err)
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w; the roles of the chart give these permissions (rbac.create), in the namespaces that it was told", err)
	}
	return nil
}

func checkLease(ctx context.Context, api client.Client, o Options) error {
	var lease coordinationv1.Lease
	if err := api.Get(ctx, client.ObjectKey{Namespace: o.LeaseNamespace, Name: o.LeaseName}, &lease); err != nil {
		return fmt.Errorf("%w: look at the manager's pods and their logs in namespace %s", err, o.LeaseNamespace)
	}
	s := lease.Spec
	if s.HolderIdentity == nil || *s.HolderIdentity == "" || s.RenewTime == nil || s.LeaseDurationSeconds == nil {
		return fmt.Errorf("nobody holds Lease %s: look at the manager's pods and their logs in namespace %s", o.LeaseName, o.LeaseNamespace)
	}
	// Twice its duration: clocks of nodes differ.
	if age := time.Since(s.RenewTime.Time); age > 2*time.Duration(*s.LeaseDurationSeconds)*time.Second {
		return fmt.Errorf("%s has not renewed Lease %s for %s: look at the manager's pods and their logs in namespace %s",
			*s.HolderIdentity, o.LeaseName, age.Round(time.Second), o.LeaseNamespace)
	}
	return nil
}

// stranger talks to the metrics without a token. It need not know who it talks to: it tells nothing.
var stranger = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 10 * time.Second}

func checkMetrics(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := stranger.Do(req)
	if err != nil {
		return fmt.Errorf("%w: look at the Service of the metrics, and at network policies", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		return fmt.Errorf("they answer %s to a request without a token: set metrics.secure", resp.Status)
	}
	return nil
}

func checkDatabase(ctx context.Context, url string) error {
	if err := database.Check(url); err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err // pgx leaves the password out
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var user, name string
	var may bool
	const question = `select current_user, current_database(), has_database_privilege(current_database(), 'CREATE') or exists (select from pg_namespace where nspname = 'millrace')`
	if err := conn.QueryRow(ctx, question).Scan(&user, &name, &may); err != nil {
		return err
	}
	if !may {
		return fmt.Errorf("%s may not create the schema millrace: grant create on database %s to %s", user, pgx.Identifier{name}.Sanitize(), pgx.Identifier{user}.Sanitize())
	}
	return nil
}
