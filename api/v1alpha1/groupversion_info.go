// Package v1alpha1 holds the three kinds of Millrace: Stream, ConsumerGroup and Processor.
//
// What a field means to a user stands in its doc comment, because controller-gen copies that comment into the CRD and
// `kubectl explain` shows it. Rules that compare an object with its former self sit on the parent of the field they
// guard: a rule on an optional field is skipped when the field is removed.
//
// Conditions, their reasons and the annotations are API and live in conditions.go and annotations.go.
//
// +kubebuilder:object:generate=true
// +groupName=millrace.dev
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var (
	// GroupVersion is the group and version of every type in this package.
	GroupVersion = schema.GroupVersion{Group: "millrace.dev", Version: "v1alpha1"}

	// SchemeBuilder registers the types.
	SchemeBuilder = runtime.NewSchemeBuilder(addKnownTypes)

	// AddToScheme adds the types to a scheme.
	AddToScheme = SchemeBuilder.AddToScheme
)

func addKnownTypes(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(GroupVersion,
		&Stream{}, &StreamList{},
		&ConsumerGroup{}, &ConsumerGroupList{},
		&Processor{}, &ProcessorList{},
	)
	metav1.AddToGroupVersion(scheme, GroupVersion)
	return nil
}
