#!/usr/bin/env bash
# Soaks the loader: run.sh [SAMPLES [SEED]], 10,000,000 samples from seed 0 on
# unless told otherwise. Writes results/soak.csv and results/soak.svg; the exit
# status is 1 if a round failed or something grew.
#
# SOAK_FEATURES=wgpu soaks the wgpu device too. On an NVIDIA GPU ci/gpu.sh soaks
# the CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Threads come and go by the hundred thousand. With an arena of glibc's for each
# few of them, resident memory would tell how those fill up and nothing else.
export MALLOC_ARENA_MAX=1

samples="${1:-10000000}" seed="${2:-0}"
mkdir -p results
cargo build --release --features "${SOAK_FEATURES:-}"
outcome=0
"${CARGO_TARGET_DIR:-target}/release/soak" --samples "$samples" --seed "$seed" --csv results/soak.csv ||
    outcome=$?
# Also of a run that failed: it shows what grew.
python3 plot.py results/soak.csv results/soak.svg
exit "$outcome"
