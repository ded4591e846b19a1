// Package tools tests the scripts of this directory.
package tools

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// vulncheck.sh finds what a database says about something that a program calls, finds nothing in a database that says nothing,
// and does not call unreachable the same as clean.
func TestVulncheckTellsFoundFromCleanFromUnreachable(t *testing.T) {
	for _, c := range []struct {
		name, database string
		code           int
		says           string
	}{
		{"clean", database(t, ""), 0, "No vulnerabilities found"},
		{"found", database(t, "ReadFile"), 1, "GO-2026-9999"},
		{"not called", database(t, "NoSuchFunction"), 0, "your code doesn't appear to call"},
		{"unreachable", "http://127.0.0.1:1", 3, "NOT CHECKED"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "./vulncheck.sh", "./hack/sbom")
			cmd.Env = append(os.Environ(), "GOVULNDB="+c.database)
			out, err := cmd.CombinedOutput()
			code := 0
			if exit, ok := errors.AsType[*exec.ExitError](err); ok {
				code = exit.ExitCode()
			} else if err != nil {
				t.Fatal(err)
			}
			if code != c.code || !strings.Contains(string(out), c.says) {
				t.Errorf("exit code %d, not %d, or it does not say %q:\n%s", code, c.code, c.says, out)
			}
		})
	}
}

// database is one of vulnerabilities, with one in a function of package debug/buildinfo unless the function is empty.
func database(t *testing.T, function string) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name, content string) {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const modified = "2026-01-01T00:00:00Z"
	write("index/db.json", `{"modified":"`+modified+`"}`)
	if function == "" {
		write("index/modules.json", "[]")
		return "file://" + dir
	}
	write("index/modules.json", `[{"path":"stdlib","vulns":[{"id":"GO-2026-9999","modified":"`+modified+`"}]}]`)
	write("ID/GO-2026-9999.json", fmt.Sprintf(`{"schema_version":"1.3.1","id":"GO-2026-9999","modified":%q,"published":%q,"summary":"an example","details":"an example","affected":[
		{"package":{"name":"stdlib","ecosystem":"Go"},"ranges":[{"type":"SEMVER","events":[{"introduced":"0"}]}],
		 "ecosystem_specific":{"imports":[{"path":"debug/buildinfo","symbols":[%q]}]}}]}`, modified, modified, function))
	return "file://" + dir
}
