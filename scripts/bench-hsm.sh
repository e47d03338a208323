#!/bin/bash
# Wraps through the connector's socket against the same operation in one
# process, on SoftHSM: wraps a second, CPU time of both processes for each, and
# the ratios. Then what a root key costs that is not in the token at hand, and
# what 100,000 of them leave there. Each figure is the median of the rounds,
# beside its limit. usage: bench-hsm.sh [OPERATIONS [ROUNDS]]
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${2:-3}
read -r load _ </proc/loadavg
if awk "BEGIN { exit !($load > 0.5) }"; then
  echo "bench-hsm: load $load: others take processors, of which the socket needs two at a time and one process only one; the first table says little" >&2
fi
median='
  function median(k,   i, j, v, n, all) {
    n = split(seen[k], all, " ")
    for (i = 2; i <= n; i++) for (j = i; j > 1 && all[j-1] + 0 > all[j] + 0; j--) { v = all[j]; all[j] = all[j-1]; all[j-1] = v }
    return all[int((n + 1) / 2)]
  }
  function verdict(good) { return good ? "kept" : "MISSED" }
'
go test -run '^$' -bench Wrap -benchtime "${1:-60000}x" -count "$rounds" ./internal/connector | awk "$median"'
  /^BenchmarkWrap/ {
    split($1, p, "[/-]")
    for (i = 2; i < NF; i++) if ($(i+1) == "wraps/s" || $(i+1) == "cpu-µs/op") seen[p[2] p[3] $(i+1)] = seen[p[2] p[3] $(i+1)] " " $i
    at[p[3]] = 1
  }
  END {
    limit[8] = 0.4; limit[64] = 0.6
    printf "%8s %14s %14s %8s %14s %14s %8s  %s\n", "at once", "process/s", "socket/s", "ratio", "process µs", "socket µs", "ratio", "limit"
    for (n = 1; n <= 64; n++) if (n in at) {
      inside = median("process" n "wraps/s"); across = median("socket" n "wraps/s"); pc = median("process" n "cpu-µs/op"); sc = median("socket" n "cpu-µs/op")
      printf "%8d %14.0f %14.0f %8.2f %14.1f %14.1f %8.2f  %s\n", n, inside, across, across / inside, pc, sc, pc / sc,
        n in limit ? sprintf("wraps/s at least %.1f: %s", limit[n], verdict(across / inside >= limit[n])) : "none"
    }
  }'
{
  go test -run '^$' -bench Miss -benchtime 30000x -count "$rounds" ./internal/token
  go test -run '^$' -bench RootKeys -benchtime 100000x ./internal/token
} | awk "$median"'
  /^Benchmark/ {
    split($1, p, "[/-]")
    name = p[1] == "BenchmarkMiss" ? p[2] : "keys"
    for (i = 2; i < NF; i++) { if ($(i+1) == "cpu-µs/op") seen[name] = seen[name] " " $i; if ($(i+1) == "objects") objects = $i }
  }
  END {
    hit = median("hit"); miss = median("miss"); unwrap = median("unwrap"); limit = 3 * hit + unwrap
    printf "\n%14s %14s %14s %20s %8s\n", "hit µs", "miss µs", "C_UnwrapKey µs", "3 hits + unwrap µs", "ratio"
    printf "%14.1f %14.1f %14.1f %20.1f %8.2f  limit at most 1: %s\n", hit, miss, unwrap, limit, miss / limit, verdict(miss <= limit)
    printf "\n100000 root keys: %.1f µs each, %d objects more in the token; limit 0: %s\n", median("keys"), objects, verdict(objects == 0)
  }'
