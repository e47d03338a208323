#!/bin/bash
# Wraps through the connector's socket against the same operation in one
# process, on SoftHSM: wraps a second, CPU time of both processes for each, and
# the ratios. usage: bench-hsm.sh [OPERATIONS]
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
