#!/bin/bash
# usage: bench-load.sh [SCALE] [WORK-FOLDER]
# What loading an archive costs, beside the tools that others use, all sides in
# one run into Debian's docker-registry on loopback; medians of RUNS (5). At
# scale 1 the archive is six docker-save images, 632 MB raw, 347 MB as tar.gz.
# Checks the limits that we set ourselves and fails when one is broken; on a
# shared machine read CPU seconds and ratios, not wall time.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/deps.sh docker-registry skopeo openssl
scale=${1:-1}
work=${2:-$(mktemp -d)}
runs=${RUNS:-5}
[[ -n ${2:-} ]] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bin" "$work/tmp" "$work/home"
(cd scripts/bench && go build -o "$work/bin/" ./gen ./measure)
go build -o "$work/bin/crane" github.com/google/go-containerregistry/cmd/crane
kmsctl=$PWD/bin/kmsctl
export TMPDIR=$work/tmp HOME=$work/home XDG_STATE_HOME=$work/home/state

archive=$work/gen/key-management-hsm-amd64.tar.gz
[[ -f $archive ]] || "$work/bin/gen" -out "$work/gen" -scale "$scale" -keep
own=$work/own.tar.gz
[[ -f $own ]] || "$kmsctl" archive repack "$archive" --output-file "$own" >/dev/null
names=(kms-oss kms-onboarding kms-gemaltov6 kms-thalesv12 kms-softhsm kms-oss-watcher)
for n in "${names[@]}"; do
  [[ -d $work/oci/$n ]] || { mkdir -p "$work/oci" && skopeo copy -q --insecure-policy "docker-archive:$work/gen/images/$n.tar" "oci:$work/oci/$n:3.4.0"; }
done

cat >"$work/registry.yml" <<END
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $work/blobs}}
http: {addr: 127.0.0.1:0}
END
docker-registry serve <(sed 's/level: error/level: info/' "$work/registry.yml") 2>"$work/registry.log" &
registry=$!
trap 'kill $registry; wait $registry 2>/dev/null || true; [[ -n ${2:-} ]] || rm -rf "$work"' EXIT
until host=$(grep -o 'listening on 127[0-9.:]*' "$work/registry.log" | cut -d' ' -f3) && [[ -n $host ]]; do
  kill -0 $registry || { cat "$work/registry.log" >&2; exit 1; }
  read -rt 0.1 <> <(:) || true
done

each() { # each FILE COMMAND: a script that runs COMMAND for every image, $i its name
  printf 'for i in %s; do %s || exit 1; done\n' "${names[*]}" "$2" >"$work/$1"
}
each skopeo.sh "skopeo copy -q --insecure-policy --dest-tls-verify=false docker-archive:$TMPDIR/x/images/\$i.tar docker://$host/skopeo/\$i:3.4.0"
each crane.sh "$work/bin/crane push --insecure $TMPDIR/x/images/\$i.tar $host/crane/\$i:3.4.0 >/dev/null"
each crane-oci.sh "$work/bin/crane push --insecure $work/oci/\$i $host/craneoci/\$i:3.4.0 >/dev/null"
unpack="rm -rf $TMPDIR/x && mkdir $TMPDIR/x && tar -xzf $archive -C $TMPDIR/x"
# The registry keeps nothing in memory: emptying its folder is emptying it.
empty="rm -rf $work/blobs/docker $XDG_STATE_HOME $work/home/.local /var/lib/containers/cache/blob-info-cache-v1.boltdb $TMPDIR/x"
lost="rm -rf $XDG_STATE_HOME"

row() { # row NAME BEFORE COMMAND...: measures, prints and keeps a line
  local name=$1 before=$2
  shift 2
  "$work/bin/measure" -n "$runs" -watch "$TMPDIR,/var/tmp" -before "$before" -label "$name" -- "$@" | tee -a "$work/rows"
}
: >"$work/rows"
row tar+skopeo "$empty" bash -c "$unpack && sh $work/skopeo.sh"
row tar+crane "$empty" bash -c "$unpack && sh $work/crane.sh"
row crane-oci "$empty" sh "$work/crane-oci.sh"
load=("$kmsctl" load)
row foreign-first "$empty" "${load[@]}" "$archive" --registry "$host/k" --repo "$work/charts"
row foreign-again "$lost" "${load[@]}" "$archive" --registry "$host/k" --repo "$work/charts"
row own-first "$empty" "${load[@]}" "$own" --registry "$host/o" --repo "$work/charts"
row own-again "$lost" "${load[@]}" "$own" --registry "$host/o" --repo "$work/charts"
# openssl, since coreutils does not use the processor's SHA instructions.
row sha256 true openssl dgst -sha256 "$archive"

field() { # field NAME wall|cpu|rss|disk: the median
  awk -v n="$1" -v f="$2" '$1 == n { for (i = 1; i <= NF; i++) if ($i == f) { split($(i + 1), v, "/"); print v[2]; exit } }' "$work/rows"
}
broken=0
limit() { # limit WHAT VALUE OP LIMIT
  local ok
  ok=$(awk -v a="$2" -v b="$3" 'BEGIN { print (a <= b) ? "ok" : "BROKEN" }')
  printf '%-72s %8.2f  limit %8.2f  %s\n' "$1" "$2" "$3" "$ok"
  [[ $ok == ok ]] || broken=1
}
times() { awk -v a="$1" -v b="$2" 'BEGIN { print a * b }'; }
echo
limit "foreign, first: CPU s, at most 0.6 of tar+skopeo" "$(field foreign-first cpu)" "$(times 0.6 "$(field tar+skopeo cpu)")"
limit "foreign, first: CPU s, at most 0.33 of tar+crane" "$(field foreign-first cpu)" "$(times 0.33 "$(field tar+crane cpu)")"
limit "foreign, first: temporary disk, MB" "$(field foreign-first disk)" 0.1
limit "own, first: CPU s, at most 1.2 of crane from OCI layouts" "$(field own-first cpu)" "$(times 1.2 "$(field crane-oci cpu)")"
limit "own, first: wall s, at most 1.2 of crane from OCI layouts" "$(field own-first wall)" "$(times 1.2 "$(field crane-oci wall)")"
limit "own, again: CPU s" "$(field own-again cpu)" 0.3
limit "foreign, again, no local state: CPU s, at most 1.1 of one SHA-256" "$(field foreign-again cpu)" "$(times 1.1 "$(field sha256 cpu)")"
limit "foreign, first: peak memory, MiB" "$(field foreign-first rss)" 128
limit "own, first: peak memory, MiB" "$(field own-first rss)" 128
awk -v a="$(field foreign-first wall)" -v b="$(field tar+skopeo wall)" -v c="$(field tar+crane wall)" \
  'BEGIN { printf "foreign, first: wall is %.2f of the better of the two\n", a / (b < c ? b : c) }'
exit $broken
