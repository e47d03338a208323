#!/bin/bash
# All C of ours (the token's shim and the quirk library) and the binding's own
# under AddressSanitizer and UndefinedBehaviorSanitizer, by the token's tests:
# whatever either finds ends the run, also a write beyond a buffer of Go's.
# usage: sanitize.sh [TESTS]
#
# TestEveryCombination is left to make test: three quarters of the time, on the
# lines of C that TestQuirks goes through in the same modes.
#
# libstdc++ is linked in, since SoftHSM throws and the sanitizer must know of
# it first. Leaks are not looked for: Go and the libraries keep memory for good.
set -euo pipefail
cd "$(dirname "$0")/.."
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
export CGO_CFLAGS="$flags -g -O1" CGO_LDFLAGS="$flags -Wl,--no-as-needed -l:libstdc++.so.6" QUIRK_CFLAGS="$flags"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1
go test -asan -count=1 -timeout 20m -run "${1:-.}" -skip '^TestEveryCombination$' ./internal/token
