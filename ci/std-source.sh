#!/usr/bin/env bash
# Unpacks into the folder $1 what building Rust's standard library takes: its
# sources, and a compiler of the same version, from Debian's packages
# rust-web-src and rustc-web, which are not installed. $1/rustc.sh runs the
# compiler, $1/ready holds its version. Nothing is done where they are there.
# ci/targets.sh and ci/tsan.sh call it.
set -euo pipefail

unpacked="$1"

fail() {
    echo "std-source: $*" >&2
    exit 1
}

# The names that package $1 depends on and that match $2.
depends() {
    apt-cache depends "$1" | awk '$1 == "Depends:" { print $2 }' | grep -E "$2" || true
}

if [[ -f "$unpacked/ready" ]] && "$unpacked/rustc.sh" --version >/dev/null 2>&1; then
    exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    fail "this is no Debian system"
fi
if ! apt-cache show rust-web-src >/dev/null 2>&1; then
    apt-get update -qq || true
    apt-cache show rust-web-src >/dev/null 2>&1 || fail "apt has no rust-web-src package"
fi

std="$(depends libstd-rust-web-dev '^libstd-rust-web-[0-9]')"
llvm="$(depends "$std" '^libllvm[0-9]+$')"
[[ -n "$std" && -n "$llvm" ]] || fail "apt does not say what rustc-web needs"
packages=(rustc-web rust-web-src libstd-rust-web-dev "$std")
# Of LLVM and the libraries below it, only those the system lacks.
while read -r package; do
    dpkg -s "$package" >/dev/null 2>&1 || packages+=("$package")
done < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
    --no-breaks --no-replaces --no-enhances "$llvm" | grep -E '^[a-z0-9]')

rm -rf "$unpacked"
mkdir -p "$unpacked/debs" "$unpacked/root"
echo "std-source: unpacking ${packages[*]}"
# What did not come is named below.
(cd "$unpacked/debs" && apt-get download -qq "${packages[@]}") || true
for package in "${packages[@]}"; do
    compgen -G "$unpacked/debs/${package}_*.deb" >/dev/null || fail "apt could not download $package"
done
for package in "$unpacked"/debs/*.deb; do
    dpkg -x "$package" "$unpacked/root"
done
rm -rf "$unpacked/debs"
# Of the sources only the library is needed: keep the cache small.
find "$unpacked"/root/usr/src/rustc-* -mindepth 1 -maxdepth 1 ! -name library -exec rm -rf {} +

cat >"$unpacked/rustc.sh" <<'WRAPPER'
#!/usr/bin/env bash
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/root/usr"
for folder in "$root"/lib/*-linux-gnu "$root"/lib/llvm-*/lib "$root"/lib; do
    LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
done
export LD_LIBRARY_PATH
exec "$root/bin/rustc" "$@"
WRAPPER
chmod +x "$unpacked/rustc.sh"
version="$("$unpacked/rustc.sh" --version)" || fail "the unpacked compiler does not start"
echo "$version" >"$unpacked/ready"
