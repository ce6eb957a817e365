#!/usr/bin/env bash
# Promise: each file in crates/batchline/examples runs by the line that its
# header gives, ends well, and prints something.
#
# With BATCHLINE_REQUIRE_WGPU set, one that says `skipped` fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

faults=0
fault() {
    echo "examples: $*" >&2
    faults=$((faults + 1))
}

names=()
for file in crates/batchline/examples/*; do
    names+=("$(basename "$file" .rs)")
done
[[ -f "crates/batchline/examples/${names[0]}.rs" ]] || { echo "examples: none found" >&2; exit 1; }

for name in "${names[@]}"; do
    file="crates/batchline/examples/$name.rs"
    # The line that a reader would copy.
    line="$(sed -nE 's|^//! `(cargo run [^`]*)`$|\1|p' "$file")"
    read -ra command <<<"$line"
    if [[ "$line" != "cargo run -p batchline --example $name"* ]]; then
        fault "$file: its header has no line of its own like" \
            "\`cargo run -p batchline --example $name\`"
    elif ! output="$("${command[@]}" --quiet)"; then
        fault "$line: failed; it printed: $output"
    elif [[ -z "${output//[[:space:]]/}" ]]; then
        fault "$line: printed nothing"
    elif [[ -n "${BATCHLINE_REQUIRE_WGPU:-}" && "$output" == *skipped* ]]; then
        fault "$line: BATCHLINE_REQUIRE_WGPU is set, but: $output"
    else
        printf '%s\n%s\n\n' "$line" "$output"
    fi
done

if [[ $faults -gt 0 ]]; then
    echo "examples: $faults faults" >&2
    exit 1
fi
echo "examples: ok, ${#names[@]} ran"
