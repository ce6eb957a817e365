//! The work of a training step: matrix products by cuBLAS where it is found, else a kernel of our
//! own that only computes.

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::driver::{Driver, Kernel};
use crate::settings::Settings;

/// A step's work on a stream.
pub(crate) struct Compute<'d> {
    driver: &'d Driver,
    stream: *mut c_void,
    kind: Kind,
    /// How often it is repeated, or its length.
    count: u32,
}

enum Kind {
    Products(Cublas),
    /// The kernel, and device memory that it may write to.
    Kernel(Kernel, u64),
}

impl<'d> Compute<'d> {
    /// Work that takes about so many milliseconds.
    pub(crate) fn new(
        settings: &Settings,
        driver: &'d Driver,
        stream: *mut c_void,
        milliseconds: f64,
    ) -> Self {
        let side = settings.pick(4096, 64);
        let (kind, start) = match Cublas::open(settings, driver, stream, side) {
            Some(cublas) => (Kind::Products(cublas), 4),
            None => {
                let kernel = driver.kernel(TEXT, c"batchline_bench_compute");
                (Kind::Kernel(kernel, driver.device_memory(1 << 20)), 1 << 14)
            }
        };
        let mut compute = Self { driver, stream, kind, count: start };
        // The first run warms up, the others come nearer to the aim.
        for _ in 0..4 {
            let (before, after) = (driver.event(), driver.event());
            driver.record(before, stream);
            compute.enqueue();
            driver.record(after, stream);
            driver.wait(stream);
            let took = driver.between(before, after).max(1e-3);
            let count = f64::from(compute.count) * milliseconds / took;
            compute.count = count.round().clamp(1.0, settings.pick(1e7, 16.0)) as u32;
        }
        compute
    }

    pub(crate) fn enqueue(&self) {
        match &self.kind {
            Kind::Products(cublas) => (0..self.count).for_each(|_| cublas.multiply()),
            Kind::Kernel(kernel, memory) => {
                self.driver.launch(*kernel, 2048, self.stream, *memory, self.count);
            }
        }
    }

    pub(crate) fn name(&self) -> String {
        match &self.kind {
            Kind::Products(cublas) => {
                let side = cublas.side;
                format!("{} products of bf16 {side}x{side} by cuBLAS", self.count)
            }
            Kind::Kernel(..) => format!("a kernel of {} rounds of multiplications", self.count),
        }
    }
}

/// Eight chains of fused multiply-adds per thread, and nothing for the memory to do.
const TEXT: &std::ffi::CStr = c"
.version 6.0
.target sm_70
.address_size 64
.visible .entry batchline_bench_compute(.param .u64 to, .param .u32 rounds)
{
    .reg .b64 %to;
    .reg .b32 %left;
    .reg .f32 %a<8>, %x;
    .reg .pred %more, %never;
    ld.param.u64 %to, [to];
    ld.param.u32 %left, [rounds];
    mov.f32 %x, 0f3F7FFFFE;
    mov.f32 %a0, 0f3F800000;
    mov.f32 %a1, 0f3F800000;
    mov.f32 %a2, 0f3F800000;
    mov.f32 %a3, 0f3F800000;
    mov.f32 %a4, 0f3F800000;
    mov.f32 %a5, 0f3F800000;
    mov.f32 %a6, 0f3F800000;
    mov.f32 %a7, 0f3F800000;
again:
    fma.rn.f32 %a0, %a0, %x, %x;
    fma.rn.f32 %a1, %a1, %x, %x;
    fma.rn.f32 %a2, %a2, %x, %x;
    fma.rn.f32 %a3, %a3, %x, %x;
    fma.rn.f32 %a4, %a4, %x, %x;
    fma.rn.f32 %a5, %a5, %x, %x;
    fma.rn.f32 %a6, %a6, %x, %x;
    fma.rn.f32 %a7, %a7, %x, %x;
    sub.u32 %left, %left, 1;
    setp.ne.u32 %more, %left, 0;
    @%more bra again;
    add.f32 %a0, %a0, %a1;
    add.f32 %a2, %a2, %a3;
    add.f32 %a4, %a4, %a5;
    add.f32 %a6, %a6, %a7;
    add.f32 %a0, %a0, %a2;
    add.f32 %a4, %a4, %a6;
    add.f32 %a0, %a0, %a4;
    setp.lt.f32 %never, %a0, 0f00000000;
    @%never st.global.f32 [%to], %a0;
    ret;
}
";

