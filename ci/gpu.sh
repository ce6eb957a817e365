#!/usr/bin/env bash
# Runs what needs an NVIDIA GPU, also on a machine that has one and no Rust.
#
#   ci/gpu.sh build [FOLDER]             puts stripped binaries, the peers' scripts and this one
#                                        into FOLDER (target/gpu)
#   FOLDER/gpu.sh run [--quick] [OUT [PART...]]
#                                        there: the parts, each with a limit of its own, and a
#                                        table last; raw figures and the log go to OUT (FOLDER/out)
#
# Parts: tests, sanitizer, checksums, device, paths, training, files, peers, and stress (300 s), which
# runs only where it is named. Without it all of them end within nine minutes. --quick uses tiny sizes,
# to see that everything works; without a GPU that is done on the driver that pretends to have one:
#
#   PROFILE=dev ci/gpu.sh build
#   LD_LIBRARY_PATH=FOLDER_OF_LIBCUDA FAKE_CUDA=devices=1,pageable=1,memory_mib=2048 \
#       target/gpu/gpu.sh run --quick
#
# STRESS_SECONDS and PEERS_SECONDS say how long these may take, where there is more time.
#
# The sanitizer, wgpu and the peers are left out, and said to be, where compute-sanitizer, Vulkan or
# PyTorch are not found. A script of its own: `.ci/run` has no GPU.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"

build() {
    cd "$here/.."
    local folder="${1:-target/gpu}" target="${CARGO_TARGET_DIR:-$PWD/target}"
    local profile="${PROFILE:-release}" built test
    built="$target/$profile"
    [[ "$profile" != dev ]] || built="$target/debug"
    mkdir -p "$folder"
    export CARGO_TARGET_DIR="$target"
    cargo build --profile "$profile" -p batchline-cli
    test="$(cargo test --profile "$profile" -p batchline --no-run --test cuda --message-format json |
        python3 -c '
import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["name"] == "cuda":
        print(artifact["executable"])')"
    cargo build --profile "$profile" --locked --manifest-path bench/cuda/Cargo.toml
    cargo build --profile "$profile" --locked --manifest-path soak/Cargo.toml --features cuda
    cp "$test" "$folder/cuda-tests"
    cp "$built"/{batchline,batchline-bench-cuda,soak} "$folder/"
    strip "$folder"/{cuda-tests,batchline,batchline-bench-cuda,soak}
    cp -r data/digits ci/gpu.sh bench/compare.py bench/peers/measure.py "$folder/"
    du -sh "$folder"
}

# ---- What follows runs on the GPU's machine

table=()
failed=0

# row NAME SECONDS COMMAND...: runs it within its time, and keeps how it ended.
row() {
    local name="$1" limit="$2" began=$SECONDS status=0 outcome=ok
    shift 2
    printf '\n=== %s\n' "$name"
    # In a shell of its own: a function can't be given to timeout.
    timeout --kill-after=10 "$limit" bash "$here/gpu.sh" do "$@" || status=$?
    case $status in
        0) ;;
        3) outcome="left out, see above" ;;
        124 | 137) outcome="OUT OF TIME, $limit s" failed=$((failed + 1)) ;;
        *) outcome="FAILED with status $status" failed=$((failed + 1)) ;;
    esac
    table+=("$(printf '%-12s %4s s  %s' "$name" $((SECONDS - began)) "$outcome")")
}

# Why something is not done; the status that `row` takes for it.
left_out() {
    echo "left out: $*"
    exit 3
}

has_wgpu() {
    "$here/batchline" devices | grep -q '^found *wgpu'
}

# The digits, whatever brings them to whichever device: one checksum for each way to ask.
checksums() {
    local ways=("host" "cuda --gather never" "cuda --gather auto" "cuda --gather copies"
        "cuda --gather kernel" "cuda --resident") settings way result sums
    if has_wgpu; then
        ways+=("wgpu" "wgpu --resident")
    else
        echo "without wgpu, which is not found"
    fi
    for settings in "" "--shuffle --epochs 2" "--shuffle --convert bf16 --normalize 8/4"; do
        sums=()
        for way in "${ways[@]}"; do
            # shellcheck disable=SC2086 # both are several words
            result="$("$here/batchline" run "$here/digits" --device $way --checksum --json $settings)"
            sums+=("$("$python" -c '
import json, sys
result = json.load(sys.stdin)
print(result["checksum"], result["path"])' <<<"$result")")
            printf '%-24s %s\n' "$way" "${sums[-1]}"
        done
        [[ "$(printf '%s\n' "${sums[@]%% *}" | sort -u | wc -l)" == 1 ]] || return 1
        # Each path was taken.
        for way in staged gathered resident; do
            printf '%s\n' "${sums[@]}" | grep -q " $way\$" || { echo "nothing was $way"; return 1; }
        done
    done
}

# sanitizer TOOL TEST...: tests by what their names hold, but for those that start programs, provoke
# faults on purpose, or hold a stream back while memory is allocated, which a sanitizer waits with.
sanitizer() {
    local tool="$1" program
    shift
    program="$(command -v compute-sanitizer ||
        ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1 || true)"
    [[ -n "$program" ]] || left_out "compute-sanitizer is not found"
    local skipped=(lost a_binding_keeps any_call any_settings without_a_gpu calls:: failures:: missing::
        copies_by_a_driver copies_in_batches_as destroyed)
    local more=()
    # What the driver refuses is no fault here: tests ask for such things.
    [[ "$tool" != memcheck ]] || more=(--report-api-errors no)
    "$program" --tool "$tool" "${more[@]}" --error-exitcode 9 \
        "$here/cuda-tests" --test-threads=1 "$@" "${skipped[@]/#/--skip=}"
}

