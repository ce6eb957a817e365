//! The kernels: loaded when the first one is needed, launched with checked arguments.
#![allow(unsafe_code, reason = "calls the driver")]

use std::ffi::{CStr, CString, c_void};
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::context::{Context, Entered};
use super::driver::{self, Address, Function};
use crate::backend::{ChannelOrder, ConvertSpec};
use crate::sync::Mutex;
use crate::{DType, Result};

/// `kernels.cu`, compiled by `ci/ptx.sh`.
const PTX: &str = concat!(include_str!("kernels.ptx"), "\0");

/// Threads of a block.
const BLOCK: u32 = 256;
/// Elements that are worth a block.
const PER_BLOCK: u64 = 4096;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Kernels {
    context: Arc<Context>,
    loaded: Mutex<Option<Loaded>>,
}

#[derive(Debug)]
struct Loaded {
    module: driver::Module,
    fill: Function,
    /// For any pair of types.
    convert: Function,
    /// For the pairs that training uses, as they were needed.
    fast: Vec<((DType, DType), Function)>,
    /// Scales and biases that are on the device, by the lists that they came from, oldest first.
    factors: Vec<Factors>,
}

/// A list of factors on the device. Holding the list keeps it from being taken for another.
#[derive(Debug)]
struct Factors {
    list: Arc<[f32]>,
    address: Address,
}

/// Lists that are kept on the device; programs use a few.
const LISTS: usize = 32;

/// A conversion, ready to be launched.
#[derive(Debug)]
pub(super) struct Launch {
    function: Function,
    /// Whether the kernel is told the types.
    any: bool,
    elements: u64,
    from: u32,
    to: u32,
    channels: u64,
    pixels: u64,
    flags: u32,
    scale: Address,
    bias: Address,
}

impl Kernels {
    pub(super) fn new(context: &Arc<Context>) -> Self {
        Self { context: Arc::clone(context), loaded: Mutex::new(None) }
    }

    /// Writes `count` elements of 8 bytes.
    pub(super) fn fill(
        &self,
        entered: &Entered<'_>,
        stream: driver::Stream,
        mut target: Address,
        mut count: u64,
        mut value: u64,
    ) -> Result<()> {
        let function = self.with(entered, |loaded| Ok(loaded.fill))?;
        let mut parameters: [*mut c_void; 3] =
            [(&raw mut target).cast(), (&raw mut count).cast(), (&raw mut value).cast()];
        launch(entered, function, count, stream, &mut parameters)
    }

    /// Gets a conversion ready; what it needs on the device is there afterwards.
    pub(super) fn convert(
        &self,
        entered: &Entered<'_>,
        stream: driver::Stream,
        spec: &ConvertSpec,
    ) -> Result<Launch> {
        let nchw = |order, flag| if order == ChannelOrder::Nchw { flag } else { 0 };
        let affine = u32::from(spec.is_affine());
        let flags = affine | nchw(spec.source_order, 2) | nchw(spec.target_order, 4);
        self.with(entered, |loaded| {
            let (mut scale, mut bias) = (0, 0);
            if spec.is_affine() {
                scale = loaded.factors(entered, stream, &spec.scale)?;
                bias = loaded.factors(entered, stream, &spec.bias)?;
            }
            let fast = loaded.fast(entered, spec.from, spec.to)?;
            Ok(Launch {
                function: fast.unwrap_or(loaded.convert),
                any: fast.is_none(),
                elements: spec.elements,
                from: number(spec.from),
                to: number(spec.to),
                channels: spec.channels,
                pixels: spec.pixels,
                flags,
                scale,
                bias,
            })
        })
    }

    fn with<R>(
        &self,
        entered: &Entered<'_>,
        ask: impl FnOnce(&mut Loaded) -> Result<R>,
    ) -> Result<R> {
        let mut loaded = self.loaded.lock();
        let loaded = match &mut *loaded {
            Some(loaded) => loaded,
            none => none.insert(Loaded::load(entered)?),
        };
        ask(loaded)
    }
}

/// The number that the kernels know an element type by.
fn number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::F64 => 3,
        DType::I8 => 4,
        DType::I16 => 5,
        DType::I32 => 6,
        DType::I64 => 7,
        DType::U8 => 8,
        DType::Bool => 9,
    }
}

impl Loaded {
    fn load(entered: &Entered<'_>) -> Result<Self> {
        let mut module = driver::Module::NULL;
        // SAFETY: the text ends with a zero.
        let code =
            unsafe { (entered.driver().cuModuleLoadData)(&raw mut module, PTX.as_ptr().cast()) };
        entered.call("loading the kernels (they need compute capability 7.0)", code)?;
        let fill = find(entered, module, c"batchline_fill_u64")?;
        let convert = find(entered, module, c"batchline_convert")?;
        Ok(Self { module, fill, convert, fast: Vec::new(), factors: Vec::new() })
    }

