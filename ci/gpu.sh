#!/usr/bin/env bash
# Runs what needs an NVIDIA GPU, also on a machine that has one and no Rust.
#
#   ci/gpu.sh build [FOLDER]   puts stripped binaries and this script into FOLDER (target/gpu)
#   FOLDER/gpu.sh run [OUT]    there: tests, sanitizer, checksums, benchmark, and a table last;
#                              raw figures go to OUT (the folder itself)
#
# `run` needs the GPU's driver; the sanitizer and wgpu are left out, and said to be, where
# compute-sanitizer or Vulkan are not found. A script of its own: `.ci/run` has no GPU.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

build() {
    cd "$here/.."
    local folder="${1:-target/gpu}" target="${CARGO_TARGET_DIR:-$PWD/target}" test
    mkdir -p "$folder"
    cargo build --release -p batchline-cli
    test="$(cargo test --release -p batchline --no-run --test cuda --message-format json |
        python3 -c '
import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["name"] == "cuda":
        print(artifact["executable"])')"
    CARGO_TARGET_DIR="$target" cargo build --release --manifest-path bench/cuda/Cargo.toml
    cp "$test" "$folder/cuda-tests"
    cp "$target/release/batchline" "$target/release/batchline-bench-cuda" "$folder/"
    strip "$folder"/{cuda-tests,batchline,batchline-bench-cuda}
    cp -r data/digits "$folder/"
    cp ci/gpu.sh "$folder/"
    du -sh "$folder"
}

table=()
failed=0

# row NAME COMMAND...: runs it and keeps how it ended.
row() {
    local name="$1" outcome=ok
    shift
    printf '\n=== %s\n' "$name"
    "$@" || { outcome=FAILED failed=$((failed + 1)); }
    table+=("$(printf '%-12s %s' "$name" "$outcome")")
}

checksums() {
    local device settings sums
    for settings in "" "--shuffle --epochs 2 --convert bf16 --normalize 8/4"; do
        sums=()
        for device in "$@"; do
            # shellcheck disable=SC2086 # the settings are several words
            sums+=("$("$here/batchline" run "$here/digits" --device "$device" --checksum --json $settings |
                python3 -c 'import json, sys; print(json.load(sys.stdin)["checksum"])')")
        done
        printf '%s: %s\n' "$*" "${sums[*]}"
        [[ "$(printf '%s\n' "${sums[@]}" | sort -u | wc -l)" == 1 ]] || return 1
    done
}

run() {
    local out="${1:-$here}" sanitizer devices=(host cuda)
    export BATCHLINE_REQUIRE_CUDA=1
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    row tests "$here/cuda-tests" --test-threads=1
    sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1 || true)"
    if [[ -n "$sanitizer" ]]; then
        # Without the test that provokes an illegal access.
        local tests=(conformance nothing_is an_output custom_work a_device_for)
        row memcheck "$sanitizer" --tool memcheck --error-exitcode 9 "$here/cuda-tests" --test-threads=1 "${tests[@]}"
        row racecheck "$sanitizer" --tool racecheck --error-exitcode 9 "$here/cuda-tests" --test-threads=1 "${tests[@]}"
    else
        table+=("memcheck     left out: no compute-sanitizer" "racecheck    left out")
    fi
    if "$here/batchline" devices | grep -q '^found *wgpu'; then devices+=(wgpu); fi
    row checksums checksums "${devices[@]}"
    row benchmark "$here/batchline-bench-cuda" "$out/cuda.json"
    printf '\n=== summary (%s)\n' "${devices[*]}"
    printf '%s\n' "${table[@]}"
    [[ $failed -eq 0 ]]
}

case "${1:-}" in
    build | run) "$@" ;;
    *)
        sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
