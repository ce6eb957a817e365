#!/usr/bin/env bash
# Promise: a reader finds their way: no file is too long, `unsafe` stays in the
# few files that are about memory, no file is a drawer for anything, and no
# work is left open in the code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

limit=600

# The files that may hold `unsafe`, each with its reason.
unsafe_files=(
    "crates/batchline/src/backend/cuda/context.rs: calls the driver"
    "crates/batchline/src/backend/cuda/cudarc.rs: makes views arguments of kernels"
    "crates/batchline/src/backend/cuda/driver.rs: loads the driver's library"
    "crates/batchline/src/backend/cuda/execute.rs: calls the driver with addresses"
    "crates/batchline/src/backend/cuda/gather.rs: copies rows by their addresses"
    "crates/batchline/src/backend/cuda/graph.rs: captures and launches graphs"
    "crates/batchline/src/backend/cuda/kernels.rs: launches kernels"
    "crates/batchline/src/backend/cuda/lane.rs: calls the driver"
    "crates/batchline/src/backend/cuda/memory.rs: allocates, registers and frees"
    "crates/batchline/src/backend/cuda/mod.rs: promises that commands are done as said"
    "crates/batchline/src/backend/cuda/numa.rs: asks the system for near memory"
    "crates/batchline/src/backend/cuda/queue.rs: takes a raw stream on a promise"
    "crates/batchline/src/backend/cuda/registered.rs: registers memory with the driver"
    "crates/batchline/tests/cuda/driver.rs: calls the driver, as a user does"
    "crates/batchline/tests/cuda/fork.rs: forks"
    "crates/batchline/src/backend/host/execute.rs: commands name memory by address"
    "crates/batchline/src/backend/host/registered.rs: promises that memory is readable"
    "crates/batchline/src/backend/host/memory.rs: allocates and frees"
    "crates/batchline/src/backend/host/mod.rs: runs the commands of a segment"
    "crates/batchline/src/backend/memory.rs: the traits by which a backend promises addresses"
    "crates/batchline/src/backend/mod.rs: the trait by which a backend promises to do as commanded"
    "crates/batchline/src/backend/wgpu/mod.rs: promises that for wgpu"
    "crates/batchline/src/backend/wgpu/memory.rs: addresses of mapped buffers"
    "crates/batchline/src/backend/wgpu/tests/mod.rs: the tests write mapped memory themselves"
    "crates/batchline/src/dlpack/abi.rs: the type of a deleter"
    "crates/batchline/src/dlpack/mod.rs: gives out addresses, and takes them back"
    "crates/batchline/src/formats/bytes.rs: maps files"
    "crates/batchline/src/loader/slot.rs: gives several workers windows of one slot"
    "crates/batchline/src/loader/ticket.rs: deals the rows of a slot out, each once"
    "crates/batchline/src/memory/view.rs: slices of memory that a tensor keeps alive"
    "crates/batchline/src/backend/gather.rs: implementors promise that memory stays readable"
    "crates/batchline/src/memory/registered.rs: promises a backend that memory stays where it is"
    "crates/batchline/src/process.rs: has the system call a function in children"
    "crates/batchline/src/source/window.rs: disjoint windows of one batch"
    "crates/batchline/src/staging/buffer.rs: slices of page-locked memory"
    "crates/batchline/tests/allocations.rs: an allocator that counts"
    "crates/batchline/tests/cuda/cudarc.rs: launches kernels, as a user does"
    "crates/batchline/tests/cuda/dlpack.rs: gives exports to a C program"
    "crates/batchline/tests/dlpack.rs: gives exports to a C program"
    "crates/cuda-kernels-native/src/lib.rs: runs the CUDA kernels, which name memory by address"
    "crates/dlpack-consumer/src/lib.rs: calls a C program"
    "crates/batchline/src/testing/faults.rs: works on memory by address, as a device does"
    "crates/fake-cuda/src/arguments.rs: reads and writes what C callers point to"
    "crates/fake-cuda/src/driver/control.rs: exports symbols"
    "crates/fake-cuda/src/driver/kernels.rs: kernels name memory by address"
    "crates/fake-cuda/src/driver/memory.rs: allocates, frees, and fills with patterns"
    "crates/fake-cuda/src/driver/mod.rs: exports symbols"
    "crates/fake-cuda/src/driver/work.rs: copies and fills name memory by address"
    "crates/fake-cuda/src/fake.rs: loads a library and calls it"
    "crates/fake-cuda/tests/fake/cuda.rs: calls the driver"
    "crates/fake-cuda/tests/fake/loading.rs: loads the driver"
)

faults=0
fault() {
    echo "layout: $*" >&2
    faults=$((faults + 1))
}

files=()
while read -r file; do
    files+=("$file")
done < <(find crates -name '*.rs' -not -path '*/target/*' | sort)
[[ ${#files[@]} -gt 0 ]] || { echo "layout: no .rs file found" >&2; exit 1; }

# Length, up to the file's own module of tests. Folders of tests are left out.
own_length='
/^#\[cfg\(.*[(, ]test[,)]/ && !since { since = NR }
since && /^(pub(\([a-z]+\))? )?mod [a-z_]+ *[{]/ { exit }
!/^#\[/ { since = 0 }
END { print (since ? since - 1 : NR), file }
'
lengths="$(for file in "${files[@]}"; do
    [[ "$file" == */tests/* ]] && continue
    awk -v file="$file" "$own_length" "$file"
done | sort -rn)"
echo "layout: the largest files, in lines before their tests"
head -n 8 <<<"$lengths" | sed 's/^/  /'
while read -r lines file; do
    [[ "$lines" -le "$limit" ]] || fault "$file has $lines lines before its tests, more than $limit"
done <<<"$lengths"

# `unsafe` as a keyword: comments and strings on one line do not count.
has_unsafe() {
    sed -E "s/'\"'//g"'; s/"([^"\\]|\\.)*"//g; s|//.*||' "$1" | grep -E '\bunsafe\b' >/dev/null
}
for file in "${files[@]}"; do
    listed=no
    for entry in "${unsafe_files[@]}"; do
        [[ "${entry%%:*}" == "$file" ]] && listed=yes
    done
    if has_unsafe "$file"; then
        [[ "$listed" == yes ]] || fault "$file holds unsafe code and is not listed in ci/layout.sh"
    elif [[ "$listed" == yes ]]; then
        fault "$file is listed in ci/layout.sh but holds no unsafe code"
    fi
done
for entry in "${unsafe_files[@]}"; do
    [[ -f "${entry%%:*}" ]] || fault "${entry%%:*} is listed in ci/layout.sh but is not there"
done

for file in "${files[@]}"; do
    case "$(basename "$file")" in
        util.rs | utils.rs | common.rs | base.rs | helper.rs | helpers.rs | misc.rs)
            fault "$file has a name that says nothing"
            ;;
    esac
    case "$file" in
        */util/mod.rs | */utils/mod.rs | */common/mod.rs | */base/mod.rs | */helper/mod.rs | */helpers/mod.rs | */misc/mod.rs)
            fault "$file has a name that says nothing"
            ;;
    esac
done

open='\b(todo|unimplemented)!|\b(TODO|FIXME|XXX)\b|#\[ignore|cfg_attr\(.*,[[:space:]]*ignore\b'
while IFS= read -r line; do
    [[ -z "$line" ]] || fault "open work: $line"
done < <(grep -nE "$open" "${files[@]}" /dev/null || true)

if [[ $faults -gt 0 ]]; then
    echo "layout: $faults faults" >&2
    exit 1
fi
echo "layout: ok"
