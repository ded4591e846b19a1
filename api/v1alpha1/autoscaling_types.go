package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Autoscaling lets the number of pods follow what waits for them. Of several targets the one that asks for most pods counts.
//
// +kubebuilder:validation:XValidation:rule="!has(self.minReplicas) || self.minReplicas <= self.maxReplicas",message="minReplicas must not exceed maxReplicas; raise maxReplicas or lower minReplicas"
// +kubebuilder:validation:XValidation:rule="has(self.backlogPerReplica) || has(self.maxAge) || has(self.ratePerReplica)",message="write what pods are added for: backlogPerReplica, maxAge, ratePerReplica, or several of them"
type Autoscaling struct {
	// minReplicas is the least number of pods. 0 lets the last pod go once nothing has been waiting for the cooldown.
	//
	// +kubebuilder:default=1
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	// +optional
	MinReplicas *int32 `json:"minReplicas,omitempty"`

	// maxReplicas is the greatest number of pods.
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000
	MaxReplicas int32 `json:"maxReplicas"`

	// backlogPerReplica is how many messages, waiting and in flight, one pod is enough for.
	//
	// +kubebuilder:validation:Minimum=1
	// +optional
	BacklogPerReplica *int64 `json:"backlogPerReplica,omitempty"`

	// maxAge is how old the oldest message that is not processed may become. While it is older, and messages wait that no pod has
	// been given yet, pods are added: at most as many as there are, and the next after another maxAge.
	//
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('1s') && duration(self) <= duration('24h')",message="write a duration from 1s to 24h, for example 30s"
	// +optional
	MaxAge *metav1.Duration `json:"maxAge,omitempty"`

	// ratePerReplica is how many messages a second one pod is enough for. It is compared with what is published to the Stream,
	// so pods are there before a backlog is.
	//
	// +kubebuilder:validation:Minimum=1
	// +optional
	RatePerReplica *int64 `json:"ratePerReplica,omitempty"`

	// stabilizationWindow is for how long fewer pods must have been enough before some are removed. Pods are added at once.
	//
	// +kubebuilder:default="5m"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('0s') && duration(self) <= duration('24h')",message="write a duration from 0s to 24h, for example 5m"
	// +optional
	StabilizationWindow *metav1.Duration `json:"stabilizationWindow,omitempty"`

	// cooldown is for how long nothing may be waiting, in flight or due for a retry before the last pod goes, with minReplicas: 0.
	//
	// +kubebuilder:default="5m"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('0s') && duration(self) <= duration('168h')",message="write a duration from 0s to 168h, for example 5m"
	// +optional
	Cooldown *metav1.Duration `json:"cooldown,omitempty"`

	// maxConnections is how many connections all pods together may open to the server of their source. Unset: what the server has
	// left, as it says itself. Behind a pooler such as PgBouncer write what the pooler takes.
	//
	// +kubebuilder:validation:Minimum=1
	// +optional
	MaxConnections *int32 `json:"maxConnections,omitempty"`
}

// AutoscalingStatus is what the autoscaler did last.
type AutoscalingStatus struct {
	// lastScaleTime is when it last changed the number of pods.
	//
	// +optional
	LastScaleTime *metav1.Time `json:"lastScaleTime,omitempty"`
}
