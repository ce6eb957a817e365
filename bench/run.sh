#!/usr/bin/env bash
# Builds the benchmark in release, runs it, prints tables and writes every figure down.
#
#   bench/run.sh              everything, under ten minutes on two cores: results/host.json
#   bench/run.sh fill peers   these rows only: results/some.json
#   bench/run.sh --quick      tiny sizes, to see that it works; the figures mean nothing:
#                             results/quick.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

out=results/host.json
for argument in "$@"; do
    case "$argument" in
        --quick) out=results/quick.json ;;
        *) [[ "$out" == results/quick.json ]] || out=results/some.json ;;
    esac
done
mkdir -p results
cargo build --release --locked
"${CARGO_TARGET_DIR:-target}/release/batchline-bench" --json "$out" "$@"
echo "every figure: bench/$out"
