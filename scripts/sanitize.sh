#!/bin/bash
# The token's C shim and the quirk library under AddressSanitizer. libstdc++ is
# linked in, since SoftHSM throws and the sanitizer must know of it first.
set -euo pipefail
cd "$(dirname "$0")/.."
export CGO_CFLAGS="-fsanitize=address -g" CGO_LDFLAGS="-fsanitize=address -Wl,--no-as-needed -l:libstdc++.so.6"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
go test -asan -count=1 -run 'Contract/softhsm|Quirks|MustNot|PINs|LostLine|Stale|Outlive' ./internal/token
