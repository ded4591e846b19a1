package cluster

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/template"

	"github.com/millrace-dev/millrace/test/env/process"
)

//go:embed files
var files embed.FS

const (
	nodeName   = "millrace-node"
	pauseImage = "docker.io/millrace/pause:test"
)

// requirements are what the node takes from the machine, with the Debian package that has it.
var requirements = []struct{ path, pkg string }{
	{"runc", "runc"}, {"iptables", "iptables"}, {"ip", "iproute2"}, {"nsenter", "util-linux"}, {"mount", "mount"},
	{"bash", "bash"}, {"/usr/lib/cni/bridge", "containernetworking-plugins"},
}

func checkRequirements() error {
	if os.Getuid() != 0 {
		return errors.New("a node of our own needs root; run this as root, or use CLUSTER=current with kind, k3d or another cluster")
	}
	var missing []string
	for _, r := range requirements {
		if _, err := exec.LookPath(r.path); err != nil {
			missing = append(missing, r.pkg)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("not installed: %s; run: make deps", strings.Join(missing, ", "))
	}
	return nil
}

// startInit makes the namespaces. The new process has a share of the slot's lock (I3).
func (s *slot) startInit(ctx context.Context, keep bool) (*process.Process, error) {
	for _, dir := range []string{"lib", "varlog", "settings", "log", "cni", "plugins", "kubeconfig"} {
		if err := os.MkdirAll(s.path(dir), 0o755); err != nil {
			return nil, err
		}
	}
	script := s.path("init.sh")
	content, err := files.ReadFile("files/init.sh")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(script, content, 0o600); err != nil {
		return nil, err
	}
	p, err := process.Start(process.Command{
		Path: "/bin/bash", Args: []string{script, s.dir}, Dir: "/", Log: s.logFile("init"), Files: []*os.File{s.lock}, Outlive: keep,
		Attributes: func(a *syscall.SysProcAttr) {
			a.Cloneflags = syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID
		},
	})
	if err != nil {
		return nil, err
	}
	err = os.WriteFile(s.initFile(), []byte(strconv.Itoa(p.Pid())), 0o600)
	if err == nil {
		err = poll(ctx, "the cluster's namespaces", []*process.Process{p}, func(context.Context) error {
			_, err := os.Stat(s.path("init.ready"))
			return err
		})
	}
	if err == nil {
		err = s.connect(ctx, p.Pid())
	}
	if err != nil {
		p.Kill()
		return nil, err
	}
	return p, nil
}

// connect makes the link between this machine and the cluster. It goes with the cluster's network namespace.
func (s *slot) connect(ctx context.Context, init int) error {
	namespace := strconv.Itoa(init)
	for _, command := range []string{
		"ip link add " + s.link() + " type veth peer name eth0 netns " + namespace,
		"ip address add " + s.hostIP() + "/24 dev " + s.link(),
		"ip link set " + s.link() + " up",
		"nsenter --target " + namespace + " --net ip address add " + s.nodeIP() + "/24 dev eth0",
		"nsenter --target " + namespace + " --net ip link set eth0 up",
		"nsenter --target " + namespace + " --net ip route add default via " + s.hostIP(),
		"ip route add " + s.podCIDR() + " via " + s.nodeIP() + " dev " + s.link(),
	} {
		words := strings.Fields(command)
		if out, err := exec.CommandContext(ctx, words[0], words[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", command, err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// inside is the command line that runs a program in the cluster's namespaces.
func (s *slot) inside(program string, args ...string) []string {
	return append([]string{"nsenter", "--target", strconv.Itoa(s.initPid()), "--mount", "--net", "--pid", "--wd=/", "--", program}, args...)
}

// start runs one of the cluster's programs inside, with its own log.
func (s *slot) start(programs string, keep bool, name string, args ...string) (*process.Process, error) {
	line := s.inside(filepath.Join(programs, name), args...)
	nsenter, err := exec.LookPath(line[0])
	if err != nil {
		return nil, err
	}
	return process.Start(process.Command{
		Path: nsenter, Args: line[1:], Log: s.logFile(name), Outlive: keep,
		// containerd finds its shim and runc on the path.
		Env: []string{"PATH=" + programs + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
	})
}

// loadImage imports an archive into the node's containerd.
func (s *slot) loadImage(programs string) func(context.Context, string) error {
	return func(ctx context.Context, archive string) error {
		absolute, err := filepath.Abs(archive)
		if err != nil {
			return err
		}
		return s.ctr(ctx, programs, "images", "import", absolute)
	}
}

func (s *slot) ctr(ctx context.Context, programs string, args ...string) error {
	line := append(s.inside(filepath.Join(programs, "ctr"), "--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io"), args...)
	if out, err := exec.CommandContext(ctx, line[0], line[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("ctr %s: %w: %s", strings.Join(args[:2], " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// render writes a file of files/ with the cluster's values.
func (s *slot) render(name, to string) error {
	parsed, err := template.ParseFS(files, "files/"+name)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	err = parsed.Execute(&text, map[string]string{
		"Dir": s.dir, "NodeIP": s.nodeIP(), "NodeName": nodeName, "PodCIDR": s.podCIDR(), "Cgroup": s.cgroup(),
		"PauseImage": pauseImage, "Snapshotter": snapshotter(s.dir),
	})
	if err != nil {
		return err
	}
	return os.WriteFile(s.path(to), text.Bytes(), 0o600)
}

// snapshotter is containerd's way to stack image layers. An overlay cannot lie on an overlay, which is what the files of
// a container are (CI in Docker).
func snapshotter(dir string) string {
	const overlayMagic = 0x794c7630
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err == nil && fs.Type == overlayMagic {
		return "native"
	}
	return "overlayfs"
}
