// Package cluster brings up a real Kubernetes for tests and the demo.
package cluster
