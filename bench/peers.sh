#!/usr/bin/env bash
# Fetches what the benchmarks compare with and Go modules do not have, into the cache of the tests. What cannot be fetched is left out, and the benchmark says so in its rows.
#   pgq     PgQ without C code, which runs on every PostgreSQL, from Debian's package
#   emmett  emmett-postgresql with the versions of bench/peers/emmett/package-lock.json, by npm
#
# usage: bench/peers.sh [pgq] [emmett]
set -euo pipefail
cd "$(dirname "$0")/.."

# The same place as test/env/dirs.Cache.
if [ -n "${MILLRACE_CACHE:-}" ]; then
  cache=$MILLRACE_CACHE
elif [ "$(id -u)" -eq 0 ]; then
  cache=/var/cache/millrace
else
  cache=${XDG_CACHE_HOME:-$HOME/.cache}/millrace
fi

# usage: leave_out <why>
leave_out() { echo "bench/peers.sh: $1; it is left out" >&2; exit 0; }

fetch_pgq() {
  local target=$cache/pgq/pgq_pl_only.sql package work
  if [ -e "$target" ]; then return; fi
  if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then return; fi
  work=$(mktemp -d)
  # shellcheck disable=SC2064 # the directory that it is now
  trap "rm -rf '$work'" EXIT
  cd "$work"
  # The package is named after a version of PostgreSQL; the file is the same for all.
  find_package() { apt-cache search --names-only '^postgresql-[0-9]+-pgq3$' | cut -d ' ' -f 1 | sort -V | tail -n 1; }
  package=$(find_package)
  if [ -z "$package" ] && [ "$(id -u)" -eq 0 ]; then
    apt-get update -q >/dev/null 2>&1 || true
    package=$(find_package)
  fi
  if [ -z "$package" ] || ! apt-get download -q "$package" >/dev/null 2>&1; then leave_out "apt has no PgQ"; fi
  dpkg-deb -x ./*.deb files
  mkdir -p "$cache/pgq"
  cp files/usr/share/postgresql/*/contrib/pgq_pl_only.sql "$target.new"
  chmod 644 "$target.new"
  mv "$target.new" "$target"
}

fetch_emmett() {
  local target=$cache/emmett
  if cmp -s bench/peers/emmett/package-lock.json "$target/package-lock.json"; then return; fi
  if ! command -v npm >/dev/null; then leave_out "Emmett needs Node 20 with npm"; fi
  rm -rf "$target.new"
  mkdir -p "$target.new"
  cp bench/peers/emmett/package.json bench/peers/emmett/package-lock.json "$target.new"
  # Programs of packages are not run.
  if ! npm ci --prefix "$target.new" --ignore-scripts --omit=dev --no-audit --no-fund --silent >/dev/null 2>&1; then
    rm -rf "$target.new"
    leave_out "npm could not fetch Emmett"
  fi
  rm -rf "$target"
  mv "$target.new" "$target"
}

if [ "$#" -eq 0 ]; then set -- pgq emmett; fi
for peer in "$@"; do
  case "$peer" in
    pgq | emmett) ("fetch_$peer") ;;
    *) echo "usage: bench/peers.sh [pgq] [emmett]" >&2; exit 2 ;;
  esac
done
