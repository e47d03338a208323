#!/bin/bash
# usage: lint.sh TOOLS-FOLDER [goreleaser ARG...]
# Builds the pinned linters once into the folder, then lints; with goreleaser
# as second word it runs that instead.
set -euo pipefail
tools=$1
shift
golangci=v2.15.0
goreleaser=v2.14.3
get() { # get NAME PACKAGE VERSION
  [[ -x $tools/$1-$3 ]] && return
  echo "lint: building $1 $3" >&2
  mkdir -p "$tools/new"
  GOFLAGS= GOBIN=$tools/new go install "$2@$3"
  mv "$tools/new/$1" "$tools/$1-$3"
}
get goreleaser github.com/goreleaser/goreleaser/v2 $goreleaser
[[ ${1:-} != goreleaser ]] || { shift; exec "$tools/goreleaser-$goreleaser" "$@"; }
get golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint $golangci
unformatted=$(git ls-files '*.go' | xargs gofmt -l)
[[ -z $unformatted ]] || { echo "lint: not formatted: $unformatted" >&2; exit 1; }
for f in $(git ls-files '*.sh') .ci/run; do bash -n "$f"; done
"$tools/goreleaser-$goreleaser" check -q
"$tools/golangci-lint-$golangci" run --allow-parallel-runners ./... # another clone may lint at the same time
