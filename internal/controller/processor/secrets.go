package processor

import (
	"context"
	"sync"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// learnt is what is kept of a Secret's key that has passed its check: where it leads, and nothing that is a secret (C3).
type learnt struct {
	version string // of the Secret
	login   login  // zero unless it is a connection string of PostgreSQL
	address string // by secretFile.address
}

// secretUse is a key of a Secret in one of its uses, which differ in their checks.
type secretUse struct{ key, variable string }

// secrets remembers what was learnt, so that two hundred Processors of one database read its Secret once and not at each look at their pods. What was learnt of a
// Secret is kept until the Secret is gone. The zero value is ready.
type secrets struct {
	mu    sync.Mutex
	known map[client.ObjectKey]map[secretUse]learnt
}

func (s *secrets) get(secret client.ObjectKey, use secretUse) learnt {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known[secret][use]
}

func (s *secrets) put(secret client.ObjectKey, use secretUse, l learnt) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = map[client.ObjectKey]map[secretUse]learnt{}
	}
	if s.known[secret] == nil {
		s.known[secret] = map[secretUse]learnt{}
	}
	s.known[secret][use] = l
}

func (s *secrets) forget(secret client.ObjectKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.known, secret)
}

// readSecret checks a key of a Secret that pods will read, unless that was done for its present version. The value is forgotten.
func (r *Reconciler) readSecret(ctx context.Context, namespace string, s secretFile) (learnt, error) {
	secret, use := client.ObjectKey{Namespace: namespace, Name: s.ref.Name}, secretUse{s.ref.Key, s.variable}
	if l := r.secrets.get(secret, use); database.IsSecretVersion(ctx, r.Client, namespace, s.ref.Name, l.version) {
		return l, nil
	}
	value, version, err := database.ReadSecret(ctx, r.Live, namespace, s.ref)
	if err != nil {
		return learnt{}, err
	}
	if err := s.check(value); err != nil {
		return learnt{}, phase.Stallf(v1alpha1.ReasonSecretInvalid, "Secret %q, key %q: %w", s.ref.Name, s.ref.Key, err)
	}
	l := learnt{version: version}
	switch s.variable {
	case config.EnvSourceDatabaseURL, config.EnvSourceListenURL, config.EnvSinkDatabaseURL:
		l.login = loginOf(value)
	}
	if s.address != nil {
		l.address = s.address(value)
	}
	r.secrets.put(secret, use, l)
	return l, nil
}
