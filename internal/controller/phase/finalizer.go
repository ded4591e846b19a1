package phase

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// SetFinalizer adds or removes our finalizer when it has to. A change since the object was read is a conflict, and the
// reconcile that follows it decides anew.
func SetFinalizer(ctx context.Context, c client.Client, o client.Object, want bool) error {
	if controllerutil.ContainsFinalizer(o, v1alpha1.Finalizer) == want {
		return nil
	}
	patched := o.DeepCopyObject().(client.Object)
	if want {
		controllerutil.AddFinalizer(patched, v1alpha1.Finalizer)
	} else {
		controllerutil.RemoveFinalizer(patched, v1alpha1.Finalizer)
	}
	err := c.Patch(ctx, patched, client.MergeFromWithOptions(o, client.MergeFromWithOptimisticLock{}), FieldOwner)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("set the finalizer: %w", err)
	}
	o.SetFinalizers(patched.GetFinalizers())
	o.SetResourceVersion(patched.GetResourceVersion())
	return nil
}
