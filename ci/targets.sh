#!/usr/bin/env bash
# Promise: the workspace compiles for macOS on ARM and for Windows (type check
# only; nothing is linked or run).
#
# The target's standard library comes from the first of these that is there:
#   1. the active toolchain, where `rustup target add TARGET` was run before;
#   2. `rustup target add`, only with TARGETS_RUSTUP_ADD=1, as it changes the
#      toolchain of whoever runs this;
#   3. Debian's sources, unpacked by ci/std-source.sh into target/targets-std and
#      built with cargo's build-std.
# TARGETS_STD=debian goes straight to 3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

targets=(aarch64-apple-darwin x86_64-pc-windows-msvc)
out="${CARGO_TARGET_DIR:-$PWD/target}"
unpacked="$out/targets-std"
# A folder of its own: the Debian compiler must not invalidate other builds.
export CARGO_TARGET_DIR="$out/targets"

fail() {
    echo "targets: $*" >&2
    exit 1
}

installed() {
    local folder
    folder="$(rustc --print target-libdir --target "$1" 2>/dev/null)" || return 1
    compgen -G "$folder/libstd-*.rlib" >/dev/null
}

for target in "${targets[@]}"; do
    if [[ "${TARGETS_STD:-}" != debian ]]; then
        if ! installed "$target" && [[ "${TARGETS_RUSTUP_ADD:-}" == 1 ]]; then
            rustup target add "$target" || true
        fi
        if installed "$target"; then
            echo "targets: $target, with the active toolchain"
            cargo check --workspace --target "$target"
            continue
        fi
    fi
    bash ci/std-source.sh "$unpacked" ||
        fail "the standard library for ${targets[*]} is missing: install it with 'rustup target add ${targets[*]}'"
    echo "targets: $target, with Debian's $(cat "$unpacked/ready")"
    RUSTC="$unpacked/rustc.sh" RUSTC_BOOTSTRAP=1 \
        cargo check --workspace -Zbuild-std=std,panic_abort --target "$target"
done
echo "targets: ok: ${targets[*]}"
