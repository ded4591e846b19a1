package database

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// Resolver finds the database of a resource from the Secret that it names.
type Resolver struct {
	// Reader reads Secrets from the API server and caches nothing.
	Reader client.Reader
	// Metadata reads the versions of Secrets from a cache, so that one which has not changed is not read again. Optional.
	Metadata client.Reader
	// Registry holds the pools.
	Registry *Registry
	// Default is the connection string of the installation's default database; empty when there is none.
	Default string

	mu sync.Mutex
	// last is the database that each Secret key led to, for deletions whose Secret went first.
	last map[secretKey]*Database
	// versions are the resource versions of the Secrets that said so.
	versions map[secretKey]string
}

type secretKey struct{ namespace, name, key string }

// Resolve returns the database that ref names in namespace, or the default database when ref is nil. It connects to nothing.
func (r *Resolver) Resolve(ctx context.Context, namespace string, ref *v1alpha1.SecretKeyReference) (*Database, error) {
	if ref == nil {
		if r.Default == "" {
			return nil, phase.Stallf(v1alpha1.ReasonDefaultDatabaseMissing,
				"spec names no database and this installation has no default. Set spec.databaseSecretRef to a Secret key "+
					"that holds a connection string, or give the manager a default database")
		}
		d, err := r.Registry.Get(r.Default)
		if err != nil {
			return nil, phase.Stallf(v1alpha1.ReasonSecretInvalid, "the installation's default database: %w", err)
		}
		return d, nil
	}
	key := secretKey{namespace, ref.Name, ref.Key}
	if d := r.unchanged(ctx, key); d != nil {
		return d, nil
	}
	value, version, err := ReadSecret(ctx, r.Reader, namespace, *ref)
	if err != nil {
		return nil, err
	}
	d, err := r.Registry.Get(value)
	if err != nil {
		return nil, phase.Stallf(v1alpha1.ReasonSecretInvalid, "Secret %q, key %q: %w", ref.Name, ref.Key, err)
	}
	r.leads(key, d, version)
	return d, nil
}

// leads remembers where a version of a Secret key leads, and lets go of the database that no key leads to any more.
func (r *Resolver) leads(key secretKey, d *Database, version string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil {
		r.last, r.versions = map[secretKey]*Database{}, map[secretKey]string{}
	}
	before := r.last[key]
	r.last[key], r.versions[key] = d, version
	if before != nil && before != d && !slices.Contains(slices.Collect(maps.Values(r.last)), before) {
		r.Registry.forget(before)
	}
}

// unchanged returns the database that a Secret key led to, if the Secret is still the one that was read; nil when it has to be read. The cache may be
// late: the watch that makes it newer wakes the resource, too.
func (r *Resolver) unchanged(ctx context.Context, key secretKey) *Database {
	r.mu.Lock()
	d, version := r.last[key], r.versions[key]
	r.mu.Unlock()
	if d == nil || r.Metadata == nil || !IsSecretVersion(ctx, r.Metadata, key.namespace, key.name, version) || !r.Registry.holds(d) {
		return nil
	}
	return d
}

// IsSecretVersion says whether a cache of metadata has a Secret in the version that was read, so that what was learnt from it still holds.
func IsSecretVersion(ctx context.Context, metadata client.Reader, namespace, name, version string) bool {
	var secret metav1.PartialObjectMetadata
	secret.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Secret"))
	err := metadata.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &secret)
	return err == nil && version != "" && secret.ResourceVersion == version
}

// ResolveForDeletion is Resolve for a resource that is going away: when a whole namespace is deleted its Secrets may go
// first, and then the database that the Secret led to last will do.
func (r *Resolver) ResolveForDeletion(ctx context.Context, namespace string, ref *v1alpha1.SecretKeyReference) (*Database, error) {
	d, err := r.Resolve(ctx, namespace, ref)
	if err == nil || ref == nil {
		return d, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if last, ok := r.last[secretKey{namespace, ref.Name, ref.Key}]; ok {
		return last, nil
	}
	return nil, err
}

// ReadSecret returns the value of a Secret's key, and the resource version of the Secret. A missing Secret waits for it, a missing key stalls.
func ReadSecret(ctx context.Context, reader client.Reader, namespace string, ref v1alpha1.SecretKeyReference) (value, version string, err error) {
	var secret corev1.Secret
	err = reader.Get(ctx, client.ObjectKey{Namespace: namespace, Name: ref.Name}, &secret)
	switch {
	case apierrors.IsNotFound(err):
		return "", "", phase.Waitf(v1alpha1.ReasonSecretMissing, 0,
			"Secret %q does not exist in namespace %q. Create it with key %q, for example: "+
				"kubectl -n %s create secret generic %s --from-literal=%s=…", ref.Name, namespace, ref.Key, namespace, ref.Name, ref.Key)
	case apierrors.IsForbidden(err):
		return "", "", phase.Stallf(v1alpha1.ReasonSecretMissing,
			"the manager may not read Secret %q in namespace %q. Grant its service account get on secrets there", ref.Name, namespace)
	case err != nil:
		return "", "", fmt.Errorf("read Secret %q: %w", ref.Name, err)
	}
	data, ok := secret.Data[ref.Key]
	if !ok {
		return "", "", phase.Stallf(v1alpha1.ReasonSecretKeyMissing,
			"Secret %q has no key %q; it has %s. Add the key, or name another one in spec", ref.Name, ref.Key, keys(secret.Data))
	}
	// Files and editors end a line; connection strings do not.
	return strings.TrimSpace(string(data)), secret.ResourceVersion, nil
}

func keys(data map[string][]byte) string {
	if len(data) == 0 {
		return "none"
	}
	names := make([]string, 0, len(data))
	for name := range data {
		names = append(names, fmt.Sprintf("%q", name))
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}
