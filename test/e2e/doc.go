// Package e2e tests Millrace as a user meets it: installed by its Helm chart into a real Kubernetes, driven by kubectl,
// with real pods that are killed, and a ledger at the end of each test.
//
// The tests run one after the other and share one cluster and one installation, which TestMain brings up and removes.
// CLUSTER=current uses the cluster of the current kubeconfig context; see test/env/cluster.
package e2e
