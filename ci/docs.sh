#!/usr/bin/env bash
# Promise: the documentation builds without a warning and no link in it is
# broken, for users (public items) and for contributors (private items too).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export RUSTDOCFLAGS="-D warnings"
cargo doc --workspace --no-deps --all-features
cargo doc --workspace --no-deps --all-features --document-private-items
echo "docs: ok"
