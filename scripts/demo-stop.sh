#!/bin/bash
# Stops what scripts/demo.sh left running. Keys, archive and registry stay on
# disk for the next run; with --clean they go too.
set -euo pipefail
cd "$(dirname "$0")/.."
state=$PWD/.cache/demo
. scripts/process.sh
[[ -d $state ]] || { echo "demo-stop: nothing is running"; exit 0; }
if [[ -e $state/cluster-started ]]; then
  scripts/cluster/cluster.sh down
  rm -f "$state/cluster-started"
fi
for p in forward kms registry; do stop $p; done
if [[ ${1:-} == --clean ]]; then
  rm -rf "$state"
  echo "demo-stop: stopped, and nothing is left"
else
  echo "demo-stop: stopped; the keys stay in .cache/demo for the next run (scripts/demo-stop.sh --clean removes them)"
fi
