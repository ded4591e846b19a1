// Package image builds container images of Millrace's programs without a container daemon: one static binary, in an
// archive of the OCI image layout that containerd, kind, k3d, Podman and Docker load.
//
// Invariant I1: the same source, Go version and options give the same bytes. Times are the Unix epoch, paths and build
// ids are left out of the binary, and entries have a fixed order and owner.
package image

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/millrace-dev/millrace/test/env/source"
)

// Options says what to build.
type Options struct {
	// Name is the image's full name with registry and tag, such as docker.io/millrace/manager:dev. A short one makes
	// the kubelet look for another image than the one that was loaded.
	Name string
	// Main is the directory of the main package, seen from the root of the source tree, such as ./cmd/manager.
	Main string
	// Out is the path of the archive; its directory is made.
	Out string
	// Arch is the architecture, default that of this machine.
	Arch string
	// LDFlags are added to the linker's flags.
	LDFlags string
	// Source is the root of the source tree; default the one that this program was built from.
	Source string
}

// Programs are the programs that Millrace consists of. The image of one is docker.io/millrace/<program>:<tag>.
var Programs = []string{"manager", "processor"}

// BuildAll builds the images of all Programs as <dir>/<program>.tar and returns the archives' paths.
func BuildAll(ctx context.Context, tag, dir string) ([]string, error) {
	var archives []string
	for _, program := range Programs {
		archive := filepath.Join(dir, program+".tar")
		o := Options{Name: "docker.io/millrace/" + program + ":" + tag, Main: "./cmd/" + program, Out: archive}
		if _, err := Build(ctx, o); err != nil {
			return nil, err
		}
		archives = append(archives, archive)
	}
	return archives, nil
}

// user is "nonroot" in the distroless images, the number that charts and policies know.
const user = "65532:65532"

// Build compiles the program and writes its image. It returns the digest of the image's manifest.
func Build(ctx context.Context, o Options) (digest string, err error) {
	digest, err = build(ctx, o)
	if err != nil {
		return "", fmt.Errorf("build image %s: %w", o.Name, err)
	}
	return digest, nil
}

func build(ctx context.Context, o Options) (_ string, err error) {
	if o.Arch == "" {
		o.Arch = runtime.GOARCH
	}
	if strings.Count(o.Name, "/") < 2 || !strings.Contains(path.Base(o.Name), ":") {
		return "", fmt.Errorf("%q is not a full name; write registry/project/name:tag", o.Name)
	}
	work, err := os.MkdirTemp("", "millrace-image-*")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()

	binary := filepath.Join(work, path.Base(filepath.ToSlash(o.Main)))
	if err := compile(ctx, o, binary); err != nil {
		return "", err
	}
	image, err := assemble(o, binary)
	if err != nil {
		return "", err
	}
	index := filepath.Join(work, "layout")
	if err := writeLayout(index, o.Name, image); err != nil {
		return "", err
	}
	if err := archive(index, o.Out); err != nil {
		return "", err
	}
	digest, err := image.Digest()
	return digest.String(), err
}

func compile(ctx context.Context, o Options, binary string) error {
	root := o.Source
	if root == "" {
		var err error
		if root, err = source.Root(); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", strings.TrimSpace("-s -w -buildid= "+o.LDFlags), "-o", binary, o.Main)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+o.Arch, "GOFLAGS=", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", o.Main, err, out)
	}
	return nil
}

// assemble makes an image whose only file is the binary, in the root directory.
func assemble(o Options, binary string) (v1.Image, error) {
	name := filepath.Base(binary)
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return layerTar(name, binary) },
		tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.AppendLayers(base, layer)
	if err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", o.Arch
	file.Created = v1.Time{Time: time.Unix(0, 0).UTC()}
	file.History = []v1.History{{Created: file.Created, CreatedBy: "go build " + o.Main}}
	file.Config = v1.Config{
		Entrypoint: []string{"/" + name},
		User:       user,
		WorkingDir: "/",
		Labels:     map[string]string{"org.opencontainers.image.source": "https://github.com/millrace-dev/millrace"},
	}
	return mutate.ConfigFile(image, file)
}

// layerTar streams a tar archive with one executable file that belongs to root.
func layerTar(name, binary string) (io.ReadCloser, error) {
	f, err := os.Open(binary)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	reader, writer := io.Pipe()
	go func() {
		defer f.Close()
		archive := tar.NewWriter(writer)
		err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: info.Size(), ModTime: time.Unix(0, 0)})
		if err == nil {
			_, err = io.Copy(archive, f)
		}
		writer.CloseWithError(errors.Join(err, archive.Close()))
	}()
	return reader, nil
}

// writeLayout writes an OCI image layout in which containerd and others find the image's name.
func writeLayout(dir, name string, image v1.Image) error {
	index, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return index.AppendImage(image, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          name,
		"org.opencontainers.image.ref.name": name,
	}))
}

// archive packs the files of a directory in the order of their names, without times and owners.
func archive(dir, out string) (err error) {
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	writer := tar.NewWriter(f)
	defer func() { err = errors.Join(err, writer.Close(), f.Close()) }()
	return filepath.WalkDir(dir, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		relative, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		header := &tar.Header{Typeflag: tar.TypeReg, Name: filepath.ToSlash(relative), Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(0, 0)}
		if err := writer.WriteHeader(header); err != nil {
			return err
		}
		_, err = writer.Write(content)
		return err
	})
}