# Where cuBLAS lies, if it came with PyTorch or the toolkit.
cublas() {
    local file
    file="$("$python" -c '
import glob, sysconfig
site = sysconfig.get_paths()["purelib"]
found = glob.glob(site + "/nvidia/*/lib/libcublas.so.1[23]") + glob.glob("/usr/local/cuda*/lib64/libcublas.so.1[23]")
print(found[0] if found else "")' || true)"
    [[ -z "$file" ]] || printf '%s\n' --libraries "$(dirname "$file")"
}

bench() {
    local out="$1" found
    shift
    mapfile -t found < <(cublas)
    "$here/batchline-bench-cuda" "$@" --json "$out" "${found[@]}"
}

peers() {
    local out="$1"
    shift
    "$python" -c 'import torch' 2>/dev/null || left_out "$python has no PyTorch"
    if [[ "$*" == *--quick* ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        set -- "$@" --device cpu
    fi
    "$python" "$here/measure.py" --json "$out" "$@"
}

stress() {
    local out="$1" seconds="$2"
    # With more arenas, or large blocks kept, resident memory would tell of the allocator only.
    MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=131072 \
        "$here/soak" --device cuda --seconds "$seconds" --seed "${SEED:-0}" --csv "$out"
}

parts() {
    local out="$1" quick="$2" part figures=()
    shift 2
    local more=()
    [[ -z "$quick" ]] || more=(--quick)
    export BATCHLINE_REQUIRE_CUDA=1
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current --format=csv,noheader
    fi
    "$here/batchline" devices
    for part in "$@"; do
        case "$part" in
            tests) row tests 70 "$here/cuda-tests" --test-threads=1 ;;
            sanitizer)
                row memcheck 75 sanitizer memcheck conformance stream output custom_work nothing_is gather:: dlpack::
                row racecheck 100 sanitizer racecheck conformance every_way
                ;;
            checksums) row checksums 35 checksums ;;
            device) row device 40 bench "$out/device.json" device "${more[@]}" ;;
            paths) row paths 150 bench "$out/paths.json" paths "${more[@]}" ;;
            training) row training 60 bench "$out/training.json" training "${more[@]}" ;;
            files) row files 30 bench "$out/files.json" files "${more[@]}" ;;
            peers)
                local budget="${PEERS_SECONDS:-110}"
                row peers $((budget + 10)) peers "$out/peers.json" --seconds "$budget" "${more[@]}"
                ;;
            stress)
                local seconds="${STRESS_SECONDS:-300}"
                [[ -z "$quick" ]] || seconds=10
                row stress $((seconds + 30)) stress "$out/soak.csv" "$seconds"
                ;;
            *)
                echo "there is no part $part" >&2
                exit 2
                ;;
        esac
    done
    for part in device paths training files peers; do
        [[ ! -s "$out/$part.json" ]] || figures+=("$out/$part.json")
    done
    if [[ ${#figures[@]} -gt 0 ]]; then
        printf '\n=== figures\n'
        "$python" "$here/compare.py" "${figures[@]}" >"$out/tables.md" || failed=$((failed + 1))
        "$python" "$here/compare.py" --short "${figures[@]}" || failed=$((failed + 1))
    fi
    printf '\n=== summary\n'
    printf '%s\n' "${table[@]}"
    [[ $failed -eq 0 ]]
}

run() {
    local quick="" out
    if [[ "${1:-}" == --quick ]]; then
        quick=yes
        shift
    fi
    out="${1:-$here/out}"
    shift || true
    [[ $# -gt 0 ]] || set -- tests sanitizer checksums device paths training files peers
    mkdir -p "$out"
    # What an earlier run left would be taken for figures of this one.
    rm -f "$out"/{device,paths,training,files,peers}.json "$out"/{soak.csv,tables.md,log.txt}
    parts "$out" "$quick" "$@" 2>&1 | tee "$out/log.txt"
}

case "${1:-}" in
    build | run) "$@" ;;
    # One part, in a process that can be ended.
    do)
        shift
        "$@"
        ;;
    *)
        sed -n '2,23s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
