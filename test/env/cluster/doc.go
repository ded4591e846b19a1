// Package cluster brings up a real Kubernetes for tests and the demo: the API server alone for controllers (Assets), and
// a control plane with one node that runs real pods (Up). Everything is built from Go modules; nothing is downloaded as
// a binary but Debian's runc, CNI plugins and iptables.
//
// The cluster lives in a mount, network and process namespace of its own, much like a kind node without its image:
//
//	host namespace                            cluster's namespaces
//	  tests, demo, PostgreSQL, Redis            init (a shell that adopts orphans), etcd, kube-apiserver,
//	                                            controller-manager, scheduler, kube-proxy, kubelet, containerd
//	  millrace0 198.18.0.1  ───── veth ─────    eth0 198.18.0.2:6443
//	  route to the pods via 198.18.0.2          cni0 198.18.1.1 ── pods 198.18.1.0/24
//
// So one kill of init ends every process, and with the last process the kernel drops the mounts, links, routes and
// firewall rules. What the kernel does not drop, cgroups and files, Down removes, and so does the next Up after a crash.
//
// Invariants:
//
//	I1  A cluster ends with the process that called Up, also by SIGKILL, unless Options.Keep is set.
//	I2  Nothing outside of the namespaces is changed but: one link with its address and route, cgroups below
//	    /millrace-<slot> (on cgroup v2, the root hands down controllers that it did not before), and the state directory.
//	    Kernel settings that the kubelet wants are shown to it, not set.
//	I3  Each running cluster holds the lock of its slot, through init. A slot whose lock is free has no processes, and
//	    its leftovers may be removed.
//
// CLUSTER=current makes Up return the cluster of the user's current kubeconfig context instead, and CLUSTER=up the one
// that make cluster-up started.
package cluster
