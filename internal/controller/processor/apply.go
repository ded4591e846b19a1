package processor

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	appsac "k8s.io/client-go/applyconfigurations/apps/v1"
	coreac "k8s.io/client-go/applyconfigurations/core/v1"
	policyac "k8s.io/client-go/applyconfigurations/policy/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// renderObjects is the phase around render.
func (r *Reconciler) renderObjects(_ context.Context, sc *scope) error {
	o, err := render(sc.processor, sc.inputs)
	if err != nil {
		return phase.Stall(v1alpha1.ReasonInvalidConfiguration, err)
	}
	sc.objects = o
	return nil
}

// apply brings the objects to what render made. The Deployment comes last, so that its pods find the rest.
func (r *Reconciler) apply(ctx context.Context, sc *scope) error {
	p, o := sc.processor, sc.objects
	owner := string(phase.FieldOwner)
	if o.serviceAccount != nil {
		live := &corev1.ServiceAccount{}
		if err := applyOne(ctx, r, p, "ServiceAccount", live, o.serviceAccount, func() (*coreac.ServiceAccountApplyConfiguration, error) {
			return coreac.ExtractServiceAccount(live, owner)
		}); err != nil {
			return err
		}
	}
	settings := &corev1.ConfigMap{}
	if err := applyOne(ctx, r, p, "ConfigMap", settings, o.config, func() (*coreac.ConfigMapApplyConfiguration, error) {
		return coreac.ExtractConfigMap(settings, owner)
	}); err != nil {
		return err
	}
	budget := &policyv1.PodDisruptionBudget{}
	if err := applyOne(ctx, r, p, "PodDisruptionBudget", budget, o.budget, func() (*policyac.PodDisruptionBudgetApplyConfiguration, error) {
		return policyac.ExtractPodDisruptionBudget(budget, owner)
	}); err != nil {
		return err
	}
	deployment := &appsv1.Deployment{}
	if err := applyOne(ctx, r, p, "Deployment", deployment, o.deployment, func() (*appsac.DeploymentApplyConfiguration, error) {
		return appsac.ExtractDeployment(deployment, owner)
	}); err != nil {
		return err
	}
	if o.deployment.Generation != nil { // the API server's answer, when something was written
		sc.written = *o.deployment.Generation
	}
	return nil
}

// applyOne writes one object when what we own in the live one differs from what we want (C2). extract reads that from live,
// after live has been filled.
func applyOne[A runtime.ApplyConfiguration](ctx context.Context, r *Reconciler, p *v1alpha1.Processor, kind string,
	live client.Object, want A, extract func() (A, error)) error {
	name := childName(p)
	key := client.ObjectKey{Namespace: p.Namespace, Name: name}
	err := r.Client.Get(ctx, key, live)
	if apierrors.IsNotFound(err) {
		// The cache holds only what is labelled as ours. Before a first write the API server is asked.
		err = r.Live.Get(ctx, key, live)
	}
	switch {
	case apierrors.IsNotFound(err):
	case err != nil:
		return fmt.Errorf("read %s %q: %w", kind, name, err)
	case !metav1.IsControlledBy(live, p):
		return phase.Stallf(v1alpha1.ReasonNameTaken,
			"%s %q exists in namespace %q and does not belong to this Processor. Delete or rename it, or give the Processor another name", kind, name, p.Namespace)
	default:
		has, err := extract()
		if err != nil {
			return fmt.Errorf("read what we own of %s %q: %w", kind, name, err)
		}
		if same, err := equalJSON(has, want); err != nil || same {
			return err
		}
	}
	if err := r.Client.Apply(ctx, want, phase.FieldOwner, client.ForceOwnership); err != nil {
		if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
			return phase.Stallf(v1alpha1.ReasonFailed, "the API server refuses %s %q: %w", kind, name, err)
		}
		return fmt.Errorf("apply %s %q: %w", kind, name, err)
	}
	return nil
}

// equalJSON compares two apply configurations by what they would send.
func equalJSON(a, b any) (bool, error) {
	x, err := decoded(a)
	if err != nil {
		return false, err
	}
	y, err := decoded(b)
	if err != nil {
		return false, err
	}
	return reflect.DeepEqual(x, y), nil
}

func decoded(v any) (any, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("compare objects: %w", err)
	}
	var out any
	return out, json.Unmarshal(text, &out)
}

// copyInto gives an apply configuration the value of its API type, which has the same JSON.
func copyInto[From, To any](from From, to *To) {
	text, err := json.Marshal(from)
	if err == nil && string(text) != "null" {
		err = json.Unmarshal(text, to)
	}
	if err != nil {
		panic(fmt.Sprintf("processor: %T and %T have different JSON: %v", from, *to, err))
	}
}
