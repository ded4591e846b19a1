#!/usr/bin/env bash
# Looks for known vulnerabilities in what our programs call, with the Go team's govulncheck. Its database is fetched from
# https://vuln.go.dev; GOVULNDB=file:///… or another address names a copy.
#
# Exits with 0 when there are none, 1 when there are some, and 3 when the database cannot be reached or read: then nothing was looked at.
#
# usage: tools/vulncheck.sh [packages]
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
if go tool -modfile=tools/security/go.mod govulncheck -db "${GOVULNDB:-https://vuln.go.dev}" "${@:-./cmd/...}" >"$log" 2>&1 && ! grep -q '^Vulnerability #' "$log"; then
  cat "$log"
  exit 0
fi
if grep -q -e '^fetching vulnerabilities:' -e '^govulncheck: fetching vulnerabilities:' -e 'creating client:' "$log"; then
  cat "$log" >&2
  echo "NOT CHECKED for vulnerabilities: the database cannot be reached or read. GOVULNDB=file:///path names a copy." >&2
  exit 3
fi
cat "$log" >&2
exit 1
