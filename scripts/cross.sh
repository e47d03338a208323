#!/bin/bash
# kms-connector for Linux on arm64, ppc64le and s390x by Debian's cross
# compilers, each started under qemu-user: it must load its C library, refuse
# wrong flags, and say what is wrong with a PKCS#11 library that is not there
# and with one that is of another machine. usage: cross.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bin/cross}
scripts/deps.sh qemu-user gcc-aarch64-linux-gnu gcc-powerpc64le-linux-gnu gcc-s390x-linux-gnu \
  libc6-dev-arm64-cross libc6-dev-ppc64el-cross libc6-dev-s390x-cross
mkdir -p "$out"
pin=$(mktemp)
trap 'rm -f "$pin"' EXIT
printf password >"$pin"
while read -r arch triple qemu; do
  prog=$out/kms-connector-linux-$arch
  CGO_ENABLED=1 GOOS=linux GOARCH=$arch CC=$triple-gcc go build -trimpath -ldflags '-s -w' -o "$prog" ./cmd/kms-connector
  run() { "$qemu" -L "/usr/$triple" "$prog" "$@"; }
  code=0 && run --socket "$out/s" >/dev/null 2>"$out/log" || code=$?
  [[ $code == 2 ]] && grep -q -- '--module: missing' "$out/log" || { echo "cross: $arch: flags: exit $code"; cat "$out/log"; exit 1; }
  for so in /no/such/lib.so /usr/lib/softhsm/libsofthsm2.so; do
    code=0 && run probe --pin-file "$pin" --module "$so" >"$out/report" 2>"$out/log" || code=$?
    [[ $code == 1 ]] && grep -q '"kind":"not-found"' "$out/report" || { echo "cross: $arch: $so: exit $code"; cat "$out/log" "$out/report"; exit 1; }
  done
  echo "cross: $arch: $(stat -c %s "$prog") bytes, starts under $qemu, refuses wrong flags and wrong libraries"
done <<END
arm64 aarch64-linux-gnu qemu-aarch64
ppc64le powerpc64le-linux-gnu qemu-ppc64le
s390x s390x-linux-gnu qemu-s390x
END
rm -f "$out/log" "$out/report"
