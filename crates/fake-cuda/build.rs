//! Gives the library the name by which programs ask for the driver.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_CFG_TARGET_OS").is_none_or(|system| system != "linux") {
        return;
    }
    // Once it is loaded, the system answers requests for libcuda.so.1 with it; and it stays.
    println!("cargo::rustc-link-arg-cdylib=-Wl,-soname,libcuda.so.1,-z,nodelete");
    // It finds its own functions without their names, which a copy may lack.
    println!("cargo::rustc-link-arg-cdylib=-Wl,-Bsymbolic");
    // For other programs, a folder to name in LD_LIBRARY_PATH. The file itself must not be called
    // libcuda.so: it lies where cargo has LD_LIBRARY_PATH point anyway, and `cargo run` on a machine
    // with a GPU would load it in place of the driver.
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let built = out.ancestors().nth(3).expect("cargo builds below the profile's folder");
    for name in ["libcuda.so", "libcuda.so.1"] {
        link(&built.join("deps/libfake_cuda.so"), &out.join(name));
    }
}

#[cfg(unix)]
fn link(target: &Path, at: &Path) {
    if std::fs::symlink_metadata(at).is_ok() {
        std::fs::remove_file(at).expect("an old link can be removed");
    }
    std::os::unix::fs::symlink(target, at).expect("a link can be made in OUT_DIR");
}

#[cfg(not(unix))]
fn link(_target: &Path, _at: &Path) {}
