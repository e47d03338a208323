#!/bin/bash
# The main job from nothing to a wrapped key, on real parts: an archive, a
# registry, a KMS over a SoftHSM token, a service with a key of its own. Run it
# again at any time: it goes on from what is there.
# The KMS is embedded. With CLUSTER=local it runs in the cluster that
# scripts/cluster starts; with KUBECONFIG in that cluster, whose nodes must be
# able to pull from the registry: REGISTRY names one, if not the local one.
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
rel=.cache/demo
state=$PWD/$rel
mkdir -p "$state"
. scripts/process.sh
kmsctl=$PWD/bin/kmsctl
cluster=scripts/cluster/cluster.sh
ns=kube-system

say() { printf 'demo: %-9s %s\n' "$1" "$2"; }
field() { sed -n 's/.*"'"$1"'": *"\([^"]*\)".*/\1/p' "$2" | head -1; }
# quiet NAME CMD... keeps a command's output in NAME.log and shows it only when it fails.
quiet() {
  local log=$state/$1.log
  shift
  "$@" >"$log" 2>&1 || { cat "$log" >&2; return 1; }
}
# keep FILE CMD... keeps a command's output only when it succeeds.
keep() {
  local file=$1
  shift
  "$@" >"$file.new" && mv "$file.new" "$file"
}

build_archive() {
  archive=$state/key-management-hsm-amd64.tar.gz
  # The build is reproducible, so an archive of these very programs is as good as a new one.
  local made_by
  made_by=$(sha256sum bin/kmsctl bin/kms-server bin/kms-connector)
  if [[ ! -s $archive || $(cat "$archive.made-by" 2>/dev/null) != "$made_by" ]]; then
    quiet archive "$kmsctl" archive build --output-file "$archive"
    echo "$made_by" >"$archive.made-by"
  fi
  say archive "$rel/${archive##*/}, $(du -h "$archive" | cut -f1), $(tar -tzf "$archive" | grep -c '^images/') images and the chart"
}

load() {
  if [[ -n ${REGISTRY:-} ]]; then
    registry=$REGISTRY
  else
    registry
    say registry "Debian's docker-registry at $registry"
  fi
  quiet load "$kmsctl" load "$archive" --registry "$registry" --repo "$state/charts"
  say load "images to $registry, the chart to $rel/charts: $(tail -n 1 "$state/load.log" | xargs)"
}

render() {
  [[ -s $state/pin ]] || keep "$state/pin" bash -c 'printf %s "$(head -c 15 /dev/urandom | base64)"'
  quiet secret "$kmsctl" render secret --model softhsm --hsm-password-file "$state/pin" --plain --output-file "$state/hsm-Secret.yaml"
  quiet overrides "$kmsctl" render overrides --model softhsm --plain --output-file "$state/overrides_hsm.yaml"
  say render "$rel/hsm-Secret.yaml and overrides_hsm.yaml, for SoftHSM"
}

serve() {
  site=$state/embedded
  server=https://127.0.0.1:$(port kms)
  ca=$site/data/tls/ca.pem
  admin=(--data "$site/data")
  mkdir -p "$site"
  [[ ! $kmsctl -nt $state/kms.pid ]] || stop kms # another program by now
  running kms || start kms "$kmsctl" serve --data "$site/data" --listen "${server#https://}" \
    --secret "$state/hsm-Secret.yaml" --values "$state/overrides_hsm.yaml"
  answers kms curl -fsS --cacert "$ca" "$server/readyz"
  say serve "the KMS answers at $server"
}

# use_cluster finds or starts the cluster. What the demo knows about a KMS
# there is of no use without it, so for the local cluster it lies in its folder.
use_cluster() {
  if [[ $1 == local ]]; then
    touch "$state/cluster-started" # before it is, for demo-stop
    "$cluster" build # says so when it takes long
    quiet cluster "$cluster" up
    eval "$("$cluster" env)"
    [[ -n ${REGISTRY:-} ]] || "$cluster" expose "${registry##*:}"
    site=$(dirname "$KUBECONFIG")/demo
  else
    site=$state/cluster-$(cksum <"$KUBECONFIG" | cut -d' ' -f1)
  fi
  command -v kubectl >/dev/null || { echo "demo: a cluster needs kubectl in PATH" >&2; exit 1; }
  mkdir -p "$site"
  say cluster "$(kubectl get nodes --no-headers | awk '{print $1, $2, $5}' | paste -sd, -) ($KUBECONFIG)"
}

