#!/usr/bin/env bash
# Checks that the servers which the tests and the demo start are on this machine. Root on Debian or Ubuntu gets what is
# missing installed; everybody else is told what to install.
#
# usage: tools/deps.sh [postgres-<major>]
set -euo pipefail
cd "$(dirname "$0")/.."

has() { command -v "$1" >/dev/null 2>&1; }
packages=()
need() { packages+=("$1"); }

has_postgres() {
  compgen -G '/usr/lib/postgresql/1[5-8]/bin/initdb' >/dev/null && return 0
  has pg_config && [ -x "$(pg_config --bindir)/initdb" ]
}

# psycopg 3, of the system's Python or of the first one on the path, as in test/clients.
has_psycopg() {
  local python
  for python in /usr/bin/python3 python3; do
    has "$python" && "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("psycopg"))' && return 0
  done
  return 1
}

PATH="$PATH:/usr/sbin:/sbin"
has_postgres || need postgresql
has redis-server || has valkey-server || need redis-server
has pgbouncer || need pgbouncer
has_psycopg || need python3-psycopg
{ has prometheus && has promtool; } || need prometheus
has git || need git
# A node of our own needs root anyway; others use CLUSTER=current.
if [ "$(uname -s)" = Linux ] && [ "$(id -u)" -eq 0 ] && [ "${CLUSTER:-}" != current ]; then
  has runc || need runc
  [ -x /usr/lib/cni/bridge ] || need containernetworking-plugins
  has iptables || need iptables
  has ip || need iproute2
  has mount || need mount
fi

if [ "${#packages[@]}" -gt 0 ]; then
  if ! has apt-get; then
    echo "Please install: ${packages[*]}" >&2
    [ "$(uname -s)" = Darwin ] && echo "With Homebrew: brew install postgresql@18 redis pgbouncer python" >&2
    has_psycopg || echo "python3-psycopg is psycopg 3: pip install 'psycopg[binary]' in a virtual environment, and keep it active" >&2
    exit 1
  fi
  if [ "$(id -u)" -ne 0 ]; then
    echo "Please run: sudo apt-get install --no-install-recommends ${packages[*]}" >&2
    exit 1
  fi
  echo "installing ${packages[*]}" >&2
  log=$(mktemp)
  # Debian starts a server when its package is installed. The tests start their own on free ports, so a policy that
  # forbids starting stands while apt runs, unless the machine has a policy already.
  policy=/usr/sbin/policy-rc.d
  cleanup() { rm -f "$log"; [ -z "${ours:-}" ] || rm -f "$policy"; }
  trap cleanup EXIT
  if [ ! -e "$policy" ]; then
    ours=1
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  # A fresh machine has no package lists, and an old one has lists that name files long gone; so fetch and try again.
  install() { apt-get install -y -q --no-install-recommends "${packages[@]}" >>"$log" 2>&1; }
  if ! install && ! { apt-get update -q >>"$log" 2>&1; install; }; then
    tail -n 30 "$log" >&2
    echo "apt-get could not install ${packages[*]}" >&2
    exit 1
  fi
fi

for wanted in "$@"; do
  case "$wanted" in
    postgres-*) ./tools/postgres.sh "${wanted#postgres-}" ;;
    *) echo "tools/deps.sh: what is $wanted?" >&2; exit 1 ;;
  esac
done
