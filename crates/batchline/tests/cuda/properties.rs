//! Random settings of a loader on a driver with random latencies and orders, which may lose the
//! context at any piece of work: what is delivered equals a plain reading, also as users' streams
//! see it, whenever they come to it.

use std::cell::RefCell;

use batchline::{CudaStream, Device, Tensor};
use fake_cuda::codes;

use crate::cases::{Bench, Case, Random, cases, try_case};
use crate::driver::{Driver, PageLocked};
use crate::{Gpu, assert_clean, gpu_is_required, no_kernels, wait_until_closed};

/// Streams of a user, beside the one that the device has of its own.
const STREAMS: usize = 3;

/// A program beside the loader.
struct User {
    driver: Driver,
    streams: Vec<CudaStream>,
    /// What its streams read, one thing after another.
    memory: RefCell<PageLocked>,
    looks: RefCell<Vec<Look>>,
    /// Whether the context may be lost.
    fails: bool,
}

/// A tensor that a stream reads at some time.
struct Look {
    stream: CudaStream,
    start: usize,
    expected: Vec<u8>,
}

impl User {
    fn new(driver: Driver, fails: bool) -> Self {
        Self {
            streams: (0..STREAMS).map(|_| driver.stream()).collect(),
            memory: RefCell::new(driver.own_page_locked(1 << 20)),
            looks: RefCell::default(),
            driver,
            fails,
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.streams.iter().for_each(|stream| self.driver.destroy(*stream));
    }
}

struct Cuda<'u> {
    device: Device,
    user: &'u User,
    random: RefCell<Random>,
}

impl<'u> Cuda<'u> {
    fn new(case: &Case, user: &'u User) -> Self {
        // Other numbers than those of the case.
        let mut random = Random::new(!case.seed);
        // Every third device delivers for a stream of the user's.
        let device = match random.one_in(3) {
            true => Device::cuda_for(0, user.streams[0]).unwrap(),
            false => Device::cuda(0).unwrap(),
        };
        Self { device, user, random: RefCell::new(random) }
    }

    fn consumer(&self) -> CudaStream {
        self.device.as_cuda().unwrap().1
    }
}

impl Bench for Cuda<'_> {
    fn device(&self) -> &Device {
        &self.device
    }

    fn gathers(&self) -> bool {
        true
    }

    fn look(&self, tensor: &Tensor, expected: Vec<u8>) {
        let User { driver, streams, memory, looks, fails } = self.user;
        let drawn = usize::try_from(self.random.borrow_mut().below(STREAMS as u64 + 1)).unwrap();
        let stream = streams.get(drawn).copied().unwrap_or(self.consumer());
        let bound = match tensor.bind(&stream) {
            Err(error) if *fails && error.is_device_lost() => return,
            bound => bound.unwrap(),
        };
        assert_eq!(bound.bytes, expected.len() as u64);
        let mut looks = looks.borrow_mut();
        let start = looks.last().map_or(0, |look| look.start + look.expected.len());
        let bytes = &mut memory.borrow_mut()[start..start + expected.len()];
        if !bytes.is_empty() && driver.try_read(stream, bound.address, bytes) != 0 {
            assert!(*fails);
            return;
        }
        looks.push(Look { stream, start, expected });
    }

    fn settle(&self) {
        for Look { stream, start, expected } in self.user.looks.take() {
            // Of a lost context nothing is to come.
            if self.user.driver.synchronize(stream) != 0 {
                assert!(self.user.fails);
                continue;
            }
            let memory = self.user.memory.borrow();
            assert!(memory[start..start + expected.len()] == *expected, "what a stream has read");
        }
    }
}

#[test]
fn any_settings_any_latencies_any_order() {
    if no_kernels() {
        return;
    }
    // Making a context takes long on a GPU, so it is kept there.
    let _kept = gpu_is_required().then(|| {
        drop(Device::cuda(0).unwrap());
        Driver::load().retain(0)
    });
    for seed in cases(300) {
        let mut case = Case::new(seed);
        case.fails &= !gpu_is_required();
        try_case(&case, "cuda any_settings", run);
    }
}

fn run(case: &Case) {
    let latency = [0, 20, 200][usize::try_from(case.seed % 3).unwrap()];
    let gpu = Gpu::new(&format!("seed={},random_latency_us={latency}", case.seed));
    drop(gpu.device());
    let driver = Driver::load();
    let retained = driver.retain(0);
    let user = User::new(driver, case.fails);
    let cuda = Cuda::new(case, &user);
    if case.fails {
        let at = 1 + cuda.random.borrow_mut().below(60);
        gpu.fake.iter().for_each(|fake| fake.fail_work(at, codes::ILLEGAL_ADDRESS));
    }
    case.run(&cuda);
    drop(cuda);
    wait_until_closed();
    drop((user, retained));
    if let Some(fake) = gpu.fake.as_ref().filter(|_| !case.fails) {
        assert_clean(fake, "a case");
    }
}
