package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/millrace-dev/millrace/test/env/image"
	"github.com/millrace-dev/millrace/test/env/process"
)

// startTimeout is for the start of a built cluster, which takes about fifteen seconds on an idle machine.
const startTimeout = 4 * time.Minute

// create starts a new cluster in a free slot.
func create(ctx context.Context, o Options) (_ *Cluster, err error) {
	if err := checkRequirements(); err != nil {
		return nil, err
	}
	programs, err := allPrograms(ctx, o.Out)
	if err != nil {
		return nil, err
	}
	s, err := takeSlot(ctx)
	if err != nil {
		return nil, err
	}
	b := &boot{slot: s, programs: programs, keep: o.Keep}
	defer func() {
		if err == nil {
			return
		}
		if b.init != nil {
			b.init.Kill()
		}
		// The caller's context may be what ended the start; what is there has to go all the same.
		err = errors.Join(err, s.remove(context.WithoutCancel(ctx)), s.unlock())
	}()

	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"namespaces", b.namespaces},
		{"certificates", b.certificates},
		{"control plane", b.controlPlane},
		{"node", b.node},
	} {
		if err := step.run(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	if o.Keep {
		// From here on the lock is held by init alone, so that it is free when another process ends the cluster.
		if err := errors.Join(os.WriteFile(s.keptFile(), nil, 0o600), s.unlock()); err != nil {
			return nil, err
		}
	}
	fmt.Fprintf(o.Out, "cluster is up after %s\n", time.Since(begin).Round(100*time.Millisecond))
	return s.cluster(programs, b.init), nil
}

// cluster is the value for the callers of Up.
func (s *slot) cluster(programs string, init *process.Process) *Cluster {
	return &Cluster{
		programs: programs, kubeconfig: s.adminKubeconfig(), hostIP: s.hostIP(), slot: s,
		loadImage: s.loadImage(programs), faults: &slotFaults{slot: s, programs: programs}, init: init,
	}
}

func (s *slot) adminKubeconfig() string { return s.path("kubeconfig", "admin") }

// boot is one start of a cluster.
type boot struct {
	slot     *slot
	programs string
	keep     bool
	init     *process.Process
	running  []*process.Process // watched while we wait: when one ends, waiting is useless
}

func (b *boot) namespaces(ctx context.Context) (err error) {
	if err := makeCgroups(b.slot.cgroup()); err != nil {
		return err
	}
	b.init, err = b.slot.startInit(ctx, b.keep)
	return err
}

// certificates makes the authority, the servers' certificates and a kubeconfig for each user of the API.
func (b *boot) certificates(context.Context) error {
	s := b.slot
	authority, err := newPKI(s.path("pki"))
	if err != nil {
		return err
	}
	errs := []error{
		authority.issue("apiserver", "kube-apiserver", nil, s.nodeIP(), s.serviceIP(), "127.0.0.1", "localhost",
			"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"),
		authority.issue("apiserver-kubelet-client", "kube-apiserver-kubelet-client", []string{"system:masters"}),
		authority.issue("kubelet-server", "system:node:"+nodeName, []string{"system:nodes"}, s.nodeIP(), nodeName),
	}
	for file, who := range map[string][]string{ // user, groups
		"admin":                   {"millrace-admin", "system:masters"},
		"kube-controller-manager": {"system:kube-controller-manager"},
		"kube-scheduler":          {"system:kube-scheduler"},
		"kube-proxy":              {"system:kube-proxy"},
		"kubelet":                 {"system:node:" + nodeName, "system:nodes"},
	} {
		errs = append(errs, authority.kubeconfig(s.path("kubeconfig", file), s.server(), who[0], who[1:]))
	}
	return errors.Join(errs...)
}

func (b *boot) start(name string, args ...string) error {
	p, err := b.slot.start(b.programs, b.keep, name, args...)
	if err == nil {
		b.running = append(b.running, p)
	}
	return err
}

func (b *boot) controlPlane(ctx context.Context) error {
	s := b.slot
	pki := func(file string) string { return s.path("pki", file) }
	kubeconfig := func(user string) string { return s.path("kubeconfig", user) }

	if err := b.start("etcd", "--data-dir", s.path("etcd"), "--unsafe-no-fsync", "--logger=zap", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380"); err != nil {
		return err
	}
	if err := b.start("kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379",
		"--bind-address="+s.nodeIP(), "--advertise-address="+s.nodeIP(), "--secure-port=6443",
		"--service-cluster-ip-range="+s.serviceCIDR(),
		"--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"), "--client-ca-file="+pki("ca.crt"),
		"--kubelet-certificate-authority="+pki("ca.crt"),
		"--kubelet-client-certificate="+pki("apiserver-kubelet-client.crt"), "--kubelet-client-key="+pki("apiserver-kubelet-client.key"),
		// The node's name resolves nowhere.
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file="+pki("service-accounts.key"), "--service-account-signing-key-file="+pki("service-accounts.key"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
	); err != nil {
		return err
	}
	// containerd starts meanwhile.
	if err := b.containerd(); err != nil {
		return err
	}
	if err := poll(ctx, "the API server", b.running, func(ctx context.Context) error {
		_, err := b.kubectl(ctx, "get", "--raw", "/readyz")
		return err
	}); err != nil {
		return err
	}
	if err := b.start("kube-controller-manager",
		"--kubeconfig="+kubeconfig("kube-controller-manager"), "--leader-elect=false", "--use-service-account-credentials=true",
		"--service-account-private-key-file="+pki("service-accounts.key"), "--root-ca-file="+pki("ca.crt"),
		"--bind-address=127.0.0.1", "--cert-dir="+s.path("pki", "controller-manager"),
	); err != nil {
		return err
	}
	return b.start("kube-scheduler",
		"--kubeconfig="+kubeconfig("kube-scheduler"), "--leader-elect=false",
		"--bind-address=127.0.0.1", "--cert-dir="+s.path("pki", "scheduler"))
}

