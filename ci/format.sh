#!/usr/bin/env bash
# Promise: every file is formatted as rustfmt.toml says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo fmt --all --check
# Not members: fuzzing needs a nightly compiler, the soak stands alone.
cargo fmt --manifest-path fuzz/Cargo.toml --check
cargo fmt --manifest-path soak/Cargo.toml --check
echo "format: ok"