install() {
  local release=key-management-hsm
  # A key whose hash did not get there is of no use.
  kubectl -n $ns get secret $release-admin-key-hash >/dev/null 2>&1 || rm -f "$site/admin.key"
  quiet install "$kmsctl" install --repo "$state/charts" --secret "$state/hsm-Secret.yaml" --values "$state/overrides_hsm.yaml" \
    --admin-key-file "$site/admin.key" --repair
  # What is known about another installation's service is of no use either.
  local uid
  uid=$(kubectl -n $ns get secret $release-admin-key-hash -o 'jsonpath={.metadata.uid}')
  if [[ $(cat "$site/uid" 2>/dev/null) != "$uid" ]]; then
    rm -f "$site"/*.json "$site/service.key"
    echo "$uid" >"$site/uid"
  fi
  say install "release $release in $ns: $(kubectl -n $ns get pods -l app.kubernetes.io/instance=$release --no-headers | awk '{print $1, $2, $3}' | paste -sd, - | sed 's/,/, /g')"
  server=https://127.0.0.1:$(port forward)
  ca=$site/ca.pem
  keep "$ca" bash -c "kubectl -n $ns get secret $release-api-tls -o 'jsonpath={.data.ca\.crt}' | base64 -d"
  admin=(--server "$server" --ca-file "$ca" --api-key-file "$site/admin.key")
  stop forward # it may lead to another pod or cluster
  start forward kubectl -n $ns port-forward service/kms-api "${server##*:}:28674"
  answers forward curl -fsS --cacert "$ca" "$server/readyz"
  say forward "the KMS answers at $server"
}

# onboard makes the service and keeps its API key, which is shown only once. A
# run that was cut off in between leaves a service without a known key: the
# next one takes another name.
onboard() {
  local name=orders n=1
  until [[ -s $site/service.json ]]; do
    if ! keep "$site/service.json" "$kmsctl" onboard "$name" "${admin[@]}" -o json 2>"$state/onboard.log"; then
      grep -q exists "$state/onboard.log" || { cat "$state/onboard.log" >&2; exit 1; }
      name=orders-$((++n))
    fi
  done
  instance=$(field instanceId "$site/service.json")
  key=$(field keyId "$site/service.json")
  [[ -s $site/service.key ]] || keep "$site/service.key" field apiKey "$site/service.json"
  say onboard "service $(field serviceId "$site/service.json") may use root key $key, and no other"
}

standard_key() {
  [[ -s $site/standard.json ]] || keep "$site/standard.json" "$kmsctl" keys create report --standard --instance "$instance" "${admin[@]}" -o json
  other=$(field id "$site/standard.json")
  say keys "the administrator's standard key $other beside it"
}

# use wraps and unwraps as the service, by its own API key.
use() {
  client=(--server "$server" --ca-file "$ca" --api-key-file "$site/service.key" --instance "$instance")
  head -c 32 /dev/urandom >"$site/dek"
  keep "$site/wrapped.json" "$kmsctl" keys wrap "$key" --plaintext-file "$site/dek" --aad table=orders "${client[@]}" -o json
  field ciphertext "$site/wrapped.json" >"$site/dek.wrapped"
  keep "$site/unwrapped.json" "$kmsctl" keys unwrap "$key" --ciphertext-file "$site/dek.wrapped" --aad table=orders "${client[@]}" -o json
  [[ $(field plaintext "$site/unwrapped.json") == "$(base64 -w0 "$site/dek")" ]] || { echo "demo: the unwrapped DEK differs" >&2; exit 1; }
  say wrap "a DEK of 32 bytes became $(wc -c <"$site/dek.wrapped") bytes of ciphertext"
  say unwrap "and is the same again"
}

refused() {
  local code=0
  "$kmsctl" keys get "$other" "${client[@]}" >"$state/refused.log" 2>&1 || code=$?
  ((code == 4)) || { cat "$state/refused.log" >&2; echo "demo: the service got at another key (exit $code)" >&2; exit 1; }
  say refused "the service on the other key: $(grep -o 'server answered.*' "$state/refused.log" | head -1)"
}

# audited checks the log's chain, embedded or in the pod, and shows the refused call's line.
audited() {
  local log=$site/data/audit/audit.log refusal=
  if [[ -s $log ]]; then
    keep "$site/audit.json" "$kmsctl" audit verify --data "$site/data" -o json
    refusal="; the last refusal: $(sed -n 's/.*"action":"\([^"]*\)".*"status":403,"principal":"\([^"]*\)".*/\1 by \2/p' "$log" | tail -n 1)"
  else
    local pod=key-management-hsm-oss-0
    keep "$site/audit.json" kubectl -n $ns exec $pod -c oss -- /kms-server audit verify --log /audit/$pod/audit.log -o json
  fi
  say audit "$(sed -n 's/.*"events": *\([0-9]*\).*/\1/p' "$site/audit.json") events, the chain is whole$refusal"
}

build_archive
load
render
case ${CLUSTER:-}:${KUBECONFIG:-} in
  local:*)
    use_cluster local
    install
    ;;
  :?*)
    use_cluster given
    install
    ;;
  :) serve ;;
  *) echo "demo: CLUSTER=$CLUSTER is not known: local, or KUBECONFIG for another one" >&2 && exit 2 ;;
esac
onboard
standard_key
use
refused
audited
cat <<END

Everything is running. As the service "orders":
  export KMSCTL_SERVER=$server KMSCTL_CA_FILE=$ca
  export KMSCTL_API_KEY=\$(cat $site/service.key) KMSCTL_INSTANCE=$instance
  bin/kmsctl keys wrap $key
As the administrator:
  bin/kmsctl keys list --instance $instance ${admin[*]}
END
[[ ${CLUSTER:-} != local ]] || printf 'In the cluster:\n  %s\n  kubectl get pods -A\n' "$("$cluster" env)"
echo "To stop: make demo-stop"
