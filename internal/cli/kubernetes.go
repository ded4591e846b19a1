package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// apiTimeout bounds a request to the Kubernetes API.
const apiTimeout = 15 * time.Second

// foundStream is a Kubernetes Stream.
type foundStream struct {
	api       client.Client
	namespace string
	resource  v1alpha1.Stream
	stream    string // its name in the database
}

// findStream reads the Kubernetes Stream that --stream names, with the user's kubeconfig.
func findStream(ctx context.Context, c *connection) (*foundStream, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = c.kubeconfig
	overrides := &clientcmd.ConfigOverrides{CurrentContext: c.context}
	overrides.Context.Namespace = c.namespace
	kubeconfig := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides)
	cfg, err := kubeconfig.ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, errors.New("there is no kubeconfig for --stream: set KUBECONFIG, or pass --kubeconfig")
	}
	if err != nil {
		return nil, fmt.Errorf("find the Kubernetes API for --stream: %w", err)
	}
	cfg.Timeout = apiTimeout
	f := &foundStream{}
	if f.namespace, _, err = kubeconfig.Namespace(); err != nil {
		return nil, fmt.Errorf("find the namespace of --stream: %w", err)
	}
	scheme := runtime.NewScheme()
	utilruntime.Must(corev1.AddToScheme(scheme))
	utilruntime.Must(v1alpha1.AddToScheme(scheme))
	if f.api, err = client.New(cfg, client.Options{Scheme: scheme}); err != nil {
		return nil, fmt.Errorf("reach the Kubernetes API at %s: %w", cfg.Host, err)
	}
	err = f.api.Get(ctx, client.ObjectKey{Namespace: f.namespace, Name: c.stream}, &f.resource)
	switch {
	case meta.IsNoMatchError(err):
		return nil, fmt.Errorf("the cluster at %s has no Streams: Millrace is not installed there", cfg.Host)
	case apierrors.IsNotFound(err):
		return nil, missing(fmt.Sprintf("Stream %q of namespace %q", c.stream, f.namespace), "Streams there", c.stream, f.names(ctx), "")
	case apierrors.IsForbidden(err):
		return nil, fmt.Errorf("you may not read Stream %q in namespace %q: ask for get on streams.millrace.dev, or pass --database-url", c.stream, f.namespace)
	case err != nil:
		return nil, fmt.Errorf("read Stream %q of namespace %q at %s: %w", c.stream, f.namespace, cfg.Host, err)
	}
	f.stream = f.resource.DatabaseName()
	return f, nil
}

// names lists the Streams of the namespace, to help who has mistyped one.
func (f *foundStream) names(ctx context.Context) []string {
	var list v1alpha1.StreamList
	if err := f.api.List(ctx, &list, client.InNamespace(f.namespace)); err != nil {
		return nil
	}
	names := make([]string, len(list.Items))
	for i := range list.Items {
		names[i] = list.Items[i].Name
	}
	return names
}

// secret reads the connection string where the manager reads it.
func (f *foundStream) secret(ctx context.Context) (string, error) {
	ref := f.resource.Spec.DatabaseSecretRef
	if ref == nil {
		return "", fmt.Errorf("Stream %q names no Secret: it is in the default database of the installation, whose connection string only the manager has. Pass --database-url",
			f.resource.Name)
	}
	var secret corev1.Secret
	err := f.api.Get(ctx, client.ObjectKey{Namespace: f.namespace, Name: ref.Name}, &secret)
	switch {
	case apierrors.IsForbidden(err):
		return "", fmt.Errorf("you may not read Secret %q in namespace %q, which holds the connection string: ask for get on it, or pass --database-url", ref.Name, f.namespace)
	case apierrors.IsNotFound(err):
		return "", fmt.Errorf("Secret %q, which Stream %q names, does not exist in namespace %q", ref.Name, f.resource.Name, f.namespace)
	case err != nil:
		return "", fmt.Errorf("read Secret %q of namespace %q: %w", ref.Name, f.namespace, err)
	}
	value, ok := secret.Data[ref.Key]
	if !ok {
		return "", fmt.Errorf("Secret %q of namespace %q has no key %q, which Stream %q names", ref.Name, f.namespace, ref.Key, f.resource.Name)
	}
	return strings.TrimSpace(string(value)), nil
}

// portForward says how to reach a database that has an address only inside the cluster.
func (f *foundStream) portForward(url string) string {
	config, err := parse(url)
	if err != nil {
		return ""
	}
	host, namespace := config.ConnConfig.Host, f.namespace
	if net.ParseIP(host) != nil || strings.HasPrefix(host, "/") {
		return ""
	}
	service, rest, _ := strings.Cut(host, ".")
	if part, domain, _ := strings.Cut(rest, "."); rest != "" && (domain == "" || strings.HasPrefix(domain, "svc")) {
		namespace = part
	}
	port := strconv.Itoa(int(config.ConnConfig.Port))
	return fmt.Sprintf("If that address is one inside the cluster, run this beside it, and add --address localhost:%s\n  kubectl -n %s port-forward svc/%s %s:%s",
		port, namespace, service, port, port)
}