    /// The kernel of its own that a pair of types has, if it has one.
    fn fast(&mut self, entered: &Entered<'_>, from: DType, to: DType) -> Result<Option<Function>> {
        use DType::{BF16, F16, F32, I8, U8};
        if !matches!((from, to), (U8 | I8 | F16 | F32, F32 | F16 | BF16)) {
            return Ok(None);
        }
        if let Some((_, function)) = self.fast.iter().find(|(pair, _)| *pair == (from, to)) {
            return Ok(Some(*function));
        }
        let name = CString::new(format!("batchline_convert_{from}_{to}")).expect("no zero in it");
        let function = find(entered, self.module, &name)?;
        self.fast.push(((from, to), function));
        Ok(Some(function))
    }

    /// A list's address on the device.
    fn factors(
        &mut self,
        entered: &Entered<'_>,
        stream: driver::Stream,
        list: &Arc<[f32]>,
    ) -> Result<Address> {
        if let Some(known) = self.factors.iter().find(|known| Arc::ptr_eq(&known.list, list)) {
            return Ok(known.address);
        }
        if self.factors.len() == LISTS {
            // SAFETY: the stream exists. All conversions run on it.
            let code = unsafe { (entered.driver().cuStreamSynchronize)(stream) };
            entered.call("waiting for conversions", code)?;
            let oldest = self.factors.remove(0);
            // SAFETY: allocated below, and nothing uses it any more.
            let code = unsafe { (entered.driver().cuMemFree_v2)(oldest.address) };
            entered.call("freeing device memory", code)?;
        }
        let bytes = size_of_val(&**list);
        let mut address = 0;
        // SAFETY: `address` is a place for the answer.
        let code = unsafe { (entered.driver().cuMemAlloc_v2)(&raw mut address, bytes) };
        entered.call("allocating device memory", code)?;
        self.factors.push(Factors { list: Arc::clone(list), address });
        // Behind what is on the stream, ahead of the kernel: a copy from ordinary memory that is
        // not on it may still be on its way when it returns.
        // SAFETY: allocated above, as long as the list, and kept with it.
        let code = unsafe {
            let list = list.as_ptr().cast();
            (entered.driver().cuMemcpyHtoDAsync_v2)(address, list, bytes, stream)
        };
        entered.call("copying factors to the device", code)?;
        Ok(address)
    }
}

impl Launch {
    pub(super) fn run(
        mut self,
        entered: &Entered<'_>,
        stream: driver::Stream,
        mut source: Address,
        mut target: Address,
    ) -> Result<()> {
        let mut parameters: SmallVec<[*mut c_void; 10]> = smallvec![
            (&raw mut source).cast(),
            (&raw mut target).cast(),
            (&raw mut self.elements).cast(),
        ];
        if self.any {
            parameters.extend([(&raw mut self.from).cast(), (&raw mut self.to).cast()]);
        }
        parameters.extend([
            (&raw mut self.channels).cast(),
            (&raw mut self.pixels).cast(),
            (&raw mut self.flags).cast(),
            (&raw mut self.scale).cast(),
            (&raw mut self.bias).cast::<c_void>(),
        ]);
        launch(entered, self.function, self.elements, stream, &mut parameters)
    }
}

fn find(entered: &Entered<'_>, module: driver::Module, name: &CStr) -> Result<Function> {
    let mut function = Function::NULL;
    // SAFETY: the module is loaded; the name ends with a zero.
    let code =
        unsafe { (entered.driver().cuModuleGetFunction)(&raw mut function, module, name.as_ptr()) };
    entered.call("finding a kernel", code).map(|()| function)
}

/// Launches a kernel that goes over `elements` in strides of the grid.
fn launch(
    entered: &Entered<'_>,
    function: Function,
    elements: u64,
    stream: driver::Stream,
    parameters: &mut [*mut c_void],
) -> Result<()> {
    // Four on each multiprocessor fill it.
    let most = u64::from(entered.context.multiprocessors) * 4;
    let blocks = elements.div_ceil(PER_BLOCK).clamp(1, most);
    let blocks = u32::try_from(blocks).expect("four times a number of 32 bits that is small");
    // SAFETY: the parameters are those of the kernel and are read before the call returns; the
    // memory that they name is kept until the segment's fence has passed.
    let code = unsafe {
        (entered.driver().cuLaunchKernel)(
            function,
            blocks,
            1,
            1,
            BLOCK,
            1,
            1,
            0,
            stream,
            parameters.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    };
    entered.call("launching a kernel", code)
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let Some(loaded) = self.loaded.lock().take() else { return };
        // What is left of a lost device is left alone.
        let Ok(entered) = self.context.enter() else { return };
        for factors in &loaded.factors {
            // SAFETY: allocated in `factors`; the streams that used it are closed.
            unsafe { (entered.driver().cuMemFree_v2)(factors.address) };
        }
        // SAFETY: loaded in `load`; nothing runs any more.
        unsafe { (entered.driver().cuModuleUnload)(loaded.module) };
    }
}
