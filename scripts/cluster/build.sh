#!/bin/bash
# usage: build.sh FOLDER
# Builds what runs on the cluster's node from Go modules alone, by the versions
# in go.mod. containerd, runc and the CNI plugins are built as they are.
set -euo pipefail
out=$1
cd "$(dirname "$0")"
mkdir -p "$out/cni" "$out/images"
version=$(go list -mod=readonly -m -f '{{.Version}}' k8s.io/kubernetes)
minor=${version#v1.}
pkg=k8s.io/component-base/version
containerd=github.com/containerd/containerd/v2/cmd
cni=github.com/containernetworking/plugins/plugins
gobuild() { nice -n 10 go build -mod=readonly -trimpath "$@"; }

CGO_ENABLED=0 gobuild -ldflags "-s -w -X $pkg.gitVersion=$version -X $pkg.gitMajor=1 -X $pkg.gitMinor=${minor%.*}" -o "$out/" \
  ./kubeall ./coredns ./pause ./mkimg "$containerd"/{containerd,containerd-shim-runc-v2,ctr} "$cni"/{main/bridge,ipam/host-local,meta/portmap}
CGO_ENABLED=1 gobuild -tags 'netgo osusergo seccomp' -ldflags '-s -w -extldflags -static' -o "$out/" github.com/opencontainers/runc
mv "$out"/{bridge,host-local,portmap} "$out/cni/"
ln -s kubeall "$out/kubectl"
for i in pause coredns; do
  "$out/mkimg" "$out/images/$i.tar" "node.local/$i:1" "$out/$i"
  rm "$out/$i"
done
