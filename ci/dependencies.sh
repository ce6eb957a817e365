#!/usr/bin/env bash
# Promise: Cargo.lock is up to date, and every dependency comes from crates.io,
# has a licence on the list below and is not a banned crate.
#
# deny.toml holds the same rules for cargo-deny, which runs too if it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

echo "dependencies: crates in more than one version (for information)"
cargo tree --workspace --duplicates --depth 0 --prefix none --locked | sed '/^$/d; s/^/  /' | sort -u

metadata() {
    cargo metadata --locked --all-features --format-version 1 "$@"
}
systems=(x86_64-unknown-linux-gnu aarch64-apple-darwin x86_64-pc-windows-msvc)
platforms=("${systems[@]/#/--filter-platform=}")

# First all that Cargo.lock names, for any platform: licences and sources. Then
# what is compiled on our three, without and with loom: no crate that is banned.
{
    metadata
    metadata "${platforms[@]}"
    RUSTFLAGS="--cfg loom" metadata "${platforms[@]}"
} | python3 -c '
import json, re, sys

ALLOWED = {
    "MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "ISC",
    "Zlib", "Unicode-3.0", "Unlicense", "BSL-1.0", "CC0-1.0", "0BSD",
}
BANNED = {"tokio", "async-std", "cust", "openssl-sys", "zune-jpeg"}


def allowed(expression):
    """Whether an SPDX expression can be met with the allowed licences alone."""
    # "MIT/Apache-2.0" is how old crates write OR.
    words = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))
    at = 0

    def peek():
        return words[at] if at < len(words) else None

    def take():
        nonlocal at
        if at == len(words):
            raise ValueError("it ends too early")
        at += 1
        return words[at - 1]

    def one():
        word = take()
        if word == "(":
            value = either()
            if take() != ")":
                raise ValueError("a bracket is open")
            return value
        if word in (")", "OR", "AND", "WITH"):
            raise ValueError(f"{word} is out of place")
        if peek() == "WITH":
            take()
            word = f"{word} WITH {take()}"
        return word in ALLOWED

    def both():
        value = one()
        while peek() == "AND":
            take()
            value = one() and value
        return value

    def either():
        value = both()
        while peek() == "OR":
            take()
            value = both() or value
        return value

    value = either()
    if peek() is not None:
        raise ValueError(f"{peek()} is out of place")
    return value


for expression, expected in [
    ("MIT", True), ("GPL-3.0", False), ("GPL-3.0 OR MIT", True), ("MIT AND GPL-3.0", False),
    ("MIT/Apache-2.0", True), ("(MIT OR GPL-3.0) AND Unicode-3.0", True),
    ("Apache-2.0 WITH LLVM-exception OR GPL-3.0", True), ("GPL-2.0 WITH LLVM-exception", False),
    ("MIT OR GPL-3.0 AND LGPL-3.0", True), ("(MIT OR Zlib) AND GPL-3.0", False),
]:
    assert allowed(expression) is expected, expression

faults = []
named, *compiled = [json.loads(line) for line in sys.stdin]
if len(compiled) != 2:
    sys.exit("dependencies: cargo metadata did not answer")
own = set(named["workspace_members"])
others = [package for package in named["packages"] if package["id"] not in own]
for package in {package["id"]: package for graph in compiled for package in graph["packages"]}.values():
    if package["name"] in BANNED:
        faults.append(package["name"] + " " + package["version"] + " is banned")
for package in others:
    name = package["name"] + " " + package["version"]
    source = package["source"] or "a folder"
    if not re.fullmatch(r"registry\+\S+/crates\.io-index", source):
        faults.append(f"{name} comes from {source}, not from crates.io")
    licence = package["license"]
    if licence is None:
        faults.append(f"{name} names no licence")
        continue
    try:
        if not allowed(licence):
            faults.append(f"{name} has a licence that is not on the list: {licence}")
    except ValueError as error:
        faults.append(f"{name} has a licence that cannot be read: {licence}: {error}")
for fault in faults:
    print("dependencies:", fault, file=sys.stderr)
print(f"dependencies: {len(others)} crates read, {len(faults)} faults")
sys.exit(1 if faults or not others else 0)
'

if cargo deny --version >/dev/null 2>&1; then
    cargo deny --offline check licenses bans sources
else
    echo "dependencies: cargo-deny is not installed: the rules above stand alone"
fi
echo "dependencies: ok"
