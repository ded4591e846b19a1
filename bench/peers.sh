#!/usr/bin/env bash
# Fetches what the benchmarks compare with and Go modules do not have: PgQ without C code, which runs on every PostgreSQL, from Debian's package.
# Where there is no apt, or no such package, nothing is fetched, and the benchmark says so in PgQ's rows.
#
# usage: bench/peers.sh
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
target=$cache/pgq/pgq_pl_only.sql
if [ -e "$target" ]; then exit 0; fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then exit 0; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# The package is named after a version of PostgreSQL; the file is the same for all.
find_package() { apt-cache search --names-only '^postgresql-[0-9]+-pgq3$' | cut -d ' ' -f 1 | sort -V | tail -n 1; }
package=$(find_package)
if [ -z "$package" ] && [ "$(id -u)" -eq 0 ]; then
  apt-get update -q >/dev/null 2>&1 || true
  package=$(find_package)
fi
if [ -z "$package" ] || ! apt-get download -q "$package" >/dev/null 2>&1; then
  echo "bench/peers.sh: apt has no PgQ; it is left out" >&2
  exit 0
fi
dpkg-deb -x ./*.deb files
mkdir -p "$cache/pgq"
cp files/usr/share/postgresql/*/contrib/pgq_pl_only.sql "$target.new"
chmod 644 "$target.new"
mv "$target.new" "$target"
