package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const valid = `
name: orders
source: {consumerGroup: {stream: orders, group: orders_sink}}
mapping: {columns: [{name: order_id, path: order_id, type: text, required: true}]}
sink: {table: {name: orders, key: [order_id]}}
`

func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, tc := range map[string]struct {
		args []string
		want int
	}{
		"validate accepts a valid file":                {[]string{"validate", "-f", file("valid.yaml", valid)}, exitOK},
		"validate refuses a file with problems":        {[]string{"validate", "-f", file("invalid.yaml", valid+"more: 1\n")}, exitFailed},
		"validate refuses a file that is not there":    {[]string{"validate", "-f", filepath.Join(dir, "missing.yaml")}, exitFailed},
		"validate needs a file":                        {[]string{"validate"}, exitUsage},
		"validate refuses a manifest":                  {[]string{"validate", "-f", file("manifest.yaml", "apiVersion: millrace.dev/v1alpha1\nkind: Processor\n")}, exitFailed},
		"an unknown command":                           {[]string{"start"}, exitUsage},
		"a dry run of a bad configuration":             {[]string{"run", "--dry-run", "-f", file("bad2.yaml", "name: x\n")}, exitUsage},
		"a dry run without a source":                   {[]string{"run", "--dry-run", "-f", file("valid2.yaml", valid)}, exitFailed},
		"a dry run of too much":                        {[]string{"run", "--dry-run", "--limit", "10001", "-f", file("valid3.yaml", valid)}, exitUsage},
		"a limit without a dry run":                    {[]string{"run", "--limit", "5", "-f", file("valid4.yaml", valid)}, exitUsage},
		"redrive needs a valid configuration":          {[]string{"redrive", "--config", file("bad-redrive.yaml", "name: x\n")}, exitUsage},
		"redrive knows -f as well":                     {[]string{"redrive", "-f", file("valid5.yaml", valid)}, exitFailed},
		"redrive takes no arguments":                   {[]string{"redrive", "everything"}, exitUsage},
		"redrive needs a number that is not negative":  {[]string{"redrive", "--max", "-1"}, exitUsage},
		"an unknown flag":                              {[]string{"--nonsense"}, exitUsage},
		"an unknown log format":                        {[]string{"--log-format", "xml"}, exitUsage},
		"a configuration with problems does not start": {[]string{"--config", file("bad.yaml", "name: x\n")}, exitUsage},
	} {
		t.Run(name, func(t *testing.T) {
			if got := run(tc.args); got != tc.want {
				t.Errorf("exit code %d, want %d", got, tc.want)
			}
		})
	}
}

// What validate prints is read by people and by editors: one problem per line, each with file, line, field and what to write.
func TestValidateSaysWhereAndWhat(t *testing.T) {
	if file := os.Getenv("VALIDATE_FILE"); file != "" {
		os.Exit(run([]string{"validate", "-f", file}))
	}
	file := filepath.Join(t.TempDir(), "processor.yaml")
	text := strings.Replace(valid, "type: text", "type: txt", 1) + "state: {key: id, time: ts}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestValidateSaysWhereAndWhat$")
	cmd.Env = append(os.Environ(), "VALIDATE_FILE="+file)
	out, _ := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
	for _, want := range []string{
		file + `:4: mapping.columns[0].type: "txt" is not allowed; write one of text, boolean`,
		file + `:6: state.key: "id" is not a mapped column; write one of order_id`,
		file + ": 3 problems\n",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("want %q in\n%s", want, out)
		}
	}
}
