//! The kernels: loaded when the device is opened, launched with checked arguments.
#![allow(unsafe_code, reason = "calls the driver")]

use std::ffi::{CStr, CString, c_void};
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::context::{Context, Entered};
use super::driver::{self, Address, Function, code};
use super::memory::CudaMemory;
use crate::backend::{ChannelOrder, ConvertSpec, MAX_PARTS};
use crate::sync::Mutex;
use crate::{DType, Result};

/// `kernels.cu`, compiled by `ci/ptx.sh`.
const PTX: &str = concat!(include_str!("kernels.ptx"), "\0");

/// Threads of a block.
const BLOCK: u32 = 256;
/// Elements that are worth a block.
const PER_BLOCK: u64 = 4096;
/// Blocks that fill a multiprocessor.
const BLOCKS: u64 = 4;
/// The most blocks along a grid's second axis.
const MOST_SLICES: u64 = 65_535;

/// The longest row that the kernel which gathers and converts takes for a short one.
const SHORT_ROW: u64 = 16_384;

/// What the kernel that gathers rows converts on the way.
pub(super) const FUSED: &[(DType, DType)] =
    &[(DType::U8, DType::F32), (DType::U8, DType::F16), (DType::U8, DType::BF16)];

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
    /// For rows as they are, and for those that become another type, as they were needed.
    gather: Vec<(Option<DType>, Function)>,
    /// Scales and biases that are on the device, by the lists that they came from; what was used
    /// last is at the end.
    factors: Vec<Arc<Factors>>,
}

/// A list of factors on the device. Holding the list keeps it from being taken for another.
#[derive(Debug)]
struct Factors {
    list: Arc<[f32]>,
    memory: CudaMemory,
}

/// Lists that are kept on the device; programs use a few. A launch needs two at a time.
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
    map: Map,
}

/// What all conversions are told alike.
#[derive(Debug, Clone)]
struct Map {
    channels: u64,
    pixels: u64,
    flags: u32,
    scale: Address,
    bias: Address,
    /// Keeps scale and bias on the device.
    _factors: Option<[Arc<Factors>; 2]>,
}

/// One tensor of a gather, by addresses of the device.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rows {
    pub(super) source: Address,
    pub(super) target: Address,
    pub(super) row_bytes: u64,
}

impl Kernels {
    /// Loads them, where the device can run them: the driver does that only once everything that
    /// was enqueued before is over, so later on it would wait for work of the user's, which may wait
    /// for a batch. What goes wrong is told to who first needs one; it is then tried again.
    ///
    /// # Errors
    /// The device is lost.
    pub(super) fn new(context: &Arc<Context>, entered: &Entered<'_>) -> Result<Self> {
        let loaded = match context.runs_kernels.then(|| Loaded::load(entered)).transpose() {
            Err(lost) if lost.is_device_lost() => return Err(lost),
            loaded => loaded.unwrap_or_default(),
        };
        Ok(Self { context: Arc::clone(context), loaded: Mutex::new(loaded) })
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
        let grid = grid_of_elements(count, entered.context.multiprocessors);
        launch(entered, function, grid, stream, &mut parameters)
    }

    /// Gets a conversion ready; what it needs on the device is there afterwards.
    pub(super) fn convert(
        &self,
        entered: &Entered<'_>,
        stream: driver::Stream,
        spec: &ConvertSpec,
    ) -> Result<Launch> {
        self.with(entered, |loaded| {
            let map = loaded.map(&self.context, entered, stream, spec)?;
            let fast = loaded.fast(entered, spec.from, spec.to)?;
            Ok(Launch {
                function: fast.unwrap_or(loaded.convert),
                any: fast.is_none(),
                elements: spec.elements,
                from: number(spec.from),
                to: number(spec.to),
                map,
            })
        })
    }

