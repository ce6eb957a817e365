//! Compiles the kernels, and what runs them, with the system's C++ compiler.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=src/native.cpp");
    for file in ["device.cuh", "numbers.cuh", "kernels.cu"] {
        println!("cargo::rerun-if-changed=../batchline/src/backend/cuda/{file}");
    }
    // For another system this crate is type-checked only, which needs no compiler for that system.
    if env::var_os("HOST") != env::var_os("TARGET") {
        return;
    }
    cc::Build::new()
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
        .compile("batchline_kernels");
}
