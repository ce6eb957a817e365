#!/usr/bin/env bash
# Promise: AddressSanitizer sees no fault of memory in the library's tests, and
# nothing leaks but what ci/leaks.txt names.
#
# It needs a nightly toolchain and Linux. It is no step of .ci/run. Arguments go
# to the tests: ci/asan.sh pools::
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "asan: $*" >&2
    exit 1
}

cargo +nightly --version >/dev/null 2>&1 ||
    fail "there is no nightly toolchain, which -Zsanitizer needs: rustup toolchain install nightly"
host="$(rustc +nightly -vV | sed -n 's/^host: //p')"
[[ "$host" == *-linux-gnu ]] || fail "leaks are only looked for on Linux with glibc, this is $host"
runtime="$(rustc +nightly --print target-libdir --target "$host")"
compgen -G "$runtime/*asan*" >/dev/null || fail "the nightly toolchain has no AddressSanitizer for $host"

out="${CARGO_TARGET_DIR:-$PWD/target}"
export CARGO_TARGET_DIR="$out/asan"
# Naming the target keeps the sanitizer out of build scripts and macros.
export RUSTFLAGS="-Zsanitizer=address"
export ASAN_OPTIONS="detect_leaks=1:detect_stack_use_after_return=1"
export LSAN_OPTIONS="suppressions=$PWD/ci/leaks.txt:print_suppressions=0"
# The symbolizer is llvm's; without it a report has addresses only, and leaks can't be told apart.
command -v llvm-symbolizer >/dev/null || fail "there is no llvm-symbolizer: apt install llvm"
cargo +nightly test -p batchline --no-default-features --features formats \
    --lib --tests --no-fail-fast --target "$host" -- "$@"
echo "asan: ok"
