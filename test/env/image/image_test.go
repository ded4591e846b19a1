package image_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/millrace-dev/millrace/test/env/image"
)

// program is small and always there.
const program = "./test/env/cluster/pause"

func TestTheSameSourceGivesTheSameBytes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var digests []string
	var archives [][]byte
	for _, name := range []string{"first", "second"} {
		out := filepath.Join(dir, name, "image.tar")
		digest, err := image.Build(t.Context(), image.Options{Name: "docker.io/millrace/pause:test", Main: program, Out: out})
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		digests, archives = append(digests, digest), append(archives, content)
	}
	if digests[0] != digests[1] || !strings.HasPrefix(digests[0], "sha256:") {
		t.Errorf("digests %s and %s", digests[0], digests[1])
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("the archives differ")
	}
}

func TestAnImageRunsItsProgramWithoutPrivileges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	out := filepath.Join(dir, "image.tar")
	const name = "docker.io/millrace/pause:test"
	digest, err := image.Build(t.Context(), image.Options{Name: name, Main: program, Out: out, Arch: "arm64"})
	if err != nil {
		t.Fatal(err)
	}
	unpack(t, out, filepath.Join(dir, "layout"))
	index, err := layout.ImageIndexFromPath(filepath.Join(dir, "layout"))
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 {
		t.Fatalf("%d images in the archive, want one", len(manifest.Manifests))
	}
	only := manifest.Manifests[0]
	if only.Digest.String() != digest || only.Annotations["io.containerd.image.name"] != name {
		t.Errorf("the archive holds %s named %q, want %s named %q", only.Digest, only.Annotations["io.containerd.image.name"], digest, name)
	}
	built, err := index.Image(only.Digest)
	if err != nil {
		t.Fatal(err)
	}
	file, err := built.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if file.Config.User != "65532:65532" || len(file.Config.Entrypoint) != 1 || file.Config.Entrypoint[0] != "/pause" || file.Architecture != "arm64" {
		t.Errorf("user %q, entrypoint %q, architecture %q", file.Config.User, file.Config.Entrypoint, file.Architecture)
	}
}

func TestAShortNameIsRefused(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"manager", "manager:dev", "millrace/manager:dev", "docker.io/millrace/manager"} {
		_, err := image.Build(t.Context(), image.Options{Name: name, Main: program, Out: filepath.Join(t.TempDir(), "image.tar")})
		if err == nil || !strings.Contains(err.Error(), "full name") {
			t.Errorf("%q: %v; want an error about the full name", name, err)
		}
	}
}

func unpack(t *testing.T, archive, dir string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for files := tar.NewReader(f); ; {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.FromSlash(header.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(files)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
