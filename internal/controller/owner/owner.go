// Package owner decides whether a resource may take what is in the database already.
//
// Ownership is a row in the database: cluster, namespace, name and UID of the resource. A resource that was deleted with
// deletionPolicy Retain leaves that row behind, so an owner that no longer exists is an orphan and may be followed.
package owner

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Verdict is what to do with ownership.
type Verdict int

// Verdicts.
const (
	// Mine: this resource owns it.
	Mine Verdict = iota
	// Adopt: nobody owns it, and this resource may.
	Adopt
	// Succeed: its owner is gone, or given up by annotation; release that first, then adopt.
	Succeed
)

// Claim is the question: may Self take What, which Present owns?
type Claim struct {
	What    string         // "stream \"orders\" in database …", for messages
	Self    pgstream.Owner // the resource that asks
	Present pgstream.Owner // zero: nobody
	Policy  v1alpha1.AdoptionPolicy
	// AdoptFrom is the value of the annotation millrace.dev/adopt-from.
	AdoptFrom string
	// Alive says whether the present owner, of the same cluster, still exists.
	Alive bool
}

// Decide answers a claim. Its error is a stall that tells what a person can do.
func Decide(c Claim) (Verdict, error) {
	switch {
	case c.Present == c.Self:
		return Mine, nil
	case c.Present == (pgstream.Owner{}):
		if c.Policy == v1alpha1.AdoptionNever {
			return 0, phase.Stallf(v1alpha1.ReasonAdoptionRefused,
				"%s exists already and adoptionPolicy is Never. Set adoptionPolicy: IfUnowned to take it over with what is in it, or choose another name", c.What)
		}
		return Adopt, nil
	case c.Present.Cluster != c.Self.Cluster && c.AdoptFrom == c.Present.Cluster:
		return Succeed, nil
	case c.Present.Cluster != c.Self.Cluster:
		return 0, phase.Stallf(v1alpha1.ReasonConflict,
			"%s belongs to %s/%s of another cluster, %s. Choose another name; or, when that cluster is gone, annotate this resource with %s=%s",
			c.What, c.Present.Namespace, c.Present.Name, c.Present.Cluster, v1alpha1.AnnotationAdoptFrom, c.Present.Cluster)
	case c.Alive:
		return 0, phase.Stallf(v1alpha1.ReasonConflict,
			"%s belongs to %s/%s. Choose another name, or delete that resource; with its deletionPolicy Retain this one then takes over",
			c.What, c.Present.Namespace, c.Present.Name)
	case c.Policy == v1alpha1.AdoptionNever:
		return 0, phase.Stallf(v1alpha1.ReasonAdoptionRefused,
			"%s was left behind by %s/%s and adoptionPolicy is Never. Set adoptionPolicy: IfUnowned to take it over with what is in it, or choose another name",
			c.What, c.Present.Namespace, c.Present.Name)
	}
	return Succeed, nil
}

// Alive says whether the resource that owns something still exists. It asks the API server, not a cache that may be behind,
// and counts an owner that it may not see as alive. into is an empty object of the owner's kind.
func Alive(ctx context.Context, live client.Reader, o pgstream.Owner, into client.Object) (bool, error) {
	err := live.Get(ctx, client.ObjectKey{Namespace: o.Namespace, Name: o.Name}, into)
	switch {
	case apierrors.IsNotFound(err):
		return false, nil
	case apierrors.IsForbidden(err):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("look for the owner %s/%s: %w", o.Namespace, o.Name, err)
	}
	return into.GetUID() == types.UID(o.UID), nil
}

// Older says whether a was created before b; at the same second the smaller UID counts as older, so that every manager agrees.
func Older(a, b client.Object) bool {
	x, y := a.GetCreationTimestamp(), b.GetCreationTimestamp()
	if x.Equal(&y) {
		return a.GetUID() < b.GetUID()
	}
	return x.Before(&y)
}
