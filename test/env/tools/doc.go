// Package tools builds the programs of the test cluster (Kubernetes, etcd, containerd, Helm, Argo CD, Flux) from their Go modules, at
// the versions that tools/*/go.mod pin, and keeps them in the cache.
//
// Invariants:
//
//	I1  A program in the cache was built from exactly the go.mod, go.sum, Go version and flags that name its directory.
//	I2  Of several processes that want the same programs at once, one builds and the others wait.
//	I3  A program appears under its final name complete or not at all.
package tools