func (b *boot) containerd() error {
	s := b.slot
	if err := errors.Join(s.render("containerd.toml", "containerd.toml"), s.render("cni.conflist", "cni/10-millrace.conflist")); err != nil {
		return err
	}
	return b.start("containerd", "--config", s.path("containerd.toml"))
}

func (b *boot) node(ctx context.Context) error {
	s := b.slot
	// No name servers: pods of tests talk to addresses, and a lookup that fails at once is better than one that hangs.
	if err := os.WriteFile(s.path("resolv.conf"), nil, 0o644); err != nil {
		return err
	}
	if err := errors.Join(s.render("kubelet.yaml", "kubelet.yaml"), s.render("kube-proxy.yaml", "kube-proxy.yaml")); err != nil {
		return err
	}
	if err := b.loadPause(ctx); err != nil {
		return err
	}
	if err := b.start("kubelet", "--config="+s.path("kubelet.yaml"), "--kubeconfig="+s.path("kubeconfig", "kubelet"),
		"--hostname-override="+nodeName, "--node-ip="+s.nodeIP()); err != nil {
		return err
	}
	if err := b.start("kube-proxy", "--config="+s.path("kube-proxy.yaml")); err != nil {
		return err
	}
	return poll(ctx, "a ready node", b.running, func(ctx context.Context) error {
		ready, err := b.kubectl(ctx, "get", "nodes", "-o", `jsonpath={.items[*].status.conditions[?(@.type=="Ready")]['status','message']}`)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(ready, "True") {
			return fmt.Errorf("the node is not ready: %s", ready)
		}
		// Pods are refused until their service account exists.
		_, err = b.kubectl(ctx, "get", "serviceaccount", "--namespace=default", "default")
		return err
	})
}

// loadPause builds the image that holds a pod's namespaces, and loads it as soon as containerd takes it.
func (b *boot) loadPause(ctx context.Context) error {
	archive := b.slot.path("pause.tar")
	if _, err := image.Build(ctx, image.Options{Name: pauseImage, Main: "./test/env/cluster/pause", Out: archive}); err != nil {
		return err
	}
	load := b.slot.loadImage(b.programs)
	return poll(ctx, "containerd", b.running, func(ctx context.Context) error { return load(ctx, archive) })
}

func (b *boot) kubectl(ctx context.Context, args ...string) (string, error) {
	return b.slot.cluster(b.programs, nil).Kubectl(ctx, append([]string{"--request-timeout=5s"}, args...)...)
}
