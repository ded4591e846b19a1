package main

import (
	"os"
	"path/filepath"
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
