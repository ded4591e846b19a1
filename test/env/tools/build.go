package tools

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/mod/modfile"

	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/source"
)

// All are the names of the programs that Ensure can build.
func All() []string { return slices.Sorted(maps.Keys(programs)) }

// Ensure returns a directory with the named programs (links into the cache), after building those that are missing.
// The same names give the same directory. Progress goes to out, and nothing is written when there is nothing to do.
func Ensure(ctx context.Context, out io.Writer, names ...string) (string, error) {
	dir, err := ensure(ctx, out, names)
	if err != nil {
		return "", fmt.Errorf("build the programs of the test cluster: %w", err)
	}
	return dir, nil
}

func ensure(ctx context.Context, out io.Writer, names []string) (string, error) {
	cache, err := dirs.Cache("tools")
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("make the cache: %w; set MILLRACE_CACHE to a place that you may write to", err)
	}
	root, err := source.Root()
	if err != nil {
		return "", err
	}

	built := map[string]string{} // program → path in the cache
	for _, m := range modulesOf(names) {
		dir := filepath.Join(root, "tools", m.name)
		key, err := moduleKey(dir)
		if err != nil {
			return "", err
		}
		bin := filepath.Join(cache, m.name+"-"+key)
		if err := buildMissing(ctx, out, dir, bin, m.programs); err != nil {
			return "", fmt.Errorf("tools/%s: %w", m.name, err)
		}
		for _, name := range m.programs {
			built[name] = filepath.Join(bin, name)
		}
	}
	return linkDirectory(cache, built)
}

// module is what is wanted of one directory below tools/.
type module struct {
	name     string
	programs []string
}

// modulesOf groups the programs in the order in which they were asked for, so that a caller can have the most urgent
// ones built first.
func modulesOf(names []string) []module {
	var modules []module
	for _, name := range names {
		p, known := programs[name]
		if !known {
			panic("tools: there is no program " + name) // a name is a constant in the code that calls
		}
		i := slices.IndexFunc(modules, func(m module) bool { return m.name == p.module })
		if i < 0 {
			i = len(modules)
			modules = append(modules, module{name: p.module})
		}
		modules[i].programs = append(modules[i].programs, name)
	}
	return modules
}

// moduleKey changes with everything that decides what a build gives (I1).
func moduleKey(dir string) (string, error) {
	hash := sha256.New()
	fmt.Fprintln(hash, runtime.Version(), runtime.GOOS, runtime.GOARCH, linkFlags)
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return "", err
		}
		_, _ = hash.Write(content) // a hash never fails
	}
	return fmt.Sprintf("%x", hash.Sum(nil)[:6]), nil
}

// buildMissing builds what bin lacks, one program after another: a linker of Kubernetes wants a gigabyte.
func buildMissing(ctx context.Context, out io.Writer, dir, bin string, names []string) error {
	if len(missing(bin, names)) == 0 {
		return nil
	}
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	unlock, err := lock(bin+".lock", func() {
		fmt.Fprintf(out, "waiting for another process that builds tools/%s\n", filepath.Base(dir))
	})
	if err != nil {
		return err
	}
	defer unlock()
	for _, name := range missing(bin, names) {
		if err := build(ctx, out, dir, bin, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func missing(bin string, names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool {
		_, err := os.Stat(filepath.Join(bin, name))
		return err == nil
	})
}

// linkFlags leave out the symbol table, which halves the files.
const linkFlags = "-s -w"

func build(ctx context.Context, out io.Writer, dir, bin, name string) error {
	p := programs[name]
	flags := linkFlags
	if p.stamp != nil {
		version, err := pinnedVersion(dir, p.version)
		if err != nil {
			return err
		}
		for _, definition := range p.stamp(version) {
			flags += " -X " + definition
		}
	}
	building := filepath.Join(bin, "."+name)
	cmd := func(args ...string) *exec.Cmd {
		c := exec.CommandContext(ctx, "go", args...)
		c.Dir = dir
		// The caller may run in a workspace or with flags of its own; the result must not depend on them.
		c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-buildvcs=false")
		return c
	}
	meter := startMeter(out, name)
	err := meter.fetch(cmd("list", "-deps", "-trimpath", "-f", "{{if .Stale}}{{.ImportPath}}{{end}}", p.pkg))
	if err == nil {
		err = meter.compile(cmd("build", "-v", "-trimpath", "-ldflags", flags, "-o", building, p.pkg))
	}
	meter.stop(err)
	if err != nil {
		return err
	}
	return os.Rename(building, filepath.Join(bin, name))
}

// pinnedVersion reads the required version of a module from go.mod.
func pinnedVersion(dir, module string) (string, error) {
	path := filepath.Join(dir, "go.mod")
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	file, err := modfile.ParseLax(path, content, nil)
	if err != nil {
		return "", err
	}
	for _, require := range file.Require {
		if require.Mod.Path == module {
			return require.Mod.Version, nil
		}
	}
	return "", fmt.Errorf("%s does not require %s", path, module)
}

// linkDirectory makes a directory of links, because envtest and the node want their programs side by side.
func linkDirectory(cache string, built map[string]string) (string, error) {
	hash := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(built)) {
		fmt.Fprintln(hash, name, built[name])
	}
	dir := filepath.Join(cache, fmt.Sprintf("bin-%x", hash.Sum(nil)[:6]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	for name, path := range built {
		// Another process may have made the same link; it leads to the same file, because the hash names the target.
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrExist) {
			return "", err
		}
	}
	return dir, nil
}

// lock takes an exclusive lock that the kernel releases when this process ends in whatever way.
func lock(path string, onWait func()) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		onWait()
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
	}
	return func() { _ = f.Close() }, nil
}
