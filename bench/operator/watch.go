package operator

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// kinds are those of the resources, in the order of the tables.
var kinds = []string{"stream", "group", "processor"}

// state is what is known of one resource.
type state struct {
	kind     string
	created  time.Time // when its creation was seen
	ready    time.Time // when it was first Ready for its newest generation; zero when it is not
	measured bool      // its figures are in status
	says     string    // its name and conditions, for a person
}

// watcher follows the resources of one namespace.
type watcher struct {
	mu      sync.Mutex
	states  map[types.UID]*state
	changed chan struct{} // gets a value after changes, if there is none in it
}

// watched is one of our kinds.
type watched interface {
	client.Object
	GetConditions() []metav1.Condition
}

// newWatcher watches until ctx ends. Whoever takes the API server's events too slowly loses the watch, which then begins anew with what is there.
func newWatcher(ctx context.Context, group *errgroup.Group, c client.WithWatch, namespace string) *watcher {
	w := &watcher{states: map[types.UID]*state{}, changed: make(chan struct{}, 1)}
	for i, list := range []client.ObjectList{&v1alpha1.StreamList{}, &v1alpha1.ConsumerGroupList{}, &v1alpha1.ProcessorList{}} {
		group.Go(func() error {
			for {
				if err := w.follow(ctx, c, namespace, kinds[i], list); err != nil && ctx.Err() == nil {
					return fmt.Errorf("watch the %ss: %w", kinds[i], err)
				}
				if ctx.Err() != nil {
					return nil
				}
			}
		})
	}
	return w
}

// follow lists the resources of a kind and watches them until the watch ends.
func (w *watcher) follow(ctx context.Context, c client.WithWatch, namespace, kind string, list client.ObjectList) error {
	if err := c.List(ctx, list, client.InNamespace(namespace)); err != nil {
		return err
	}
	there := map[types.UID]bool{}
	if err := meta.EachListItem(list, func(o runtime.Object) error {
		if o, ok := o.(watched); ok {
			there[o.GetUID()] = true
			w.note(kind, watch.Event{Type: watch.Added, Object: o})
		}
		return nil
	}); err != nil {
		return err
	}
	w.mu.Lock()
	for uid, s := range w.states {
		if s.kind == kind && !there[uid] {
			delete(w.states, uid)
		}
	}
	w.mu.Unlock()
	events, err := c.Watch(ctx, list, client.InNamespace(namespace), &client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: list.GetResourceVersion()}})
	if err != nil {
		return err
	}
	defer events.Stop()
	for e := range events.ResultChan() {
		if e.Type == watch.Error {
			return nil // too old a version, or too slow a reader: list again
		}
		w.note(kind, e)
	}
	return nil
}

func (w *watcher) note(kind string, e watch.Event) {
	o, ok := e.Object.(watched)
	if !ok {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.Type == watch.Deleted {
		delete(w.states, o.GetUID())
		return
	}
	s := w.states[o.GetUID()]
	if s == nil {
		s = &state{kind: kind, created: time.Now()}
		w.states[o.GetUID()] = s
	}
	s.measured, s.says = measured(o), says(o)
	switch c := meta.FindStatusCondition(o.GetConditions(), v1alpha1.ConditionReady); {
	case c == nil || c.Status != metav1.ConditionTrue || c.ObservedGeneration != o.GetGeneration():
		s.ready = time.Time{}
	case s.ready.IsZero():
		s.ready = time.Now()
	}
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// measured says whether the figures of the database have come into status, which is the last that happens to a new resource.
func measured(o watched) bool {
	switch o := o.(type) {
	case *v1alpha1.Stream:
		return o.Status.Messages != nil
	case *v1alpha1.ConsumerGroup:
		return meta.IsStatusConditionTrue(o.GetConditions(), v1alpha1.ConditionLagKnown)
	}
	return meta.IsStatusConditionTrue(o.GetConditions(), v1alpha1.ConditionLagKnown)
}

func says(o watched) string {
	text := o.GetName() + ":"
	for _, c := range o.GetConditions() {
		text += fmt.Sprintf(" %s=%s/%s %q", c.Type, c.Status, c.Reason, c.Message)
	}
	return text
}

// all waits until there are as many resources and every one passes.
func (w *watcher) all(ctx context.Context, n int, limit time.Duration, running func() error, pass func(*state) bool) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		passed, missing := map[string]int{}, ""
		w.mu.Lock()
		total := len(w.states)
		count := 0
		for _, s := range w.states {
			if pass(s) {
				passed[s.kind]++
				count++
			} else {
				missing = s.says
			}
		}
		w.mu.Unlock()
		if total == n && count == n {
			return nil
		}
		if err := running(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("of %d resources, %d are there and %v are as they should be: %w; one that is not is %s", n, total, passed, ctx.Err(), missing)
		case <-w.changed:
		case <-tick.C:
		}
	}
}

func isReady(s *state) bool    { return !s.ready.IsZero() }
func isMeasured(s *state) bool { return isReady(s) && s.measured }

// waits returns, for each kind, the seconds from the creation of each resource until it was Ready, and when the last one was.
func (w *watcher) waits() (byKind map[string][]float64, last time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	byKind = map[string][]float64{}
	for _, s := range w.states {
		byKind[s.kind] = append(byKind[s.kind], s.ready.Sub(s.created).Seconds())
		if s.ready.After(last) {
			last = s.ready
		}
	}
	return byKind, last
}

// readyFor waits until one resource is Ready in a generation.
func readyFor(ctx context.Context, events watch.Interface, uid types.UID, generation int64) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, open := <-events.ResultChan():
			if !open {
				return fmt.Errorf("the watch broke")
			}
			o, ok := e.Object.(watched)
			if !ok || o.GetUID() != uid || o.GetGeneration() < generation {
				continue
			}
			if c := meta.FindStatusCondition(o.GetConditions(), v1alpha1.ConditionReady); c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration >= generation {
				return nil
			}
		}
	}
}
