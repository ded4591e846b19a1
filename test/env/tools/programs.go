package tools

import "strings"

// program is one thing that can be built.
type program struct {
	module  string // directory below tools/
	pkg     string // the main package
	version string // the module whose version it tells as its own, when its build does not know by itself
	stamp   func(version string) []string
}

// programs are all that this package can build, by the name of the file.
var programs = map[string]program{
	"kube-apiserver":          kubernetes("kube-apiserver"),
	"kube-controller-manager": kubernetes("kube-controller-manager"),
	"kube-scheduler":          kubernetes("kube-scheduler"),
	"kube-proxy":              kubernetes("kube-proxy"),
	"kubelet":                 kubernetes("kubelet"),
	"kubectl":                 kubernetes("kubectl"),
	"etcd":                    {module: "etcd", pkg: "go.etcd.io/etcd/server/v3"},
	"containerd":              containerd("containerd"),
	"containerd-shim-runc-v2": containerd("containerd-shim-runc-v2"),
	"ctr":                     containerd("ctr"),
	"kwok":                    {module: "kwok", pkg: "sigs.k8s.io/kwok/cmd/kwok"},
	"helm": {
		module: "helm", pkg: "helm.sh/helm/v4/cmd/helm", version: "helm.sh/helm/v4",
		stamp: func(v string) []string { return []string{"helm.sh/helm/v4/internal/version.version=" + v} },
	},
	// One program for all of Argo CD: ARGOCD_BINARY_NAME says which part of it a process is.
	"argocd": {
		module: "argocd", pkg: "github.com/argoproj/argo-cd/v3/cmd", version: "github.com/argoproj/argo-cd/v3",
		stamp: func(v string) []string {
			const base = "github.com/argoproj/argo-cd/v3/common."
			return []string{base + "version=" + strings.TrimPrefix(v, "v"), base + "gitTag=" + v, base + "gitTreeState=clean"}
		},
	},
	"kustomize-controller": {module: "flux", pkg: "github.com/fluxcd/kustomize-controller"},
}

// Without its version the API server says v0.0.0-master, and clients that compare versions misbehave.
func kubernetes(name string) program {
	return program{
		module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/" + name, version: "k8s.io/kubernetes",
		stamp: func(v string) []string {
			const base = "k8s.io/component-base/version."
			numbers := strings.SplitN(strings.TrimPrefix(v, "v"), ".", 3)
			return []string{base + "gitVersion=" + v, base + "gitMajor=" + numbers[0], base + "gitMinor=" + numbers[1], base + "gitTreeState=clean"}
		},
	}
}

func containerd(name string) program {
	const module = "github.com/containerd/containerd/v2"
	return program{
		module: "node", pkg: module + "/cmd/" + name, version: module,
		stamp: func(v string) []string { return []string{module + "/version.Version=" + v} },
	}
}
