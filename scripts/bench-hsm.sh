#!/bin/bash
# Wraps through the connector's socket against the same operation in one
# process, on SoftHSM: wraps a second, CPU time of both processes for each, and
# the ratios. Then what a root key costs that is not in the token at hand, and
# what 100,000 of them leave there. usage: bench-hsm.sh [OPERATIONS]
set -euo pipefail
cd "$(dirname "$0")/.."
uptime >&2
go test -run '^$' -bench Wrap -benchtime "${1:-60000}x" ./internal/connector | awk '
  /^BenchmarkWrap/ {
    split($1, p, "[/-]")
    for (i = 2; i < NF; i++) { if ($(i+1) == "wraps/s") rate[p[2], p[3]] = $i; if ($(i+1) == "cpu-µs/op") cpu[p[2], p[3]] = $i }
    at[p[3]] = 1
  }
  END {
    printf "%8s %14s %14s %8s %14s %14s %8s\n", "at once", "process/s", "socket/s", "ratio", "process µs", "socket µs", "ratio"
    for (n = 1; n <= 64; n++) if (n in at)
      printf "%8d %14.0f %14.0f %8.2f %14.1f %14.1f %8.2f\n", n, rate["process", n], rate["socket", n], rate["socket", n] / rate["process", n],
        cpu["process", n], cpu["socket", n], cpu["process", n] / cpu["socket", n]
  }'
go test -run '^$' -bench 'Miss|RootKeys' -benchtime 100000x ./internal/token | awk '
  /^Benchmark/ {
    split($1, p, "[/-]")
    name = p[1] == "BenchmarkMiss" ? p[2] : "keys"
    for (i = 2; i < NF; i++) { if ($(i+1) == "cpu-µs/op") cpu[name] = $i; if ($(i+1) == "objects") objects = $i }
  }
  END {
    limit = 3 * cpu["hit"] + cpu["unwrap"]
    printf "\n%14s %14s %14s %20s %8s\n", "hit µs", "miss µs", "C_UnwrapKey µs", "3 hits + unwrap µs", "ratio"
    printf "%14.1f %14.1f %14.1f %20.1f %8.2f\n", cpu["hit"], cpu["miss"], cpu["unwrap"], limit, cpu["miss"] / limit
    printf "\n100000 root keys: %.1f µs each, %d objects more in the token\n", cpu["keys"], objects
  }'
