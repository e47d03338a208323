#!/bin/bash
# What a wrap costs beside the least it could cost, and what keys cost in memory and time.
# usage: scripts/bench-kms.sh [FLAG of bench-kms...]; needs bin/ (make build).
set -euo pipefail
cd "$(dirname "$0")/.."
tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
go build -o "$tool/bench-kms" ./scripts/bench-kms
"$tool/bench-kms" -bin bin "$@"
