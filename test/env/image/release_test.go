package image_test

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/millrace-dev/millrace/test/env/image"
	"github.com/millrace-dev/millrace/test/env/source"
)

// The images of the manager and of processors are built twice, the second time from a copy of the source in another
// directory: the digests are the same. Each holds one file, the program, so there is no shell and nothing else to run.
func TestReleaseImagesAreReproducibleAndHoldOneFile(t *testing.T) {
	t.Parallel()
	root, err := source.Root()
	must(t, err)
	elsewhere := filepath.Join(t.TempDir(), "another-place")
	for _, part := range []string{"go.mod", "go.sum", "api", "cmd", "internal"} {
		copyTree(t, filepath.Join(root, part), filepath.Join(elsewhere, part))
	}
	for _, program := range image.Programs {
		var digests []string
		var archive string
		for i, from := range []string{root, elsewhere} {
			dir := t.TempDir()
			archive = filepath.Join(dir, program+".tar")
			digest, err := image.Build(t.Context(), image.Options{
				Name: "docker.io/millrace/" + program + ":test", Main: "./cmd/" + program, Out: archive, Source: from,
			})
			must(t, err)
			digests = append(digests, digest)
			if i == 0 {
				if files := filesOf(t, archive, filepath.Join(dir, "layout")); !slices.Equal(files, []string{program}) {
					t.Errorf("the image of %s holds %v", program, files)
				}
			}
		}
		if digests[0] != digests[1] {
			t.Errorf("%s: %s here and %s elsewhere", program, digests[0], digests[1])
		}
	}
}

// filesOf lists what is in all layers of the only image of an archive.
func filesOf(t *testing.T, archive, dir string) []string {
	t.Helper()
	unpack(t, archive, dir)
	index, err := layout.ImageIndexFromPath(dir)
	must(t, err)
	manifest, err := index.IndexManifest()
	must(t, err)
	built, err := index.Image(manifest.Manifests[0].Digest)
	must(t, err)
	layers, err := built.Layers()
	must(t, err)
	var files []string
	for _, layer := range layers {
		content, err := layer.Uncompressed()
		must(t, err)
		for entries := tar.NewReader(content); ; {
			header, err := entries.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			files = append(files, header.Name)
		}
		must(t, content.Close())
	}
	return files
}

// The Dockerfile, for people who publish their own images, builds the same as make images: the same flags, from nothing, with
// one file, for the same user.
func TestTheDockerfileBuildsTheSameImages(t *testing.T) {
	t.Parallel()
	root, err := source.Root()
	must(t, err)
	text, err := os.ReadFile(filepath.Join(root, "Dockerfile"))
	must(t, err)
	if !strings.Contains(string(text), `go build -trimpath -buildvcs=false -ldflags "-s -w -buildid=" -o /out/ ./cmd/manager ./cmd/processor`) || !strings.Contains(string(text), "CGO_ENABLED=0") {
		t.Error("the flags of go build are not those of make images")
	}
	for _, program := range image.Programs {
		stage := regexp.MustCompile(`(?m)^FROM scratch AS ` + program + `\n((?:[A-Z].*\n)+)`).FindStringSubmatch(string(text))
		want := "COPY --from=build /out/" + program + " /" + program + "\nUSER 65532:65532\nENTRYPOINT [\"/" + program + "\"]\n"
		if stage == nil || stage[1] != want {
			t.Errorf("the stage %s is %q, not %q", program, stage, want)
		}
	}
}

// Both programs bring the certificates of the public authorities: the image has none.
func TestProgramsBringCertificates(t *testing.T) {
	t.Parallel()
	root, err := source.Root()
	must(t, err)
	for _, program := range image.Programs {
		text, err := os.ReadFile(filepath.Join(root, "cmd", program, "main.go"))
		must(t, err)
		if !strings.Contains(string(text), `_ "golang.org/x/crypto/x509roots/fallback"`) {
			t.Errorf("%s could not check the certificate of a server", program)
		}
	}
}

func copyTree(t *testing.T, from, to string) {
	t.Helper()
	info, err := os.Stat(from)
	must(t, err)
	if info.IsDir() {
		must(t, os.CopyFS(to, os.DirFS(from)))
		return
	}
	content, err := os.ReadFile(from)
	must(t, err)
	must(t, os.MkdirAll(filepath.Dir(to), 0o755))
	must(t, os.WriteFile(to, content, 0o644))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
