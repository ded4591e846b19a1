// Package gitops runs Argo CD and Flux beside a cluster: their real controllers, built from their modules, as processes of this machine
// with a git repository of this machine. Nothing of them runs in the cluster but their CRDs and configuration, which go when they stop.
package gitops
