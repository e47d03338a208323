#!/bin/bash
# The main job from nothing to a wrapped key, on real parts: an archive, a
# registry, a KMS over a SoftHSM token, a service with a key of its own. Run it
# again at any time: it goes on from what is there.
# The KMS is embedded, unless CLUSTER=local (the cluster of scripts/cluster is
# started) or KUBECONFIG names a cluster; REGISTRY is then one that its nodes
# can pull from, unless it is the local one.
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
state=$PWD/.cache/demo
rel=.cache/demo
mkdir -p "$state"
. scripts/process.sh
kmsctl=$PWD/bin/kmsctl

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
  made_by=$(sha256sum bin/kmsctl bin/kms-connector)
  if [[ ! -s $archive || $(cat "$archive.made-by" 2>/dev/null) != "$made_by" ]]; then
    quiet archive "$kmsctl" archive build --output-file "$archive"
    echo "$made_by" >"$archive.made-by"
  fi
  say archive "$rel/${archive##*/}, $(du -h "$archive" | cut -f1), $(tar -tzf "$archive" | grep -c '^images/') images and the chart"
}

render() {
  [[ -s $state/pin ]] || keep "$state/pin" bash -c 'printf %s "$(head -c 15 /dev/urandom | base64)"'
  quiet secret "$kmsctl" render secret --model softhsm --hsm-password-file "$state/pin" --plain --output-file "$state/hsm-Secret.yaml"
  quiet overrides "$kmsctl" render overrides --model softhsm --plain --output-file "$state/overrides_hsm.yaml" "$@"
  say render "$rel/hsm-Secret.yaml and overrides_hsm.yaml, for SoftHSM"
}

serve() {
  server=https://127.0.0.1:$(port kms)
  ca=$state/data/tls/ca.pem
  admin=(--data "$state/data")
  [[ ! $kmsctl -nt $state/kms.pid ]] || stop kms # another program by now
  running kms || start kms "$kmsctl" serve --data "$state/data" --listen "${server#https://}" \
    --secret "$state/hsm-Secret.yaml" --values "$state/overrides_hsm.yaml"
  answers kms curl -fsS --cacert "$ca" "$server/readyz"
  say serve "the KMS answers at $server"
}

# onboard makes the service and keeps its API key, which is shown only once. A
# run that was cut off in between leaves a service without a known key: the
# next one takes another name.
onboard() {
  local name=orders n=1
  until [[ -s $state/service.json ]]; do
    if ! keep "$state/service.json" "$kmsctl" onboard "$name" "${admin[@]}" -o json 2>"$state/onboard.log"; then
      grep -q exists "$state/onboard.log" || { cat "$state/onboard.log" >&2; exit 1; }
      name=orders-$((++n))
    fi
  done
  instance=$(field instanceId "$state/service.json")
  key=$(field keyId "$state/service.json")
  [[ -s $state/service.key ]] || keep "$state/service.key" field apiKey "$state/service.json"
  say onboard "service $(field serviceId "$state/service.json") may use root key $key, and no other"
}

standard_key() {
  [[ -s $state/standard.json ]] || keep "$state/standard.json" "$kmsctl" keys create report --standard --instance "$instance" "${admin[@]}" -o json
  other=$(field id "$state/standard.json")
  say keys "the administrator's standard key $other beside it"
}

# use wraps and unwraps as the service, by its own API key.
use() {
  client=(--server "$server" --ca-file "$ca" --api-key-file "$state/service.key" --instance "$instance")
  head -c 32 /dev/urandom >"$state/dek"
  keep "$state/wrapped.json" "$kmsctl" keys wrap "$key" --plaintext-file "$state/dek" --aad table=orders "${client[@]}" -o json
  field ciphertext "$state/wrapped.json" >"$state/dek.wrapped"
  "$kmsctl" keys unwrap "$key" --ciphertext-file "$state/dek.wrapped" --aad table=orders "${client[@]}" -o json >"$state/unwrapped.json"
  [[ $(field plaintext "$state/unwrapped.json") == "$(base64 -w0 "$state/dek")" ]] || { echo "demo: the unwrapped DEK differs" >&2; exit 1; }
  say wrap "a DEK of 32 bytes became $(wc -c <"$state/dek.wrapped") bytes of ciphertext"
  say unwrap "and is the same again"
}

refused() {
  local code=0
  "$kmsctl" keys get "$other" "${client[@]}" >"$state/refused.log" 2>&1 || code=$?
  ((code == 4)) || { cat "$state/refused.log" >&2; echo "demo: the service got at another key (exit $code)" >&2; exit 1; }
  say refused "the service on the other key: $(grep -o 'server answered.*' "$state/refused.log" | head -1)"
}

audited() {
  "$kmsctl" audit verify --data "$state/data" -o json >"$state/audit.json"
  local refusal
  refusal=$(sed -n 's/.*"action":"\([^"]*\)".*"status":403,"principal":"\([^"]*\)".*/\1 by \2: 403/p' "$state/data/audit/audit.log" | tail -n 1)
  say audit "$(sed -n 's/.*"events": *\([0-9]*\).*/\1/p' "$state/audit.json") events, the chain is whole; the refused one: $refusal"
}

build_archive
registry
say registry "Debian's docker-registry at $registry"
quiet load "$kmsctl" load "$archive" --registry "$registry" --repo "$state/charts"
say load "images to $registry, the chart to $rel/charts"
render
serve
onboard
standard_key
use
refused
audited
cat <<END

Everything is running. As the service "orders":
  export KMSCTL_SERVER=$server KMSCTL_CA_FILE=$ca
  export KMSCTL_API_KEY=\$(cat $state/service.key) KMSCTL_INSTANCE=$instance
  bin/kmsctl keys wrap $key
As the administrator:  bin/kmsctl keys list --instance $instance ${admin[*]}
To stop:               make demo-stop
END
