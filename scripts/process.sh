# Functions for scripts that leave processes running; source it with $state
# set to the folder that holds what is known about them.

# start NAME CMD [ARG...] runs a command in the background, in a session of its
# own, with its output in $state/NAME.log. The process itself leaves its
# number, so that a script killed meanwhile forgets nothing.
start() {
  local name=$1
  shift
  rm -f "$state/$name.pid"
  setsid bash -c 'echo "$$ $(cut -d" " -f22 /proc/$$/stat)" >"$0.new" && mv "$0.new" "$0" && exec "$@"' \
    "$state/$name.pid" "$@" >"$state/$name.log" 2>&1 </dev/null &
  until [[ -s $state/$name.pid ]]; do sleep 0.02; done
}

# running NAME is true while the process that start began lives: its number
# alone could belong to another one by now, so its start time counts too.
running() {
  local pid since
  read -r pid since 2>/dev/null <"$state/$1.pid" || return 1
  [[ $(cut -d' ' -f22 "/proc/$pid/stat" 2>/dev/null) == "$since" ]]
}

# stop NAME ends it, by force after 10 s.
stop() {
  local pid n
  for ((n = 0; n < 100; n++)); do
    running "$1" || break
    read -r pid _ <"$state/$1.pid"
    ((n == 0)) && kill "$pid"
    sleep 0.1
  done
  ! running "$1" || kill -KILL "$pid"
  rm -f "$state/$1.pid"
}

# answers NAME CMD [ARG...] waits until the command succeeds, as long as the
# process NAME lives; at most five minutes, for the slowest machine.
answers() {
  local name=$1 n
  shift
  for ((n = 0; n < 3000; n++)); do
    ! "$@" >/dev/null 2>&1 || return 0
    running "$name" || break
    sleep 0.1
  done
  echo "$name does not answer; the end of $state/$name.log:" >&2
  tail -20 "$state/$name.log" >&2
  return 1
}

# port NAME gives the loopback port of a service: a free one, kept.
port() {
  local f=$state/$1.port p
  if [[ ! -s $f ]]; then
    until p=$((20000 + RANDOM % 12000)) && ! (: <"/dev/tcp/127.0.0.1/$p") 2>/dev/null; do :; done
    echo "$p" >"$f"
  fi
  cat "$f"
}

# registry starts Debian's docker-registry on loopback, unless it runs, and
# sets $registry to its address.
registry() {
  registry=127.0.0.1:$(port registry)
  if ! running registry; then
    cat >"$state/registry.yaml" <<END
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $state/registry}, delete: {enabled: true}}
http: {addr: "$registry", secret: only-one-process}
END
    start registry docker-registry serve "$state/registry.yaml"
  fi
  answers registry curl -fsS "http://$registry/v2/"
}
