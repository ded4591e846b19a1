package v1alpha1

import "strings"

// SecretKeyReference names one key of a Secret in the namespace of the resource that holds the reference.
type SecretKeyReference struct {
	// Name of the Secret.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`

	// Key inside the Secret.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Key string `json:"key"`
}

// ConfigMapKeyReference names one key of a ConfigMap in the namespace of the resource that holds the reference.
type ConfigMapKeyReference struct {
	// Name of the ConfigMap.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`

	// Key inside the ConfigMap.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Key string `json:"key"`
}

// LocalReference names another resource in the same namespace.
type LocalReference struct {
	// Name of the resource.
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
}

// databaseName turns the name of a resource into its default name in the database.
func databaseName(name string) string { return strings.ReplaceAll(name, "-", "_") }
