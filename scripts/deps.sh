#!/bin/bash
# Installs the Debian packages that building and testing need, when one is
# missing, and says so. Other systems: have these programs and libraries ready.
set -euo pipefail
packages=(gcc libc6-dev git curl softhsm2 opensc opencryptoki skopeo docker-registry xz-utils openssl)
command -v dpkg-query >/dev/null || exit 0
missing=()
for p in "${packages[@]}" "$@"; do
  [[ $(dpkg-query -Wf '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || missing+=("$p")
done
((${#missing[@]})) || exit 0
echo "deps: installing Debian packages: ${missing[*]}" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -20 "$log" >&2
  echo "deps: could not install; run as root: apt-get install ${missing[*]}" >&2
  exit 1
fi
