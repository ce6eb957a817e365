#!/usr/bin/env bash
# Makes crates/batchline/src/backend/cuda/kernels.ptx of the kernels.cu beside
# it. Neither a GPU nor the CUDA toolkit is needed, only clang 19 (on Debian and
# Ubuntu: apt install clang-19).
#
# Promise, with --check: the committed kernels.ptx is what kernels.cu says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=crates/batchline/src/backend/cuda
# Another major version makes other code of the same source.
clang="${CLANG:-clang-19}"

case "${1:-}" in
    "" | --check) ;;
    *)
        echo "usage: ci/ptx.sh [--check]" >&2
        exit 2
        ;;
esac
version="$("$clang" --version 2>/dev/null | head -n 1)" || true
if [[ ! "$version" =~ version\ 19\. ]]; then
    echo "ptx: $clang is ${version:-not there}, needed is clang 19: install it, or name it in CLANG" >&2
    exit 1
fi

made="$(mktemp)"
trap 'rm -f "$made" "$made.ptx"' EXIT
# Compute capability 7.0 and PTX 6.0: any driver of 2020 or later takes that for
# any GPU from Volta on. A product and a sum must not become one operation.
"$clang" -x cuda --cuda-device-only -nocudainc -nocudalib --cuda-gpu-arch=sm_70 \
    -Xclang -target-feature -Xclang +ptx60 -std=c++17 -O3 -fno-unroll-loops \
    -ffp-contract=off -Wall -Wextra -Werror -S "$folder/kernels.cu" -o "$made.ptx"
{
    echo "// Made of kernels.cu by ci/ptx.sh."
    # The compiler's comments are no code, and empty lines neither.
    sed -E 's|[[:space:]]*//.*||; /^$/d' "$made.ptx"
} >"$made"

if [[ "${1:-}" == --check ]]; then
    if ! difference="$(diff "$folder/kernels.ptx" "$made")"; then
        echo "ptx: kernels.ptx is not what kernels.cu says: run ci/ptx.sh and commit it" >&2
        echo "ptx: $(grep -c '^<' <<<"$difference") lines go, $(grep -c '^>' <<<"$difference") come; the first:" >&2
        head -n 20 <<<"$difference" >&2
        exit 1
    fi
    echo "ptx: ok, as made by $version"
else
    cat "$made" >"$folder/kernels.ptx"
    echo "ptx: made $folder/kernels.ptx with $version"
fi