    /// Gathers rows by their numbers, those of the first tensor with a conversion if there is one:
    /// of [`FUSED`] types, and such that a row is a number of whole images.
    pub(super) fn gather(
        &self,
        entered: &Entered<'_>,
        stream: driver::Stream,
        (mut indices, mut rows): (Address, u64),
        tensors: &[Rows],
        spec: Option<&ConvertSpec>,
    ) -> Result<()> {
        let to = spec.map(|spec| spec.to);
        let (function, mut map) = self.with(entered, |loaded| {
            let map =
                spec.map(|spec| loaded.map(&self.context, entered, stream, spec)).transpose()?;
            Ok((loaded.gather(entered, to)?, map))
        })?;
        let mut count = u32::try_from(tensors.len()).expect("a few");
        let mut all = [Rows::default(); MAX_PARTS];
        all[..tensors.len()].copy_from_slice(tensors);
        let mut parameters: SmallVec<[*mut c_void; 20]> = smallvec![
            (&raw mut indices).cast(),
            (&raw mut rows).cast(),
            (&raw mut count).cast::<c_void>(),
        ];
        let [first, others @ ..] = &mut all;
        parameters.extend(first.parameters());
        parameters.extend(map.iter_mut().flat_map(Map::parameters));
        parameters.extend(others.iter_mut().flat_map(Rows::parameters));
        let units = |(place, tensor): (usize, &Rows)| match to.filter(|_| place == 0) {
            // Short rows are made in pieces of as many bytes of the source.
            Some(_) if tensor.row_bytes <= SHORT_ROW => tensor.row_bytes / 16,
            Some(to) => tensor.row_bytes / (16 / to.size() as u64),
            None => tensor.units(),
        };
        let longest = tensors.iter().enumerate().map(units).max().unwrap_or(0);
        let grid = grid_of_rows(rows, longest, count, entered.context.multiprocessors);
        launch(entered, function, grid, stream, &mut parameters)
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
        if code != code::SUCCESS {
            const WHAT: &str = "loading the kernels (they need compute capability 7.0)";
            return Err(entered.context.refused(WHAT, code));
        }
        let find = |name| find(entered, module, name);
        let found =
            find(c"batchline_fill_u64").and_then(|fill| Ok((fill, find(c"batchline_convert")?)));
        if found.is_err() {
            // SAFETY: loaded above, and nothing of it runs.
            unsafe { (entered.driver().cuModuleUnload)(module) };
        }
        let (fill, convert) = found?;
        let (fast, gather, factors) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { module, fill, convert, fast, gather, factors })
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

    /// The kernel that gathers rows and makes this type of them, or leaves them as they are.
    fn gather(&mut self, entered: &Entered<'_>, to: Option<DType>) -> Result<Function> {
        if let Some((_, function)) = self.gather.iter().find(|(known, _)| *known == to) {
            return Ok(*function);
        }
        let function = match to {
            None => find(entered, self.module, c"batchline_gather_rows")?,
            Some(to) => {
                let name = format!("batchline_gather_convert_u8_{to}");
                find(entered, self.module, &CString::new(name).expect("no zero in it"))?
            }
        };
        self.gather.push((to, function));
        Ok(function)
    }

    /// What a conversion is told, with its factors on the device.
    fn map(
        &mut self,
        context: &Arc<Context>,
        entered: &Entered<'_>,
        stream: driver::Stream,
        spec: &ConvertSpec,
    ) -> Result<Map> {
        let nchw = |order, flag| if order == ChannelOrder::Nchw { flag } else { 0 };
        let affine = u32::from(spec.is_affine());
        let flags = affine | nchw(spec.source_order, 2) | nchw(spec.target_order, 4);
        let mut factors = None;
        if spec.is_affine() {
            let mut on_device = |list| self.factors(context, entered, stream, list);
            factors = Some([on_device(&spec.scale)?, on_device(&spec.bias)?]);
        }
        let address = |place: usize| factors.as_ref().map_or(0, |both| both[place].memory.address);
        let (scale, bias) = (address(0), address(1));
        let (channels, pixels) = (spec.channels, spec.pixels);
        Ok(Map { channels, pixels, flags, scale, bias, _factors: factors })
    }

    /// A list on the device, where it stays for the next launch at least: another one may be given
    /// up in between, but the one that was not used for longest. What comes again holds its lists.
    fn factors(
        &mut self,
        context: &Arc<Context>,
        entered: &Entered<'_>,
        stream: driver::Stream,
        list: &Arc<[f32]>,
    ) -> Result<Arc<Factors>> {
        // By their bits: a conversion that is recorded anew brings a list of its own each time.
        let same = |known: &Arc<Factors>| {
            Arc::ptr_eq(&known.list, list)
                || bytemuck::cast_slice::<f32, u8>(&known.list)
                    == bytemuck::cast_slice::<f32, u8>(list)
        };
        if let Some(known) = self.factors.iter().position(same) {
            self.factors[known..].rotate_left(1);
            return Ok(Arc::clone(&self.factors[self.factors.len() - 1]));
        }
        if self.factors.len() == LISTS {
            // SAFETY: the stream exists. All conversions run on it.
            let code = unsafe { (entered.driver().cuStreamSynchronize)(stream) };
            entered.call("waiting for conversions", code)?;
            self.factors.remove(0);
        }
        let bytes = size_of_val(&**list);
        let memory = CudaMemory::new(context, bytes as u64)?;
        // Behind what is on the stream, ahead of the kernel: a copy from ordinary memory that is
        // not on it may still be on its way when it returns.
        // SAFETY: allocated above, as long as the list, and kept with it.
        let code = unsafe {
            let list = list.as_ptr().cast();
            (entered.driver().cuMemcpyHtoDAsync_v2)(memory.address, list, bytes, stream)
        };
        // The call did nothing, or the device is lost and the memory with it.
        entered.call("copying factors to the device", code)?;
        let factors = Arc::new(Factors { list: Arc::clone(list), memory });
        self.factors.push(Arc::clone(&factors));
        Ok(factors)
    }
}

impl Map {
    fn parameters(&mut self) -> [*mut c_void; 5] {
        [
            (&raw mut self.channels).cast(),
            (&raw mut self.pixels).cast(),
            (&raw mut self.flags).cast(),
            (&raw mut self.scale).cast(),
            (&raw mut self.bias).cast(),
        ]
    }
}

