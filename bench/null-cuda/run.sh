#!/usr/bin/env bash
# What the host does per batch on each path to a CUDA device, without a GPU: on a driver that does
# nothing but keep time (null.c). Medians of five runs, in turn.
#
#   bench/null-cuda/run.sh [BATCHLINE...]    other builds of the command to compare; the one in
#                                            target/release unless named
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
# The parameters are those of the driver's documentation, used or not.
cc -O2 -shared -fPIC -Wno-unused-parameter bench/null-cuda/null.c -o "$folder/libcuda.so.1"
# Digits of 1x28x28; what is in them is of no matter, as nothing is copied.
head -c $((200000 * 784)) /dev/zero >"$folder/digits"
builds=("$@")
if [[ ${#builds[@]} -eq 0 ]]; then
    cargo build --release -q -p batchline-cli
    builds=("${CARGO_TARGET_DIR:-target}/release/batchline")
fi
LD_LIBRARY_PATH="$folder" python3 - "$folder/digits" "${builds[@]}" <<'PYTHON'
import json, statistics, subprocess, sys

digits, builds = sys.argv[1], sys.argv[2:]
ROWS = [
    ("staged", 256, 10, ["--gather", "never"]),
    ("gathered", 256, 20, []),
    ("resident, to f32", 256, 20, ["--resident", "--convert", "f32"]),
    ("resident, to f32", 4096, 100, ["--resident", "--convert", "f32"]),
]
print(f"{'path':18} {'batch':>6} {'workers':>8}  us per batch (least to largest)   waits for room   build")
for path, batch, epochs, more in ROWS:
    for workers in [1, 2]:
        runs = {build: [] for build in builds}
        for _ in range(5):
            for build in builds:
                command = [build, "run", f"raw:{digits},1x28x28,u8", "--device", "cuda", "--shuffle", "--json",
                           "--batch-size", str(batch), "--epochs", str(epochs), "--workers", str(workers), *more]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[build].append(json.loads(out))
        for build in builds:
            each = sorted(1e6 * run["seconds"] / run["batches"] for run in runs[build])
            room = statistics.median(run["stages"]["workers"]["waiting_for_room_seconds"] / run["seconds"] / workers
                                     for run in runs[build])
            spread = f"{each[2]:.2f} ({each[0]:.2f} to {each[4]:.2f})"
            print(f"{path:18} {batch:6} {workers:8}  {spread:32} {100 * room:10.0f} %        {build}", flush=True)
PYTHON
