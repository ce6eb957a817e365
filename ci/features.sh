#!/usr/bin/env bash
# Promise: the library compiles with no feature, with each one alone and with
# all of them; what a feature brings in stays out without it; and no feature
# brings in an async runtime.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

names="$(cargo metadata --no-deps --format-version 1 | python3 -c '
import json, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "batchline":
        print(*sorted(set(package["features"]) - {"default"}), sep="\n")
')"
[[ -n "$names" ]] || { echo "features: cargo metadata names none" >&2; exit 1; }

check() {
    echo "features: ${*:-none}"
    # The tests switch features on by themselves, so the library goes alone first.
    cargo check --quiet -p batchline --lib --no-default-features "$@"
    cargo check --quiet -p batchline --all-targets --no-default-features "$@"
}

check
for feature in $names; do
    check --features "$feature"
done
check --all-features

# absent PATTERN FLAGS...: no crate whose name matches is among the library's
# dependencies, on any of the three systems.
absent() {
    local pattern="$1" target tree found
    shift
    for target in x86_64-unknown-linux-gnu aarch64-apple-darwin x86_64-pc-windows-msvc; do
        tree="$(cargo tree -p batchline -e normal,build --prefix none --format '{p}' \
            --target "$target" "$@")"
        [[ "$tree" == batchline\ * ]] || { echo "features: no tree from 'cargo tree $*'" >&2; exit 1; }
        if found="$(cut -d' ' -f1 <<<"$tree" | grep -Ex "$pattern" | sort -u)"; then
            echo "features: batchline with ${*:-the default features}, for $target, depends on: ${found//$'\n'/, }" >&2
            exit 1
        fi
    done
    echo "features: nothing like '$pattern' with ${*:-the default features}"
}

absent '(wgpu|naga|tracing|cudarc)([-_].*)?' --no-default-features
absent '(tracing|cudarc)([-_].*)?' # default features
absent '(tokio|async-std|smol|async-executor|async-io)([-_].*)?' --all-features
echo "features: ok"
