#!/usr/bin/env bash
# Promise: nothing is known that keeps the workspace from building with the
# `rust-version` of Cargo.toml: no dependency asks for a newer Rust, and all that
# is used of the standard library was stable by then, in the tests too.
#
# Neither sees the language. A toolchain of that version does, and is used too
# where rustup has one. By hand, the library without wgpu was type-checked with
# its tests by Debian's Rust 1.85: it lacks let chains, `as_chunks`,
# `is_multiple_of`, `cast_signed` and `str::from_utf8`, which came with 1.87 and
# 1.88, and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version="$(cargo metadata --locked --all-features --format-version 1 | python3 -c '
import json, sys

graph = json.load(sys.stdin)
own = set(graph["workspace_members"])


def number(version):
    parts = [int(part) for part in version.split(".")]
    return tuple(parts + [0] * (3 - len(parts)))


ours = {package["rust_version"] for package in graph["packages"] if package["id"] in own}
if len(ours) != 1 or None in ours:
    sys.exit(f"msrv: the packages of the workspace name {ours}; they must name one version")
(ours,) = ours
newer = [
    "{name} {version} needs Rust {rust_version}".format(**package)
    for package in graph["packages"]
    if package["rust_version"] and number(package["rust_version"]) > number(ours)
]
print(*(f"msrv: {fault}, Cargo.toml says {ours}" for fault in newer), sep="\n", file=sys.stderr, end="\n" * bool(newer))
print(ours)
sys.exit(bool(newer))
')"
echo "msrv: no dependency asks for more than $version"

# The lint takes the version from Cargo.toml. Tests count: the README's second command runs them.
settings="$(mktemp -d)"
trap 'rm -rf "$settings"' EXIT
cp clippy.toml "$settings"
echo "check-incompatible-msrv-in-tests = true" >>"$settings/clippy.toml"
CLIPPY_CONF_DIR="$settings" cargo clippy --workspace --all-targets --all-features -- \
    -A warnings -D clippy::incompatible_msrv
echo "msrv: no item of the standard library is newer than $version"

if rustup toolchain list 2>/dev/null | grep -E "^$version(\.|-)" >/dev/null; then
    cargo "+$version" check --workspace --all-targets --all-features
    echo "msrv: it compiles with $version"
else
    echo "msrv: there is no toolchain $version here: the language was not checked"
fi
echo "msrv: ok"
