#!/bin/bash
# Renews the lock file of the Debian packages in our images: the versions that
# apt offers here now, with the SHA-256 of each file, which stays in the cache.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=internal/image/debs.lock
cache=${KMSCTL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kmsctl}/debs
arch=amd64
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
apt-get update -qq
new=$(mktemp)
trap 'rm -f "$new"' EXIT
sed '/^#/!d' "$lock" >"$new"
for name in libc6 libgcc-s1 libstdc++6 libssl3 libsofthsm2; do
  version=$(apt-cache policy "$name:$arch" | awk '/Candidate:/ {print $2}')
  file=${name}_${version//:/%3a}_$arch.deb
  [[ -f $cache/$file ]] || (cd "$cache" && apt-get download -qq -o APT::Sandbox::User=root "$name:$arch=$version")
  echo "$name $version $arch $(sha256sum "$cache/$file" | cut -d' ' -f1)" >>"$new"
done
if cmp -s "$new" "$lock"; then
  echo "lock: nothing newer"
else
  diff "$lock" "$new" || true
  cat "$new" >"$lock"
fi
