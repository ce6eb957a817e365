#!/usr/bin/env bash
# Promise: no compiler or Clippy warning in any library, program or test, with
# the default features and with all of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo clippy --workspace --all-targets -- -D warnings
cargo clippy --workspace --all-targets --all-features -- -D warnings
cargo clippy --manifest-path soak/Cargo.toml --locked --all-targets -- -D warnings
echo "clippy: ok"
