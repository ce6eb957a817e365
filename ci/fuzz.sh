#!/usr/bin/env bash
# Promise: whatever the bytes are that batchline reads from others, it reads them
# right or refuses them: the targets of fuzz/ compare with plain readings.
#
#   ci/fuzz.sh [SECONDS [TARGET...]]
#
# Runs each target (or those named) for SECONDS (30) from its seeds and from what
# earlier runs kept in target/fuzz/corpus. A finding is written to
# target/fuzz/findings and ends in exit status 1.
#
# It needs a nightly toolchain, a C++ compiler, and cargo-fuzz, which it installs
# into target/fuzz/tools where there is none. It is no step of .ci/run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "fuzz: $*" >&2
    exit 1
}

seconds="${1:-30}"
shift || true
[[ "$seconds" =~ ^[1-9][0-9]*$ ]] || fail "'$seconds' is no number of seconds: ci/fuzz.sh [SECONDS [TARGET...]]"
cargo +nightly --version >/dev/null 2>&1 ||
    fail "there is no nightly toolchain, which libFuzzer's instrumentation needs: rustup toolchain install nightly"
command -v c++ >/dev/null || fail "there is no C++ compiler, which libFuzzer needs: apt install g++"

out="${CARGO_TARGET_DIR:-$PWD/target}"
[[ "$out" == /* ]] || out="$PWD/$out"
out="$out/fuzz"
export CARGO_TARGET_DIR="$out/build"
if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    export PATH="$out/tools/bin:$PATH"
    [[ -x "$out/tools/bin/cargo-fuzz" ]] || cargo install --locked --root "$out/tools" cargo-fuzz
fi

targets=("$@")
if [[ ${#targets[@]} -eq 0 ]]; then
    while read -r target; do targets+=("$target"); done < <(cd fuzz && cargo +nightly fuzz list)
fi
[[ ${#targets[@]} -gt 0 ]] || fail "fuzz/ has no targets"
(cd fuzz && cargo +nightly fuzz build)

# The targets write small files: in memory, where there is such a place.
place=/tmp
[[ ! -w /dev/shm ]] || place=/dev/shm
TMPDIR="$(mktemp -d "$place/batchline-fuzz.XXXXXX")"
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

found=()
mkdir -p "$out/findings"
for target in "${targets[@]}"; do
    folders=("$out/corpus/$target")
    mkdir -p "${folders[0]}"
    [[ ! -d "fuzz/seeds/$target" ]] || folders+=("$PWD/fuzz/seeds/$target")
    echo "fuzz: $target"
    # Inputs are 4 KiB at most, and nothing may ask for much more memory than its file could hold,
    # which is a thousand times its length where it is compressed.
    (cd fuzz && cargo +nightly fuzz run "$target" "${folders[@]}" -- \
        -max_total_time="$seconds" -max_len=4096 -timeout=30 -malloc_limit_mb=32 -rss_limit_mb=2048 \
        -artifact_prefix="$out/findings/$target-" -print_final_stats=1 -print_funcs=0) || found+=("$target")
done
[[ ${#found[@]} -eq 0 ]] || fail "findings in ${found[*]}: see $out/findings"
echo "fuzz: ok: ${targets[*]}, $seconds s each"
