#!/usr/bin/env bash
# Promise: the workspace compiles for macOS on ARM and for Windows (type check
# only; nothing is linked or run).
#
# The target's standard library comes from the first of these that is there:
#   1. the active toolchain, where `rustup target add TARGET` was run before;
#   2. `rustup target add`, only with TARGETS_RUSTUP_ADD=1, as it changes the
#      toolchain of whoever runs this;
#   3. Debian's rustc-web and rust-web-src packages, unpacked (not installed)
#      into target/targets-std and built with cargo's build-std.
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

# The names that package $1 depends on and that match $2.
depends() {
    apt-cache depends "$1" | awk '$1 == "Depends:" { print $2 }' | grep -E "$2" || true
}

unpack_debian() {
    [[ -f "$unpacked/ready" ]] && "$unpacked/rustc.sh" --version >/dev/null 2>&1 && return

    local hint="install it with 'rustup target add ${targets[*]}'"
    if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
        fail "the standard library for ${targets[*]} is missing and this is no Debian system: $hint"
    fi
    if ! apt-cache show rust-web-src >/dev/null 2>&1; then
        apt-get update -qq || true
        apt-cache show rust-web-src >/dev/null 2>&1 ||
            fail "the standard library is missing and apt has no rust-web-src package: $hint"
    fi

    local std llvm packages package version
    std="$(depends libstd-rust-web-dev '^libstd-rust-web-[0-9]')"
    llvm="$(depends "$std" '^libllvm[0-9]+$')"
    [[ -n "$std" && -n "$llvm" ]] || fail "apt does not say what rustc-web needs: $hint"
    packages=(rustc-web rust-web-src libstd-rust-web-dev "$std")
    # Of LLVM and the libraries below it, only those the system lacks.
    while read -r package; do
        dpkg -s "$package" >/dev/null 2>&1 || packages+=("$package")
    done < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances "$llvm" | grep -E '^[a-z0-9]')

    rm -rf "$unpacked"
    mkdir -p "$unpacked/debs" "$unpacked/root"
    echo "targets: unpacking ${packages[*]}"
    # What did not come is named below.
    (cd "$unpacked/debs" && apt-get download -qq "${packages[@]}") || true
    for package in "${packages[@]}"; do
        compgen -G "$unpacked/debs/${package}_*.deb" >/dev/null ||
            fail "apt could not download $package: $hint"
    done
    for package in "$unpacked"/debs/*.deb; do
        dpkg -x "$package" "$unpacked/root"
    done
    rm -rf "$unpacked/debs"
    # Of the sources only the library is needed: keep the cache small.
    find "$unpacked"/root/usr/src/rustc-* -mindepth 1 -maxdepth 1 ! -name library -exec rm -rf {} +

    cat >"$unpacked/rustc.sh" <<'EOF'
#!/usr/bin/env bash
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/root/usr"
for folder in "$root"/lib/*-linux-gnu "$root"/lib/llvm-*/lib "$root"/lib; do
    LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
done
export LD_LIBRARY_PATH
exec "$root/bin/rustc" "$@"
EOF
    chmod +x "$unpacked/rustc.sh"
    version="$("$unpacked/rustc.sh" --version)" || fail "the unpacked Debian compiler does not start: $hint"
    echo "$version" >"$unpacked/ready"
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
    unpack_debian
    echo "targets: $target, with Debian's $(cat "$unpacked/ready")"
    RUSTC="$unpacked/rustc.sh" RUSTC_BOOTSTRAP=1 \
        cargo check --workspace -Zbuild-std=std,panic_abort --target "$target"
done
echo "targets: ok: ${targets[*]}"
