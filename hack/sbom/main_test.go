package main

import (
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// The bill of the manager names every module that go version -m shows of it, and Go itself, and is the same each time.
func TestTheBillNamesEveryModule(t *testing.T) {
	manager := filepath.Join(t.TempDir(), "manager")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", manager, "../../cmd/manager").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	shown, err := exec.CommandContext(t.Context(), "go", "version", "-m", manager).Output()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{}
	for line := range strings.Lines(string(shown)) {
		if f := strings.Fields(line); len(f) >= 3 && f[0] == "dep" {
			want = append(want, "pkg:golang/"+f[1]+"@"+f[2])
		}
	}
	b, err := billOf(manager)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range b.Components[1:] {
		got = append(got, c.PURL)
	}
	if len(want) < 20 || !slices.Equal(got, want) {
		t.Errorf("it names %v, and go version -m %v", got, want)
	}
	if c := b.Components[0]; c.Name != "stdlib" || !strings.HasPrefix(c.Version, "go1.") {
		t.Errorf("it does not name Go: %+v", c)
	}
	if len(b.Metadata.Component.Hashes[0].Content) != 64 || b.Metadata.Component.Name != "manager" {
		t.Errorf("%+v", b.Metadata)
	}
	if again, err := billOf(manager); err != nil || !reflect.DeepEqual(again, b) {
		t.Errorf("the second one differs: %v", err)
	}
	if _, err := billOf("main.go"); err == nil {
		t.Error("a source file has a bill")
	}
}
