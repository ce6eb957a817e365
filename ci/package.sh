#!/usr/bin/env bash
# Promise: the packages of both crates hold what they must, nothing large and
# nothing else, and compile by themselves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

limit_kib=500 # of a package, compressed: the library's own source, and the CUDA kernels' text

out="${CARGO_TARGET_DIR:-$PWD/target}"
# Named, so that what a package is compiled from finds the dependencies that the tests have built.
export CARGO_TARGET_DIR="$out"

fail() {
    echo "package: $*" >&2
    exit 1
}

# What is not committed yet may be checked too: nothing is published here. Without wgpu, which
# takes longer to build than all the rest; that its files are in the package is seen below.
cargo package -p batchline -p batchline-cli --allow-dirty --quiet --no-default-features \
    --features batchline/formats

for crate in batchline batchline-cli; do
    mapfile -t packages < <(find "$out/package" -maxdepth 1 -name "$crate-[0-9]*.crate")
    [[ ${#packages[@]} -eq 1 ]] || fail "not one package of $crate in $out/package: ${packages[*]:-none}"
    files="$(tar -tzf "${packages[0]}" | cut -d/ -f2-)"
    size=$(($(wc -c <"${packages[0]}") / 1024))
    [[ "$size" -le "$limit_kib" ]] || fail "the package of $crate is $size KiB, more than $limit_kib"
    for needed in Cargo.toml README.md LICENSE-MIT LICENSE-APACHE; do
        grep -qx "$needed" <<<"$files" || fail "the package of $crate lacks $needed"
    done
    sources="$(cd "crates/$crate" && find src -type f)"
    missing="$(grep -vxFf <(echo "$files") <<<"$sources" || true)"
    [[ -z "$missing" ]] || fail "the package of $crate lacks ${missing//$'\n'/ }"
    other="$(grep -vE '^(src/.*|examples/[a-z_]+\.rs|Cargo\.(toml|toml\.orig|lock)|README\.md|LICENSE-(MIT|APACHE)|\.cargo_vcs_info\.json)$' <<<"$files" || true)"
    [[ -z "$other" ]] || fail "the package of $crate has what does not belong there: ${other//$'\n'/ }"
    echo "package: $crate: $(wc -l <<<"$files") files, $size KiB"
done
echo "package: ok"
