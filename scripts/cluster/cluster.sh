#!/bin/bash
# usage: cluster.sh build | up | env | down | exec CMD [ARG...] | expose PORT... | publish TARGET [ADDR]
#
# A real one-node Kubernetes cluster on this machine (as root, on Linux). Its
# network has no way out: `expose` lends it ports of this host's loopback, and
# `publish` makes an address of the cluster reachable from here. `env` prints
# what a shell needs for kubectl.
# KMSCTL_CLUSTER names its work folder, so that several can run side by side.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${KMSCTL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kmsctl}
dir=${KMSCTL_CLUSTER:-$cache/cluster}
programs=$cache/cluster-bin

# The programs that we build: everything that runs on the node. The harness
# itself is built each time; that takes no time.
key() {
  { go version && cd "$here" && sha256sum go.mod go.sum build.sh kubeall/* coredns/* pause/* mkimg/*; } | sha256sum | cut -c1-16
}

build() {
  "$here/../deps.sh" gcc libc6-dev libseccomp-dev iproute2 iptables nftables conntrack
  mkdir -p "$programs"
  exec 9>"$programs/lock"
  flock 9 # two at once build once
  bin=$programs/$(key)
  if [[ ! -d $bin ]]; then
    echo "cluster: building Kubernetes and its node's programs, once (about 14 minutes of CPU on a machine that has built nothing)" >&2
    rm -rf "$programs"/new
    "$here/build.sh" "$programs/new"
    mv "$programs/new" "$bin"
  fi
  (cd "$here" && CGO_ENABLED=0 go build -mod=readonly -trimpath -o "$programs/node.new" ./node)
  mv "$programs/node.new" "$programs/node"
  exec 9>&-
}

# environment prints what a shell needs for kubectl.
environment() { printf 'export KUBECONFIG=%q PATH="$PATH":%q\n' "$dir/kubeconfig" "$programs/$(key)"; }

up() {
  build
  if [[ ! -s $dir/kubeconfig ]] || ! "$bin/kubectl" --kubeconfig "$dir/kubeconfig" get --raw /readyz >/dev/null 2>&1; then
    "$programs/node" down -dir "$dir" # what a killed one left
    mkdir -p "$dir"
    setsid "$programs/node" up -dir "$dir" -bin "$bin" >"$dir.log" 2>&1 </dev/null &
    until [[ -s $dir/kubeconfig ]]; do
      kill -0 $! 2>/dev/null || { cat "$dir.log" "$dir/log/node.log" >&2; exit 1; }
      sleep 0.1
    done
  fi
  echo "cluster: $("$bin/kubectl" --kubeconfig "$dir/kubeconfig" get nodes --no-headers)"
  echo "use it:  $(environment)"
  echo "stop it: make cluster-stop"
}

case ${1:-} in
  build) build ;;
  up) up ;;
  env) environment ;;
  down) [[ ! -x $programs/node ]] || "$programs/node" down -dir "$dir" && rm -f "$dir.log" ;;
  exec) shift && "$programs/node" exec -dir "$dir" -- "$@" ;;
  expose | publish) verb=$1 && shift && "$programs/node" "$verb" -dir "$dir" "$@" ;;
  *) sed -n '2,/^set/{/^#/p}' "$0" >&2 && exit 2 ;;
esac
