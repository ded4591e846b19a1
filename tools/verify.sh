#!/usr/bin/env bash
# What CI checks besides tests: generated files, format, vet and lint, of the tree as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { echo "== $*" >&2; }

# Generating into a copy would need the whole tree; instead generate in place and compare with what was there, so that
# files which are not committed yet do not count as drift.
step "generated files"
generated() {
  find api config/crd config/rbac config/argocd charts/millrace/files charts/millrace/README.md docs/reference -type f -print0 2>/dev/null | sort -z | xargs -0 -r sha256sum
}
before=$(generated)
make --no-print-directory generate docs
after=$(generated)
if [ "$before" != "$after" ]; then
  diff <(echo "$before") <(echo "$after") | sed -n 's/^> [0-9a-f]*  /generated anew: /p' >&2
  echo "Generated files were out of date; they are not any more: commit them (make generate docs)." >&2
  exit 1
fi

step "chart and kustomize"
make --no-print-directory install-yaml >/dev/null
helm=$(go run ./test/env/cmd/testenv program helm)
"$helm" lint --quiet --strict charts/millrace
"$helm" template millrace charts/millrace --namespace millrace-system >/dev/null

step "modules"
go mod verify >/dev/null
go mod tidy -diff >/dev/null || { echo "go.mod or go.sum is not tidy; run: go mod tidy" >&2; exit 1; }

step "vet"
go vet ./...
(cd bench && go vet ./...)
(cd test/gitops && CGO_ENABLED=0 go vet -trimpath ./...)

step "lint and format"
make --no-print-directory lint

# The database is on the internet: where that cannot be reached this step says so, and the others count.
step "vulnerabilities"
vulncheck=0
./tools/vulncheck.sh || vulncheck=$?
[ "$vulncheck" -eq 0 ] || [ "$vulncheck" -eq 3 ] || exit "$vulncheck"
