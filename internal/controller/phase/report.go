package phase

import (
	"context"
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/apiutil"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// FieldOwner is the name under which the manager writes. One for all controllers is enough, because no object has two that write it.
const FieldOwner = client.FieldOwner("millrace")

// Object is one of our kinds.
type Object interface {
	client.Object
	GetConditions() []metav1.Condition
	SetConditions([]metav1.Condition)
}

// writeTries is how often WriteStatus looks for the newest version of a resource that others write at the same time.
const writeTries = 5

// WriteStatus applies the status of after when it differs from that of before. It and WriteFigures are the only writers of
// status. What a reconcile has found and done is known to nobody else, so it is written over what the cache did not show yet: live, which reads from the
// API server, says in which version. A resource that is gone meanwhile is success, and one that took its name is left alone: the API server
// ignores the UID in an update of status, but not the version.
func WriteStatus(ctx context.Context, c client.Client, live client.Reader, before, after Object) error {
	version := after.GetResourceVersion()
	for try := 1; ; try++ {
		err := writeStatus(ctx, c, before, after, version)
		if !apierrors.IsConflict(err) || try == writeTries {
			return err
		}
		if version, err = newestVersion(ctx, c, live, after); version == "" {
			return err
		}
	}
}

// WriteFigures is WriteStatus for a reconcile that looked at nothing but figures. The rest of its status is what the cache
// had, which may be older than what this process wrote a moment ago; then it writes nothing and returns a conflict.
func WriteFigures(ctx context.Context, c client.Client, before, after Object) error {
	return writeStatus(ctx, c, before, after, before.GetResourceVersion())
}

func writeStatus(ctx context.Context, c client.Client, before, after Object, resourceVersion string) error {
	status, err := statusOf(after)
	if err != nil {
		return err
	}
	if old, err := statusOf(before); err != nil {
		return err
	} else if equality.Semantic.DeepEqual(old, status) {
		return nil
	}
	gvk, err := apiutil.GVKForObject(after, c.Scheme())
	if err != nil {
		return fmt.Errorf("write status: %w", err)
	}
	u := &unstructured.Unstructured{Object: map[string]any{"status": status}}
	u.SetGroupVersionKind(gvk)
	u.SetNamespace(after.GetNamespace())
	u.SetName(after.GetName())
	u.SetResourceVersion(resourceVersion)
	err = c.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(u), FieldOwner, client.ForceOwnership)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write status: %w", err)
	}
	return nil
}

// newestVersion returns the version of a resource at the API server, "" when it is gone. It lists, because the manager may list all of its kinds, and get only some.
func newestVersion(ctx context.Context, c client.Client, live client.Reader, o Object) (string, error) {
	gvk, err := apiutil.GVKForObject(o, c.Scheme())
	if err != nil {
		return "", fmt.Errorf("write status: %w", err)
	}
	list := &metav1.PartialObjectMetadataList{}
	list.SetGroupVersionKind(gvk.GroupVersion().WithKind(gvk.Kind + "List"))
	if err := live.List(ctx, list, client.InNamespace(o.GetNamespace()), client.MatchingFields{"metadata.name": o.GetName()}); err != nil {
		return "", fmt.Errorf("write status: %w", err)
	}
	for _, x := range list.Items {
		if x.UID == o.GetUID() {
			return x.ResourceVersion, nil
		}
	}
	return "", nil
}

func statusOf(o Object) (map[string]any, error) {
	fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
	if err != nil {
		return nil, fmt.Errorf("read status: %w", err)
	}
	status, _, err := unstructured.NestedMap(fields, "status")
	if err != nil {
		return nil, fmt.Errorf("read status: %w", err)
	}
	return status, nil
}

// Announcer sends an event at each change of a resource's Ready, and one only: the cache may still show what was before a status that this process has
// written a moment ago. What it has forgotten is announced again.
type Announcer struct {
	recorder events.EventRecorder

	mu   sync.Mutex
	last map[types.UID]announced
}

type announced struct {
	status metav1.ConditionStatus
	reason string
}

// NewAnnouncer returns one that has announced nothing.
func NewAnnouncer(recorder events.EventRecorder) *Announcer {
	return &Announcer{recorder: recorder, last: map[types.UID]announced{}}
}

// Forget lets go of a resource that is gone.
func (a *Announcer) Forget(uid types.UID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.last, uid)
}

// isNews notes what is announced of a resource, and says whether it was not announced last.
func (a *Announcer) isNews(uid types.UID, is *metav1.Condition) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := announced{is.Status, is.Reason}
	if a.last[uid] == now {
		return false
	}
	a.last[uid] = now
	return true
}

// Announce sends an event when the status or reason of Ready differs between before and after.
func (a *Announcer) Announce(before, after Object) {
	was := meta.FindStatusCondition(before.GetConditions(), v1alpha1.ConditionReady)
	is := meta.FindStatusCondition(after.GetConditions(), v1alpha1.ConditionReady)
	if is == nil || was != nil && was.Status == is.Status && was.Reason == is.Reason || !a.isNews(after.GetUID(), is) {
		return
	}
	kind := corev1.EventTypeNormal
	if is.Status == metav1.ConditionFalse {
		switch is.Reason {
		case v1alpha1.ReasonProgressing, v1alpha1.ReasonRollingOut, v1alpha1.ReasonApprovalPending:
		default:
			kind = corev1.EventTypeWarning
		}
	}
	Event(a.recorder, after, kind, is.Reason, is.Message)
}

// eventMax is the longest note that the API server takes.
const eventMax = 1024

// Event sends one event about a resource.
func Event(recorder events.EventRecorder, about client.Object, kind, reason, note string) {
	EventWith(recorder, about, nil, kind, reason, note)
}

// EventWith is Event that names another object in the version that it got. The recorder counts a second event as a repeat of the first, without its note,
// when reason, resource and its version are the same, and a cache may show one version for long. The other object tells them apart.
func EventWith(recorder events.EventRecorder, about client.Object, other runtime.Object, kind, reason, note string) {
	if len(note) > eventMax {
		note = note[:eventMax-3] + "..."
	}
	recorder.Eventf(about, other, kind, reason, "Reconcile", "%s", note)
}
