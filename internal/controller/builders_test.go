package controller_test

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// The builders make the dull parts, so that a test shows only what it is about.

// appDB is the Secret key that builders refer to.
var appDB = v1alpha1.SecretKeyReference{Name: "app-db", Key: "dsn"}

func newStream(name string, options ...func(*v1alpha1.StreamSpec)) *v1alpha1.Stream {
	s := &v1alpha1.Stream{ObjectMeta: metav1.ObjectMeta{Name: name}}
	s.Spec.DatabaseSecretRef = ptr.To(appDB)
	for _, o := range options {
		o(&s.Spec)
	}
	return s
}

func partitions(n int32) func(*v1alpha1.StreamSpec) {
	return func(s *v1alpha1.StreamSpec) { s.Partitions = n }
}

func streamDeletion(p v1alpha1.DeletionPolicy) func(*v1alpha1.StreamSpec) {
	return func(s *v1alpha1.StreamSpec) { s.DeletionPolicy = p }
}

func neverAdopt(s *v1alpha1.StreamSpec) { s.AdoptionPolicy = v1alpha1.AdoptionNever }

func newGroup(name, stream string, options ...func(*v1alpha1.ConsumerGroupSpec)) *v1alpha1.ConsumerGroup {
	g := &v1alpha1.ConsumerGroup{ObjectMeta: metav1.ObjectMeta{Name: name}}
	g.Spec.StreamRef.Name = stream
	for _, o := range options {
		o(&g.Spec)
	}
	return g
}

func groupDeletion(p v1alpha1.DeletionPolicy) func(*v1alpha1.ConsumerGroupSpec) {
	return func(g *v1alpha1.ConsumerGroupSpec) { g.DeletionPolicy = p }
}

// newProcessor reads a group and writes order_id and amount into the table orders.
func newProcessor(name, group string, options ...func(*v1alpha1.ProcessorSpec)) *v1alpha1.Processor {
	p := &v1alpha1.Processor{ObjectMeta: metav1.ObjectMeta{Name: name}}
	p.Spec = v1alpha1.ProcessorSpec{
		Source: v1alpha1.Source{ConsumerGroup: &v1alpha1.ConsumerGroupSource{Name: group}},
		Mapping: v1alpha1.Mapping{Columns: []v1alpha1.Column{
			{Name: "order_id", Path: "order_id", Type: "text", Required: true},
			{Name: "amount", Path: "amount", Type: "numeric"},
		}},
		Sink: v1alpha1.Sink{Table: &v1alpha1.TableSink{Name: "orders", Key: []string{"order_id"}}},
	}
	for _, o := range options {
		o(&p.Spec)
	}
	return p
}

// fromRedis makes a Processor read Redis and write to the database of app-db.
func fromRedis(p *v1alpha1.ProcessorSpec) {
	p.Source = v1alpha1.Source{Redis: &v1alpha1.RedisSource{
		URLSecretRef: v1alpha1.SecretKeyReference{Name: "telemetry-redis", Key: "url"}, Streams: []string{"telemetry:t"},
	}}
	p.Sink.Table.DatabaseSecretRef = ptr.To(appDB)
}
