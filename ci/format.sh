#!/usr/bin/env bash
# Promise: every file is formatted as rustfmt.toml says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo fmt --all --check
# Not a member: fuzzing needs a nightly compiler.
cargo fmt --manifest-path fuzz/Cargo.toml --check
echo "format: ok"
