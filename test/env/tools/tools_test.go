package tools

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/test/env/source"
)

func TestEveryProgramIsAToolOfItsModule(t *testing.T) {
	t.Parallel()
	root, err := source.Root()
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range programs {
		content, err := os.ReadFile(filepath.Join(root, "tools", p.module, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(strings.Fields(string(content)), p.pkg) {
			t.Errorf("%s: tools/%s/go.mod has no tool %s", name, p.module, p.pkg)
		}
		if p.version == "" {
			continue
		}
		version, err := pinnedVersion(filepath.Join(root, "tools", p.module), p.version)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, definition := range p.stamp(version) {
			if strings.HasSuffix(definition, "=") {
				t.Errorf("%s: version %s gives an empty %s", name, version, definition)
			}
		}
	}
}

func TestKubernetesTellsItsVersionInParts(t *testing.T) {
	t.Parallel()
	got := strings.Join(kubernetes("kubectl").stamp("v1.36.3"), " ")
	for _, want := range []string{"version.gitVersion=v1.36.3", "version.gitMajor=1", "version.gitMinor=36"} {
		if !strings.Contains(got, want) {
			t.Errorf("%s lacks %s", got, want)
		}
	}
}

func TestModulesAreBuiltInTheOrderAskedFor(t *testing.T) {
	t.Parallel()
	var got []string
	for _, m := range modulesOf([]string{"etcd", "kubectl", "ctr", "kubelet"}) {
		got = append(got, m.name+":"+strings.Join(m.programs, ","))
	}
	if want := "etcd:etcd kubernetes:kubectl,kubelet node:ctr"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

func TestTheKeyOfAModuleChangesWithItsFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, content string) string {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if name == "go.mod" {
			return ""
		}
		key, err := moduleKey(dir)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	write("go.mod", "module m\n")
	first := write("go.sum", "a\n")
	if again := write("go.sum", "a\n"); again != first {
		t.Errorf("equal files, keys %s and %s", first, again)
	}
	if other := write("go.sum", "b\n"); other == first {
		t.Errorf("different files, one key %s", first)
	}
}

func TestAFailedBuildShowsWhatTheCompilerSaid(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	m := startMeter(&out, "broken")
	err := m.compile(exec.Command("sh", "-c", "echo some/package >&2; echo 'file.go:1:2: no such thing' >&2; exit 1"))
	m.stop(err)
	if err == nil || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("error %v; want the compiler's line", err)
	}
	if strings.Contains(err.Error(), "some/package") {
		t.Errorf("error %v; it repeats the progress", err)
	}
	if !strings.Contains(out.String(), "building broken failed") {
		t.Errorf("shown: %q", out.String())
	}
}

func TestLineWriterHandsOnWholeLines(t *testing.T) {
	t.Parallel()
	var got []string
	w := &lineWriter{each: func(line string) { got = append(got, line) }}
	for _, piece := range []string{"on", "e\ntwo\nth", "ree\n", "\n", "rest"} {
		if n, err := w.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
	}
	if want := []string{"one", "two", "three", ""}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