impl Rows {
    fn parameters(&mut self) -> [*mut c_void; 3] {
        [
            (&raw mut self.source).cast(),
            (&raw mut self.target).cast(),
            (&raw mut self.row_bytes).cast(),
        ]
    }

    /// Words that a row is gathered in, as `kernels.cu` chooses them.
    fn units(&self) -> u64 {
        let all = self.source | self.target | self.row_bytes;
        let word = [16, 8, 4].into_iter().find(|word| all.is_multiple_of(*word));
        self.row_bytes / word.unwrap_or(if self.row_bytes < 64 { 1 } else { 16 })
    }
}

impl Launch {
    pub(super) fn run(
        &self,
        entered: &Entered<'_>,
        stream: driver::Stream,
        mut source: Address,
        mut target: Address,
    ) -> Result<()> {
        let (mut elements, mut from, mut to) = (self.elements, self.from, self.to);
        let mut map = self.map.clone();
        let mut parameters: SmallVec<[*mut c_void; 10]> = smallvec![
            (&raw mut source).cast(),
            (&raw mut target).cast(),
            (&raw mut elements).cast(),
        ];
        if self.any {
            parameters.extend([(&raw mut from).cast(), (&raw mut to).cast()]);
        }
        parameters.extend(map.parameters());
        let grid = grid_of_elements(self.elements, entered.context.multiprocessors);
        launch(entered, self.function, grid, stream, &mut parameters)
    }
}

fn find(entered: &Entered<'_>, module: driver::Module, name: &CStr) -> Result<Function> {
    let mut function = Function::NULL;
    // SAFETY: the module is loaded; the name ends with a zero.
    let code =
        unsafe { (entered.driver().cuModuleGetFunction)(&raw mut function, module, name.as_ptr()) };
    entered.call("finding a kernel", code).map(|()| function)
}

/// The grid of a kernel that goes over elements in strides of the grid.
fn grid_of_elements(elements: u64, multiprocessors: u32) -> [u32; 2] {
    let most = u64::from(multiprocessors) * BLOCKS;
    [small(elements.div_ceil(PER_BLOCK).clamp(1, most)), 1]
}

/// The grid of a kernel that gathers rows of so many units, those of the longest of the parts. What
/// is good is said in `kernels.cu`.
fn grid_of_rows(rows: u64, units: u64, parts: u32, multiprocessors: u32) -> [u32; 2] {
    let along = units.clamp(1, u64::from(BLOCK)).next_power_of_two();
    let across = rows.div_ceil(u64::from(BLOCK) / along).clamp(1, u64::from(u32::MAX >> 1));
    let slices = match units {
        ..1024 => 1,
        _ => {
            let filling = (u64::from(multiprocessors) * BLOCKS).div_ceil(across);
            filling.clamp(4, units.div_ceil(u64::from(BLOCK)))
        }
    };
    [small(across), parts * small(slices.min(MOST_SLICES / u64::from(parts)))]
}

fn small(blocks: u64) -> u32 {
    u32::try_from(blocks).expect("bounded above")
}

fn launch(
    entered: &Entered<'_>,
    function: Function,
    [across, along]: [u32; 2],
    stream: driver::Stream,
    parameters: &mut [*mut c_void],
) -> Result<()> {
    // SAFETY: the parameters are those of the kernel and are read before the call returns; the
    // memory that they name is kept until the segment's fence has passed.
    let code = unsafe {
        (entered.driver().cuLaunchKernel)(
            function,
            across,
            along,
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
        // SAFETY: loaded in `load`; nothing runs any more.
        unsafe { (entered.driver().cuModuleUnload)(loaded.module) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_follows_the_rows() {
        let of = |rows, row_bytes, parts| {
            let rows_of = Rows { source: 256, target: 512, row_bytes };
            grid_of_rows(rows, rows_of.units(), parts, 132)
        };
        assert_eq!(of(256, 150_528, 1), [256, 4]);
        assert_eq!(of(256, 150_528, 2), [256, 8]);
        // Few rows, which are long.
        assert_eq!(of(8, 6 << 20, 1), [8, 66]);
        assert_eq!(of(1, 1 << 40, 4), [1, 2112]);
        assert_eq!(of(1024, 4096, 1), [1024, 1]);
        assert_eq!(of(4095, 784, 2), [1024, 2]);
        assert_eq!(of(1000, 1, 4), [4, 4]);
        // Without a common alignment, in words of 16 bytes all the same.
        assert_eq!(of(1024, 16_401, 1), [1024, 4]);
        assert_eq!(of(1000, 63, 1), [250, 1]);
        assert_eq!(grid_of_rows(u64::MAX, 1 << 20, 3, 1 << 16), [u32::MAX >> 1, 12]);
        assert_eq!(grid_of_elements(38_535_168, 132), [528, 1]);
        assert_eq!(grid_of_elements(1, 132), [1, 1]);
    }
}
