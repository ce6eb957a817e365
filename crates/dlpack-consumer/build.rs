//! Compiles the program with the system's C compiler.

use std::env;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(built)");
    println!("cargo::rerun-if-env-changed=BATCHLINE_REQUIRE_CXX");
    println!("cargo::rerun-if-changed=src/consumer.c");
    // For another system this crate is type-checked only, which needs no compiler for that system.
    if env::var_os("HOST") != env::var_os("TARGET") {
        return;
    }
    let compiled = cc::Build::new()
        .file("src/consumer.c")
        .std("c11")
        .warnings_into_errors(true)
        .extra_warnings(true)
        .try_compile("dlpack_consumer");
    match compiled {
        Ok(()) => println!("cargo::rustc-cfg=built"),
        // The tests say that they were skipped.
        Err(error) => {
            let required = env::var_os("BATCHLINE_REQUIRE_CXX").is_some_and(|value| value == "1");
            assert!(!required, "BATCHLINE_REQUIRE_CXX is set, but: {error}");
            println!("cargo::warning=no C compiler: exports through DLPack are not tested");
        }
    }
}
