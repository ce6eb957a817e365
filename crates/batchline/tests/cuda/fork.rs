//! A process that uses a device is forked. CUDA does not survive that, and none of the threads
//! does: the child is told so by every call, at once, and the parent goes on.
#![allow(unsafe_code, reason = "forks")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use batchline::{
    AsyncDataLoader, CommandBuffer, CommandBufferPool, CudaStream, DType, Device, Error, GpuBatch,
    MemoryManager, StagingBuffer, StagingBufferPool, Submission, Tensor,
};

use crate::driver::{Driver, Gate};
use crate::{
    Gpu, assert_clean, builder, expected, in_a_child, no_kernels, numbers, threads,
    wait_until_closed,
};

/// Runs `body` in a child of this process, which must end well and soon. The driver that pretends
/// ends a child that calls it.
fn in_a_fork(body: impl FnOnce()) {
    // A thread at work may hold a lock that nobody releases in the child.
    threads::settle();
    // SAFETY: the child runs `body` on the one thread that it has, and ends.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "no child");
    if child == 0 {
        // SAFETY: a number.
        unsafe { libc::alarm(20) };
        let ended = catch_unwind(AssertUnwindSafe(body));
        // SAFETY: nothing of the parent's is ended.
        unsafe { libc::_exit(i32::from(ended.is_err())) };
    }
    let mut status = 0;
    // SAFETY: our child, and a place for the answer.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed, or a signal ended it");
}

/// Handles of all kinds.
struct Handles {
    device: Device,
    memory: MemoryManager,
    tensor: Tensor,
    staging: StagingBufferPool,
    buffer: StagingBuffer,
    commands: CommandBufferPool,
    recorded: CommandBuffer,
    /// In flight behind what a user's stream is held with.
    submission: Submission,
    filled: Tensor,
    loader: AsyncDataLoader,
    batch: GpuBatch,
}

impl Handles {
    fn new(device: Device, stream: CudaStream) -> (Self, Gate) {
        let memory = MemoryManager::new(&device);
        let tensor = memory.upload(&[1u8, 2, 3], &[3]).unwrap();
        let filled = memory.tensor(&[3], DType::U8).unwrap();
        let staging = StagingBufferPool::with_buffer_size(&memory, 1, 256).unwrap();
        let buffer = staging.get_buffer().unwrap();
        let commands = CommandBufferPool::new(&memory, 2).unwrap();
        let mut recorded = commands.get_buffer().unwrap();
        recorded.fill(&tensor, 9u8).unwrap();
        let loader = AsyncDataLoader::new(numbers(400), builder(&memory).build().unwrap()).unwrap();
        loader.start().unwrap();
        let batch = loader.get_batch().unwrap().unwrap();
        batch.bind(&stream).unwrap();

        let gate = Driver::load().hold(stream);
        filled.bind(&stream).unwrap();
        drop(filled);
        // The same memory again.
        let filled = memory.tensor(&[3], DType::U8).unwrap();
        let mut fill = commands.get_buffer().unwrap();
        fill.fill(&filled, 4u8).unwrap();
        let submission = fill.execute().unwrap();
        let handles = Self {
            device,
            memory,
            tensor,
            staging,
            buffer,
            commands,
            recorded,
            submission,
            filled,
            loader,
            batch,
        };
        (handles, gate)
    }

    /// Uses all of them in a child, and drops them.
    fn use_in_vain(self, stream: CudaStream) {
        let Self { device, memory, tensor, staging, commands, loader, batch, .. } = &self;
        let lost = format!(
            "{} is lost (it was opened before this process was forked); open the device anew, or \
             restart the process",
            device.info().name
        );
        let told = |error: Option<Error>| assert_eq!(error.expect("an error").to_string(), lost);
        told(device.check().err());
        told(memory.tensor(&[3], DType::U8).err());
        told(memory.tensor(&[123_456], DType::U8).err());
        told(memory.upload(&[1u8], &[1]).err());
        told(tensor.to_vec::<u8>().err());
        told(tensor.write(&[1u8, 2, 3]).err());
        told(self.filled.copy_from(tensor).err());
        told(tensor.bind(&stream).err());
        told(batch.bind(&stream).err());
        told(commands.get_buffer().err());
        told(staging.get_buffer().err());
        told(staging.wait_for_transfer_completion().err());
        told(staging.transfer_to_gpu(&[1u8, 2, 3], tensor).err());
        told(loader.get_batch().err());
        told(loader.try_get_batch().err());
        told(loader.get_batch_timeout(Duration::from_secs(60)).err());
        told(loader.start().err());
        told(loader.stop().err());
        told(self.recorded.execute().err());
        assert_eq!(
            self.submission.wait().unwrap_err().to_string(),
            "cannot record a wait: it was submitted before this process was forked"
        );
        assert_eq!(
            Device::cuda(0).unwrap_err().to_string(),
            "no cuda device: CUDA was in use when this process was forked; fork before the first \
             use of CUDA, or start a new program"
        );
        self.staging.cleanup();
        self.commands.cleanup();
    }

    /// Uses all of them in the parent.
    fn go_on(self) {
        self.submission.wait().unwrap();
        assert_eq!(self.filled.to_vec::<u8>().unwrap(), [4; 3]);
        self.recorded.execute().unwrap().wait().unwrap();
        assert_eq!(self.tensor.to_vec::<u8>().unwrap(), [9; 3]);
        assert_eq!(self.batch.input_tensor().to_bytes().unwrap(), expected(0));
        drop(self.buffer);
        self.staging.transfer_to_gpu_sync(&[5u8; 3], &self.tensor).unwrap();
        drop(self.batch);
        for number in 1..100 {
            let batch = self.loader.get_batch().unwrap().unwrap();
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number));
        }
        assert!(self.loader.get_batch().unwrap().is_none());
        self.loader.stop().unwrap();
    }
}

#[test]
fn a_child_is_told_and_the_parent_goes_on() {
    if no_kernels() || !in_a_child("fork::a_child_is_told_and_the_parent_goes_on") {
        return;
    }
    let gpu = Gpu::new("");
    let device = gpu.device();
    let driver = Driver::load();
    let context = driver.retain(0);
    let stream = driver.stream();
    let (handles, gate) = Handles::new(device, stream);
    let mut handles = Some(handles);
    in_a_fork(|| handles.take().unwrap().use_in_vain(stream));
    gate.open();
    handles.unwrap().go_on();
    wait_until_closed();
    driver.destroy(stream);
    drop(context);
    gpu.fake.iter().for_each(|fake| assert_clean(fake, "the parent"));
}

/// Without a loader, the threads of which would keep the device: its last handle goes in the child.
#[test]
fn a_child_drops_the_device() {
    if no_kernels() || !in_a_child("fork::a_child_drops_the_device") {
        return;
    }
    let gpu = Gpu::new("");
    let memory = MemoryManager::new(&gpu.device());
    let tensor = memory.upload(&[1u8, 2, 3], &[3]).unwrap();
    let mut handles = Some((memory, tensor));
    in_a_fork(|| drop(handles.take()));
    assert_eq!(handles.unwrap().1.to_vec::<u8>().unwrap(), [1, 2, 3]);
}
