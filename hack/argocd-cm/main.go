// Command argocd-cm prints the part of Argo CD's ConfigMap argocd-cm that teaches it Millrace's kinds. It is made of the Lua files in
// config/argocd/resource_customizations, which lie as in Argo CD's own repository. make generate runs it.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const header = `# Health checks and actions of Millrace's kinds for Argo CD. Generated from resource_customizations by make generate. Adds to the ConfigMap
# that is there, and leaves its other keys alone:
#
#   kubectl apply --server-side --field-manager=millrace -f config/argocd/argocd-cm.yaml
apiVersion: v1
kind: ConfigMap
metadata:
  name: argocd-cm
  namespace: argocd
  labels:
    app.kubernetes.io/part-of: argocd
data:
`

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "argocd-cm: which directory? That of resource_customizations, please")
		os.Exit(2)
	}
	text, err := configMap(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "argocd-cm:", err)
		os.Exit(1)
	}
	fmt.Print(text)
}

// configMap renders <root>/<group>/<Kind>/{health.lua, actions/discovery.lua, actions/<name>/action.lua}.
func configMap(root string) (string, error) {
	kinds, err := filepath.Glob(filepath.Join(root, "*", "*"))
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString(header)
	for _, kind := range kinds {
		key := filepath.Base(filepath.Dir(kind)) + "_" + filepath.Base(kind)
		health, err := os.ReadFile(filepath.Join(kind, "health.lua"))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "  resource.customizations.health.%s: |\n%s", key, indent(4, string(health)))
		discovery, err := os.ReadFile(filepath.Join(kind, "actions", "discovery.lua"))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "  resource.customizations.actions.%s: |\n    discovery.lua: |\n%s    definitions:\n", key, indent(6, string(discovery)))
		actions, err := filepath.Glob(filepath.Join(kind, "actions", "*", "action.lua"))
		if err != nil {
			return "", err
		}
		for _, path := range actions {
			action, err := os.ReadFile(path)
			if err != nil {
				return "", err
			}
			fmt.Fprintf(&b, "    - name: %s\n      action.lua: |\n%s", filepath.Base(filepath.Dir(path)), indent(8, string(action)))
		}
	}
	return b.String(), nil
}

func indent(width int, text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if line != "\n" {
			b.WriteString(strings.Repeat(" ", width))
		}
		b.WriteString(line)
	}
	return b.String()
}
