package operator

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/millrace-dev/millrace/bench/proc"
	"github.com/millrace-dev/millrace/test/env/process"
	"github.com/millrace-dev/millrace/test/env/source"
)

// Manager is the manager's binary with what the chart gives it: arguments, memory limit, service account.
type Manager struct {
	cluster    *Cluster
	program    string
	args, env  []string
	metrics    string // address
	kubeconfig string
	process    *process.Process
	starts     int
}

// Install renders the chart, applies all of it but the Deployment, and returns the manager that the Deployment would run. It does not run yet.
func Install(ctx context.Context, c *Cluster, program string) (*Manager, error) {
	root, err := source.Root()
	if err != nil {
		return nil, err
	}
	metrics, err := process.FreePort("127.0.0.1")
	if err != nil {
		return nil, err
	}
	probes, err := process.FreePort("127.0.0.1")
	if err != nil {
		return nil, err
	}
	m := &Manager{cluster: c, program: program, metrics: fmt.Sprintf("127.0.0.1:%d", metrics), kubeconfig: c.path("manager.kubeconfig")}
	// Ports have to be free on this machine, and the metrics are read without a token. The rest are the chart's defaults.
	render := exec.CommandContext(ctx, filepath.Join(c.programs, "helm"), "template", release, filepath.Join(root, "charts", "millrace"),
		"--namespace", systemNamespace, "--set", fmt.Sprintf("metrics.port=%d,metrics.secure=false", metrics),
		"--set", fmt.Sprintf("manager.extraArgs={--health-probe-bind-address=127.0.0.1:%d}", probes))
	var complaint bytes.Buffer
	render.Stderr = &complaint
	chart, err := render.Output()
	if err != nil {
		return nil, fmt.Errorf("render the chart: %w\n%s", err, complaint.String())
	}
	if err := c.client.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: systemNamespace}}); err != nil {
		return nil, err
	}
	for document := range strings.SplitSeq("\n"+string(chart), "\n---\n") {
		var o unstructured.Unstructured
		if err := yaml.Unmarshal([]byte(document), &o.Object); err != nil {
			return nil, fmt.Errorf("read the chart: %w", err)
		}
		switch {
		case len(o.Object) == 0:
		case o.GetKind() == "Deployment":
			if err := m.read(&o); err != nil {
				return nil, err
			}
		case o.GetAnnotations()["helm.sh/hook"] != "":
		default:
			if err := c.client.Apply(ctx, client.ApplyConfigurationFromUnstructured(&o), client.FieldOwner("bench")); err != nil {
				return nil, fmt.Errorf("apply %s %s of the chart: %w", o.GetKind(), o.GetName(), err)
			}
		}
	}
	if len(m.args) == 0 {
		return nil, errors.New("the chart has no Deployment")
	}
	return m, m.login(ctx)
}

// read takes arguments and memory limit from the chart's Deployment.
func (m *Manager) read(o *unstructured.Unstructured) error {
	var d appsv1.Deployment
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &d); err != nil {
		return fmt.Errorf("read the chart's Deployment: %w", err)
	}
	container := d.Spec.Template.Spec.Containers[0]
	m.args = container.Args
	for _, e := range container.Env {
		switch {
		case e.ValueFrom == nil:
			m.env = append(m.env, e.Name+"="+e.Value)
		case e.ValueFrom.FieldRef != nil:
			m.env = append(m.env, e.Name+"="+release+"-bench") // a field of the pod: its name
		case e.ValueFrom.ResourceFieldRef != nil:
			m.env = append(m.env, e.Name+"="+strconv.FormatInt(container.Resources.Limits.Memory().Value(), 10))
		}
	}
	return nil
}

// login writes a kubeconfig with a token of the manager's service account.
func (m *Manager) login(ctx context.Context) error {
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: release}}
	ask := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: ptr.To(int64(4 * 3600))}}
	if err := m.cluster.client.SubResource("token").Create(ctx, account, ask); err != nil {
		return fmt.Errorf("get a token for the manager: %w", err)
	}
	cfg := m.cluster.config
	return clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"bench": {Server: cfg.Host, CertificateAuthorityData: cfg.CAData}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"manager": {Token: ask.Status.Token}},
		Contexts:       map[string]*clientcmdapi.Context{"bench": {Cluster: "bench", AuthInfo: "manager"}},
		CurrentContext: "bench",
	}, m.kubeconfig)
}

// Start starts it. It works when it leads, which with nobody else about is at once.
func (m *Manager) Start(extra ...string) (err error) {
	m.starts++
	m.process, err = process.Start(process.Command{
		Path: m.program, Args: append(append([]string{}, m.args...), extra...), Env: append([]string{"KUBECONFIG=" + m.kubeconfig}, m.env...),
		Dir: m.cluster.dir, Log: m.cluster.path(fmt.Sprintf("manager-%d.log", m.starts)),
	})
	return err
}

// Stop ends it in order, as Kubernetes does.
func (m *Manager) Stop(ctx context.Context) error {
	if m.process == nil || !m.process.Running() {
		return nil
	}
	return m.process.Stop(ctx, syscall.SIGTERM)
}

// running says why it has ended, if it has.
func (m *Manager) running() error {
	if err := m.process.Exit(); err != nil {
		return fmt.Errorf("the manager: %w", err)
	}
	return nil
}

func (m *Manager) pid() int { return m.process.Pid() }

// cpu is the processor time that it has used.
func (m *Manager) cpu() (time.Duration, error) { return proc.CPU(m.pid()) }

// work is what the controllers have done: how many reconciles have ended, and how many are waiting or running.
type work struct{ done, open int }

// work reads the manager's metrics.
func (m *Manager) work(ctx context.Context) (w work, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+m.metrics+"/metrics", nil)
	if err != nil {
		return w, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return w, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return w, fmt.Errorf("the manager's metrics answer %s", resp.Status)
	}
	return readWork(resp.Body)
}

func readWork(text io.Reader) (w work, err error) {
	lines := bufio.NewScanner(text)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		name, value, found := strings.Cut(lines.Text(), "} ")
		if !found {
			continue
		}
		var sum *int
		switch name, _, _ := strings.Cut(name, "{"); name {
		case "controller_runtime_reconcile_total":
			sum = &w.done
		case "workqueue_depth", "controller_runtime_active_workers":
			sum = &w.open
		default:
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if err != nil {
			return w, fmt.Errorf("read the manager's metrics: %w", err)
		}
		*sum += int(n)
	}
	return w, lines.Err()
}

// log is the end of the manager's log.
func (m *Manager) log() string {
	text, err := os.ReadFile(m.cluster.path(fmt.Sprintf("manager-%d.log", m.starts)))
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4000):])
}
