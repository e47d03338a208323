#!/bin/bash
# Prints what a start of kmsctl costs, and of helm when it is there; fails
# when kmsctl needs more than the limits.
set -euo pipefail
cd "$(dirname "$0")/.."
cpu_ms=50 rss_mib=48 runs=20
scripts/deps.sh time
# A copy, as an installed program is one: what the linker has just written is
# laid out in the page cache in another way, which counts 10 MiB more.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp bin/kmsctl "$copy/"

cost() { # cost CMD [ARG...]: CPU milliseconds of one run, peak MiB
  local TIMEFORMAT='%U %S' times peak
  "$@" >/dev/null # the file is in memory now
  times=$({ time for ((i = 0; i < runs; i++)); do "$@" >/dev/null; done; } 2>&1)
  peak=$(for ((i = 0; i < runs; i++)); do /usr/bin/time -f %M "$@" 2>&1 >/dev/null; done | sort -n | sed -n $((runs / 2))p)
  awk -v n=$runs -v kib="$peak" '{printf "%.0f %.1f\n", ($1 + $2) * 1000 / n, kib / 1024}' <<<"$times"
}

over=0
for args in version --help; do
  read -r ms mib < <(cost "$copy/kmsctl" $args)
  printf 'kmsctl %-8s %4d CPU ms (limit %d)  %4s MiB (limit %d)\n' "$args" "$ms" $cpu_ms "$mib" $rss_mib
  awk "BEGIN { exit !($ms <= $cpu_ms && $mib <= $rss_mib) }" || over=1
done
if command -v helm >/dev/null; then
  read -r ms mib < <(cost helm version)
  printf 'helm   %-8s %4d CPU ms              %4s MiB\n' version "$ms" "$mib"
fi
((!over)) || { echo "bench: over the limit" >&2; exit 1; }
