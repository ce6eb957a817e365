#!/usr/bin/env bash
# Promise: ThreadSanitizer sees no race in the library's tests.
#
# The standard library must be instrumented too, or its own synchronisation is
# taken for races. So it is built from the sources that ci/std-source.sh unpacks,
# by the compiler of the same version; that one lacks ThreadSanitizer's runtime,
# which comes from the nightly toolchain instead.
#
# It needs a nightly toolchain, lld, and Debian's packages. It is no step of
# .ci/run. Arguments go to the tests: ci/tsan.sh regressions::
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "tsan: $*" >&2
    exit 1
}

cargo +nightly --version >/dev/null 2>&1 ||
    fail "there is no nightly toolchain, which has ThreadSanitizer's runtime: rustup toolchain install nightly"
# The linker of the system stumbles over the runtime's constructors.
command -v ld.lld >/dev/null || fail "there is no lld, the linker: apt install lld"
host="$(rustc +nightly -vV | sed -n 's/^host: //p')"
runtime="$(rustc +nightly --print target-libdir --target "$host")/librustc-nightly_rt.tsan.a"
[[ -f "$runtime" ]] || fail "the nightly toolchain has no ThreadSanitizer for $host"

out="${CARGO_TARGET_DIR:-$PWD/target}"
[[ "$out" == /* ]] || out="$PWD/$out"
bash ci/std-source.sh "$out/targets-std" || fail "there are no sources of the standard library"

export CARGO_TARGET_DIR="$out/tsan"
export RUSTC="$out/targets-std/rustc.sh" RUSTC_BOOTSTRAP=1
flags=(-Zsanitizer=thread -Zexternal-clangrt -Clink-arg=-fuse-ld=lld)
for argument in -Wl,--whole-archive "$runtime" -Wl,--no-whole-archive -lm -ldl -lpthread -lrt -lc; do
    flags+=("-Clink-arg=$argument")
done
# A shared library, such as the pretended driver, finds the runtime in the program that loads it.
wrapper="$out/tsan-rustc.sh"
cat >"$wrapper" <<WRAPPER
#!/usr/bin/env bash
arguments=("\$@")
if [[ " \$* " == *" cdylib "* ]]; then
    arguments=()
    for argument in "\$@"; do
        [[ "\$argument" == "-Clink-arg=$runtime" ]] || arguments+=("\$argument")
    done
fi
exec "\${arguments[@]}"
WRAPPER
chmod +x "$wrapper"
export RUSTC_WRAPPER="$wrapper"
CARGO_ENCODED_RUSTFLAGS="$(IFS=$'\x1f' && echo "${flags[*]}")"
export CARGO_ENCODED_RUSTFLAGS
# But those with the pretended driver, which a program with the runtime can't load.
tests=()
for test in crates/batchline/tests/*; do
    name="$(basename "${test%.rs}")"
    [[ "$name" == cuda ]] || tests+=(--test "$name")
done
cargo +nightly test -p batchline --no-default-features --features formats \
    -Zbuild-std=std,panic_unwind,test --lib "${tests[@]}" --no-fail-fast --target "$host" -- "$@"
echo "tsan: ok"
