package postgres

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/process"
)

// initdb takes a second or more; copying what it made takes a tenth of that. So each version's new, empty data
// directory is made once and kept in the cache, together with the superuser's random password.

// initdbArgs is part of the cached directory's name, so changing it makes a new one.
var initdbArgs = []string{"--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions"}

// remoteAccess lets pods in, and standbys: they come from the addresses of the test cluster's bridge. Who may connect at all is
// decided by the addresses that the server listens on.
const remoteAccess = "\nhost all,replication all 0.0.0.0/0 scram-sha-256\nhost all,replication all ::/0 scram-sha-256\n"

// fill makes dir/data a new server's data directory, unless there is one already, and returns the superuser's password.
func fill(ctx context.Context, found install, user *process.User, dir string) (password string, err error) {
	data, passwordFile := filepath.Join(dir, "data"), filepath.Join(dir, "password")
	if _, err := os.Stat(filepath.Join(data, "PG_VERSION")); err == nil {
		kept, err := os.ReadFile(passwordFile)
		return string(kept), err
	}
	template, err := ensureTemplate(ctx, found, user)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", err
	}
	if err := copyTree(filepath.Join(template, "data"), data, user); err != nil {
		return "", fmt.Errorf("copy the template of the data directory: %w", err)
	}
	made, err := os.ReadFile(filepath.Join(template, "password"))
	if err != nil {
		return "", err
	}
	return string(made), os.WriteFile(passwordFile, made, 0o600)
}

// ensureTemplate returns the directory of the cached template. Processes that want it at the same time wait for the
// one that makes it.
func ensureTemplate(ctx context.Context, found install, user *process.User) (string, error) {
	version, err := exec.CommandContext(ctx, filepath.Join(found.bin, "postgres"), "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", found.bin, err)
	}
	recipe := sha256.Sum256([]byte(found.bin + string(version) + strings.Join(initdbArgs, " ") + remoteAccess))
	cache, err := dirs.Cache("initdb")
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("make the cache directory: %w; set MILLRACE_CACHE to a place that you may write to", err)
	}
	template := filepath.Join(cache, fmt.Sprintf("%d-%x", found.major, recipe[:6]))

	lock, err := os.OpenFile(template+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if _, err := os.Stat(template); err == nil {
		return template, nil
	}
	return template, makeTemplate(ctx, found, user, template)
}

// makeTemplate runs initdb in a run directory, which its user can reach, and copies the result into the cache. The
// final rename makes it visible whole or not at all.
func makeTemplate(ctx context.Context, found install, user *process.User, template string) (err error) {
	run, err := dirs.NewRun("initdb")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, run.Remove()) }()

	password := rand.Text()
	data, passwordFile := filepath.Join(run.Path, "data"), filepath.Join(run.Path, "password")
	if err := os.WriteFile(passwordFile, []byte(password), 0o600); err != nil {
		return err
	}
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	if err := errors.Join(ownedBy(user, passwordFile), ownedBy(user, data)); err != nil {
		return err
	}
	log := filepath.Join(run.Path, "initdb.log")
	p, err := process.Start(process.Command{
		Path: filepath.Join(found.bin, "initdb"),
		Args: append([]string{"--pgdata=" + data, "--pwfile=" + passwordFile}, initdbArgs...),
		Env:  append(found.env(), "LC_ALL=C.UTF-8"), Dir: run.Path, Log: log, User: user,
	})
	if err != nil {
		return err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		p.Kill()
		return ctx.Err()
	}
	if _, err := os.Stat(filepath.Join(data, "global", "pg_control")); err != nil {
		return p.Exit()
	}
	hba, err := os.OpenFile(filepath.Join(data, "pg_hba.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = hba.WriteString(remoteAccess)
	if err := errors.Join(err, hba.Close()); err != nil {
		return err
	}

	building := template + ".new"
	if err := os.RemoveAll(building); err != nil {
		return err
	}
	if err := os.Mkdir(building, 0o700); err != nil {
		return err
	}
	if err := copyTree(data, filepath.Join(building, "data"), nil); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(building, "password"), []byte(password), 0o600); err != nil {
		return err
	}
	return os.Rename(building, template)
}

// copyTree copies directories and regular files, which is all that a new data directory holds, and gives them to user.
func copyTree(from, to string, user *process.User) error {
	return filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, relative)
		if entry.IsDir() {
			// The server refuses a data directory that others can read.
			if err := os.Mkdir(target, 0o700); err != nil {
				return err
			}
			return ownedBy(user, target)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(target, content, 0o600); err != nil {
			return err
		}
		return ownedBy(user, target)
	})
}
