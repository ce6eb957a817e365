#!/usr/bin/env bash
# Promise: the hand-over between the loader's threads is right in every order
# of their steps that loom can reach. The tests' names begin with `loom_`.
#
# LOOM_MAX_PREEMPTIONS bounds the search (3 when unset; more takes longer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-3}"
export RUSTFLAGS="--cfg loom"
# A folder of its own: the flag must not invalidate other builds.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}/loom"

mkdir -p "$CARGO_TARGET_DIR"
log="$CARGO_TARGET_DIR/loom.log"
cargo test -p batchline --release --no-default-features --lib loom_ 2>&1 | tee "$log"
if ! grep -Eq '^test result: ok\. [1-9][0-9]* passed' "$log"; then
    echo "loom: no test ran" >&2
    exit 1
fi
echo "loom: ok, at most $LOOM_MAX_PREEMPTIONS preemptions"
