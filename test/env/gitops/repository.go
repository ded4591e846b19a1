package gitops

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Repository is a git repository with a work tree, whose commits a test makes.
type Repository struct{ dir string }

// NewRepository makes an empty repository in a directory of its own below dir.
func NewRepository(ctx context.Context, dir string) (*Repository, error) {
	r := &Repository{dir: filepath.Join(dir, "repository")}
	if err := os.Mkdir(r.dir, 0o755); err != nil {
		return nil, err
	}
	_, err := r.git(ctx, "init", "--quiet", "--initial-branch=main")
	return r, err
}

// URL at which processes of this machine fetch it.
func (r *Repository) URL() string { return "file://" + r.dir }

// Commit writes the files, by path; those with empty content are removed. It returns the commit.
func (r *Repository) Commit(ctx context.Context, message string, files map[string]string) (string, error) {
	for path, content := range files {
		path = filepath.Join(r.dir, path)
		if content == "" {
			if err := os.Remove(path); err != nil {
				return "", fmt.Errorf("commit %q: %w", message, err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return "", fmt.Errorf("commit %q: %w", message, err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return "", fmt.Errorf("commit %q: %w", message, err)
		}
	}
	if _, err := r.git(ctx, "add", "--all"); err != nil {
		return "", err
	}
	if _, err := r.git(ctx, "commit", "--quiet", "--message", message); err != nil {
		return "", err
	}
	commit, err := r.git(ctx, "rev-parse", "HEAD")
	return strings.TrimSpace(commit), err
}

// archive is what a source of Flux makes of a commit: its files in a compressed tar.
func (r *Repository) archive(ctx context.Context, file string) error {
	_, err := r.git(ctx, "archive", "--format=tar.gz", "--output="+file, "HEAD")
	return err
}

func (r *Repository) git(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir = r.dir
	// Neither the user's nor the machine's configuration: no hooks, no signatures.
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=test", "GIT_AUTHOR_EMAIL=test@example.com", "GIT_COMMITTER_NAME=test", "GIT_COMMITTER_EMAIL=test@example.com")
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("git %s: %w\n%s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return string(out), nil
}
