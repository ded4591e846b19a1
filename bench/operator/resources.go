package operator

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// Sizes are how many resources there are. Group i reads stream i, Processor i reads group i, both modulo how many there are.
type Sizes struct{ Streams, Groups, Processors int }

func (s Sizes) total() int { return s.Streams + s.Groups + s.Processors }

// creators is how many requests are on their way at a time: as many as make the API server busy.
const creators = 16

const secretName, secretKey = "database", "url"

// tenant is a namespace with a Secret that leads to a database.
func tenant(ctx context.Context, c client.Client, namespace, dsn string) error {
	if err := c.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}); err != nil {
		return err
	}
	return c.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: secretName}, StringData: map[string]string{secretKey: dsn}})
}

// resources are all that a tenant has, with what comes first before what refers to it, as in a file that a person applies.
func resources(namespace string, n Sizes) []client.Object {
	var all []client.Object
	for i := range n.Streams {
		s := &v1alpha1.Stream{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: streamName(i)}}
		s.Spec.DatabaseSecretRef = &v1alpha1.SecretKeyReference{Name: secretName, Key: secretKey}
		all = append(all, s)
	}
	for i := range n.Groups {
		g := &v1alpha1.ConsumerGroup{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: groupName(i)}}
		g.Spec.StreamRef.Name = streamName(i % n.Streams)
		g.Spec.Mode = v1alpha1.ModeShared
		if i%2 == 1 {
			g.Spec.Mode = v1alpha1.ModeOrdered
		}
		all = append(all, g)
	}
	for i := range n.Processors {
		p := &v1alpha1.Processor{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("sink-%d", i)}}
		p.Spec = v1alpha1.ProcessorSpec{
			Replicas: ptr.To(int32(1)),
			Source:   v1alpha1.Source{ConsumerGroup: &v1alpha1.ConsumerGroupSource{Name: groupName(i % n.Groups)}},
			Mapping: v1alpha1.Mapping{Columns: []v1alpha1.Column{
				{Name: "order_id", Path: "order_id", Type: "text", Required: true},
				{Name: "amount", Path: "amount", Type: "numeric"},
			}},
			Sink: v1alpha1.Sink{Table: &v1alpha1.TableSink{Name: fmt.Sprintf("orders_%d", i), Key: []string{"order_id"}}},
		}
		all = append(all, p)
	}
	return all
}

func streamName(i int) string { return fmt.Sprintf("orders-%d", i) }
func groupName(i int) string  { return fmt.Sprintf("billing-%d", i) }

// create makes objects in their order, as fast as the API server takes them.
func create(ctx context.Context, c client.Client, objects []client.Object) error {
	making, ctx := errgroup.WithContext(ctx)
	making.SetLimit(creators)
	for _, o := range objects {
		making.Go(func() error {
			if err := c.Create(ctx, o); err != nil {
				return fmt.Errorf("create %s: %w", o.GetName(), err)
			}
			return nil
		})
	}
	return making.Wait()
}

// remove deletes all of a tenant's resources, and lets Kubernetes do the rest.
func remove(ctx context.Context, c client.Client, namespace string) error {
	for _, o := range []client.Object{&v1alpha1.Processor{}, &v1alpha1.ConsumerGroup{}, &v1alpha1.Stream{}} {
		if err := c.DeleteAllOf(ctx, o, client.InNamespace(namespace)); err != nil {
			return err
		}
	}
	return nil
}