type Code = c_int;
type Handle = *mut c_void;

type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> Code;

/// Square matrices of `bf16`, and a handle to multiply them with.
struct Cublas {
    handle: Handle,
    multiply: GemmEx,
    side: c_int,
    matrices: [u64; 3],
    /// Of the functions.
    _libraries: Vec<Library>,
}

impl Cublas {
    /// `None` where there is no library, or where it has no device to work on.
    fn open(
        settings: &Settings,
        driver: &Driver,
        stream: *mut c_void,
        side: c_int,
    ) -> Option<Self> {
        // Loaded by its name, or from a folder together with the library that it needs.
        let load = |folder: Option<&Path>, version: u32| -> Option<Vec<Library>> {
            let names = [format!("libcublasLt.so.{version}"), format!("libcublas.so.{version}")];
            names
                .iter()
                .map(|name| {
                    let path = folder.map_or(PathBuf::from(name), |folder| folder.join(name));
                    // SAFETY: the library of the CUDA toolkit has initialisers of its own.
                    unsafe { Library::new(path) }.ok()
                })
                .collect()
        };
        let libraries = [settings.libraries.as_deref(), None]
            .into_iter()
            .flat_map(|folder| [13, 12].map(|version| (folder, version)))
            .find_map(|(folder, version)| load(folder, version))?;
        let cublas = libraries.last()?;
        // SAFETY: the signature of cuBLAS's documentation.
        let create = unsafe {
            cublas.get::<unsafe extern "C" fn(*mut Handle) -> Code>(b"cublasCreate_v2").ok()?
        };
        // SAFETY: as above.
        let set_stream = unsafe {
            cublas
                .get::<unsafe extern "C" fn(Handle, *mut c_void) -> Code>(b"cublasSetStream_v2")
                .ok()?
        };
        // SAFETY: as above.
        let multiply = unsafe { *cublas.get::<GemmEx>(b"cublasGemmEx").ok()? };
        let mut handle = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        if unsafe { create(&raw mut handle) } != 0 {
            return None;
        }
        // SAFETY: the handle was just made, and the stream is of the primary context, which is
        // current.
        if unsafe { set_stream(handle, stream) } != 0 {
            return None;
        }
        let bytes = 2 * usize::try_from(side * side).expect("small");
        let memory = driver.page_locked(bytes);
        let mut state = 1u64;
        for element in memory.chunks_exact_mut(2) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            // From -1 to 1: the sign, an exponent of a few, and any fraction.
            let (sign, fraction) = ((state >> 63) as u16, (state >> 40) as u16 & 0x7f);
            let exponent = 124 + (state >> 50) as u16 % 3;
            element.copy_from_slice(&(sign << 15 | exponent << 7 | fraction).to_ne_bytes());
        }
        let matrices = [(); 3].map(|()| driver.device_memory(bytes));
        matrices.iter().for_each(|matrix| driver.copy(stream, *matrix, memory));
        driver.wait(stream);
        Some(Self { handle, multiply, side, matrices, _libraries: libraries })
    }

    fn multiply(&self) {
        /// `CUDA_R_16BF`
        const BF16: c_int = 14;
        /// `CUBLAS_COMPUTE_32F`
        const IN_F32: c_int = 68;
        /// `CUBLAS_GEMM_DEFAULT`
        const ANY: c_int = -1;
        let (one, zero) = (1f32, 0f32);
        let (one, zero) = ((&raw const one).cast(), (&raw const zero).cast());
        let [a, b, c] = self.matrices.map(|address| address as usize as *mut c_void);
        let side = self.side;
        // SAFETY: three matrices of side × side elements on the device, which are never freed.
        let code = unsafe {
            (self.multiply)(
                self.handle,
                0,
                0,
                side,
                side,
                side,
                one,
                a,
                BF16,
                side,
                b,
                BF16,
                side,
                zero,
                c,
                BF16,
                side,
                IN_F32,
                ANY,
            )
        };
        assert_eq!(code, 0, "cublasGemmEx");
    }
}
