//! Compiles the kernels, and what runs them, with the system's C++ compiler.

use std::env;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(native)");
    println!("cargo::rerun-if-env-changed=BATCHLINE_REQUIRE_CXX");
    println!("cargo::rerun-if-changed=src/native.cpp");
    for file in ["device.cuh", "numbers.cuh", "kernels.cu"] {
        println!("cargo::rerun-if-changed=../batchline/src/backend/cuda/{file}");
    }
    // For another system this crate is type-checked only, which needs no compiler for that system.
    if env::var_os("HOST") != env::var_os("TARGET") {
        return;
    }
    let compiled = cc::Build::new()
        .cpp(true)
        // Nothing of it is used at run time.
        .cpp_link_stdlib(None)
        .std("c++17")
        .file("src/native.cpp")
        // Also in a debug build: the tests run each kernel some hundred times.
        .opt_level(2)
        .flag_if_supported("-ffp-contract=off")
        .flag_if_supported("-fno-strict-aliasing")
        .flag_if_supported("-fno-exceptions")
        .flag_if_supported("-fno-rtti")
        .flag_if_supported("-Wno-unknown-pragmas")
        .try_compile("batchline_kernels");
    match compiled {
        Ok(()) => println!("cargo::rustc-cfg=native"),
        // The tests say that they were skipped.
        Err(error) => {
            let required = env::var_os("BATCHLINE_REQUIRE_CXX").is_some_and(|value| value == "1");
            assert!(!required, "BATCHLINE_REQUIRE_CXX is set, but: {error}");
            println!("cargo::warning=no C++ compiler: the CUDA kernels are not tested");
        }
    }
}
