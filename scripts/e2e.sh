#!/bin/bash
# Starts a real cluster and a real registry, runs the end-to-end scripts
# against them with the kmsctl that was built, and takes all down again.
# Arguments are go test's, as in: scripts/e2e.sh -run TestE2E/install
# With --stop it only takes down what a killed run left.
set -euo pipefail
cd "$(dirname "$0")/.."
export KMSCTL_CACHE=${KMSCTL_CACHE:-$PWD/.cache}
export CLUSTER_SH=$PWD/scripts/cluster/cluster.sh KMSCTL_CLUSTER=$KMSCTL_CACHE/e2e/cluster
state=$KMSCTL_CACHE/e2e
mkdir -p "$state"
. scripts/process.sh
down() { # also what an earlier run left when it was killed
  "$CLUSTER_SH" down
  stop registry
}
down
[[ ${1:-} != --stop ]] || exit 0
trap down EXIT
rm -rf "$state/registry"
(cd scripts/cluster && go test -mod=readonly -count=1 ./node)
registry
"$CLUSTER_SH" up | grep ^cluster:
"$CLUSTER_SH" expose "${registry##*:}"
eval "$("$CLUSTER_SH" env)"
export REGISTRY=$registry
# One after another: some scripts install into the same namespace.
go test -tags e2e -count=1 -parallel 1 -timeout 30m -v -run '^TestE2E$' "$@" ./cmd/kmsctl
