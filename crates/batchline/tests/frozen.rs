//! Frozen chains: executed from many threads, dropped in flight, and failing.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use batchline::testing::{Fault, FaultControl, FaultPlan, faulty_device};
use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, CommandBuffer, CommandBufferPool, Conversion, Custom,
    DType, Delivery, Device, Error, FrozenCommands, Host, HostTensor, InMemory, MemoryManager,
    StagingBufferPool, Tensor,
};

/// A number on the device, and a chain that adds one to it.
struct Counter {
    memory: MemoryManager,
    commands: CommandBufferPool,
    number: Tensor,
    more: FrozenCommands,
}

impl Counter {
    fn new(device: &Device) -> Self {
        let memory = MemoryManager::new(device);
        let commands = CommandBufferPool::new(&memory, 2).unwrap();
        let number = memory.upload(&[0i32; 100], &[100]).unwrap();
        let mut buffer = commands.get_buffer().unwrap();
        let floats = memory.tensor(&[100], DType::F32).unwrap();
        let one = Conversion::new().scale_and_bias(&[1.0], &[1.0]);
        buffer.convert(&number, &floats, &one).unwrap();
        buffer.convert(&floats, &number, &Conversion::new()).unwrap();
        let more = buffer.freeze().unwrap();
        Self { memory, commands, number, more }
    }

    fn faulty(plan: FaultPlan) -> (Self, FaultControl) {
        let (device, control) = faulty_device(plan);
        (Self::new(&device), control)
    }

    fn number(&self) -> i32 {
        let numbers = self.number.to_vec::<i32>().unwrap();
        assert!(numbers.iter().all(|number| *number == numbers[0]), "{numbers:?}");
        numbers[0]
    }

    fn buffer(&self) -> CommandBuffer {
        self.commands.get_buffer().unwrap()
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what} did not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// None is lost and none overtakes another, though nobody waits.
#[test]
fn executions_from_many_threads_come_one_after_another() {
    let max_delay = Duration::from_micros(50);
    let faulty = faulty_device(FaultPlan { max_delay, ..FaultPlan::default() }).0;
    for device in [Device::host(), faulty] {
        let counter = Counter::new(&device);
        std::thread::scope(|threads| {
            for _ in 0..4 {
                threads.spawn(|| {
                    for _ in 0..25 {
                        drop(counter.more.execute().unwrap());
                    }
                });
            }
        });
        assert_eq!(counter.number(), 100);
    }
}

#[test]
fn the_recorder_goes_back_to_its_pool() {
    let counter = Counter::new(&Device::host());
    assert_eq!(counter.commands.stats().in_use, 0);
    counter.more.execute().unwrap().wait().unwrap();
    assert_eq!((counter.more.len(), counter.more.is_empty()), (2, false));
    assert_eq!(counter.more.device(), counter.memory.device());
    assert_eq!(counter.commands.stats().total, 1, "executions take none");
}

#[test]
fn what_is_done_only_once_is_refused() {
    let counter = Counter::new(&Device::host());
    let staging = StagingBufferPool::with_buffer_size(&counter.memory, 1, 1024).unwrap();
    type Record<'r> = &'r dyn Fn(&mut CommandBuffer);
    let cases: [(&str, Record<'_>); 3] = [
        ("an upload gives its staging buffer back", &|buffer| {
            buffer.upload(staging.get_buffer().unwrap(), &counter.number).unwrap();
        }),
        ("a download has one readback", &|buffer| {
            drop(buffer.download(&counter.number).unwrap());
        }),
        ("a custom operation can be called once", &|buffer| {
            let work = Custom::Host(Box::new(|_| panic!("never called")));
            buffer.custom(work, &[&counter.number], &[]).unwrap();
        }),
    ];
    for (words, record) in cases {
        let mut buffer = counter.buffer();
        buffer.fill(&counter.number, 1).unwrap();
        record(&mut buffer);
        let error = buffer.freeze().unwrap_err();
        assert!(matches!(error, Error::Record { operation: "a frozen chain", .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(counter.commands.stats().in_use, 0);
        assert_eq!(staging.stats().in_use, 0);
    }
    assert_eq!(counter.number(), 0, "nothing of it was done");
}

/// An execution waits for an upload that is held; then everything is dropped.
#[test]
fn what_is_in_flight_needs_no_handle() {
    let (counter, control) = Counter::faulty(FaultPlan::default());
    let staging = StagingBufferPool::with_buffer_size(&counter.memory, 1, 1024).unwrap();
    control.hold_transfers();
    let mut buffer = counter.buffer();
    let mut slot = staging.get_buffer().unwrap();
    slot.write(0, &[7i32; 100]).unwrap();
    buffer.upload(slot, &counter.number).unwrap();
    let upload = buffer.execute().unwrap();
    let executions = [counter.more.execute().unwrap(), counter.more.execute().unwrap()];
    let Counter { memory, commands, number, more } = counter;
    let (send, receive) = channel();
    let last = more.execute_async(move |result| send.send(result).unwrap()).unwrap();
    drop(more);
    std::thread::sleep(Duration::from_millis(5));
    assert!(executions.iter().all(|execution| !execution.is_done()));
    assert!(!last.is_done() && receive.try_recv().is_err());
    assert!(memory.stats().device_in_use >= 800, "the chain's tensors are in use");
    control.release();
    for submission in [upload, last].iter().chain(&executions) {
        submission.wait().unwrap();
    }
    receive.recv().unwrap().unwrap();
    assert_eq!(number.to_vec::<i32>().unwrap(), [10; 100]);
    drop((number, commands));
    eventually("the memory's return", || memory.stats().device_in_use == 0);
    assert_eq!(memory.stats().quarantined, 0);
}

/// A batch whose tensor a chain names counts as held.
#[test]
fn a_chain_holds_the_batches_that_it_names() {
    let memory = MemoryManager::new(&faulty_device(FaultPlan::default()).0);
    let data = InMemory::new(HostTensor::new(vec![5i32; 100], &[100]).unwrap()).unwrap();
    let config = AsyncDataLoaderConfig::builder().batch_size(4).memory_manager(memory.clone());
    let config = config.prefetch_depth(1).max_held(1).build().unwrap();
    let loader = AsyncDataLoader::new(data, config).unwrap();
    loader.start().unwrap();
    let commands = CommandBufferPool::new(&memory, 1).unwrap();
    let target = memory.tensor(&[4], DType::I32).unwrap();
    let mut chains = Vec::new();
    let began = Instant::now();
    let error = loop {
        match loader.try_get_batch() {
            Ok(Delivery::Ready(batch)) => {
                let mut buffer = commands.get_buffer().unwrap();
                buffer.copy(batch.input_tensor(), &target).unwrap();
                chains.push(buffer.freeze().unwrap());
            }
            Ok(Delivery::NotYet) => std::thread::sleep(Duration::from_millis(1)),
            Ok(Delivery::End) => panic!("there are more than outputs"),
            Err(error) => break error,
        }
        assert!(began.elapsed() < Duration::from_secs(20), "the consumer was not told");
    };
    let Error::TooManyHeld { held, max_held: 1 } = error else { panic!("{error}") };
    assert_eq!(held, chains.len());
    chains.iter().for_each(|chain| chain.execute().unwrap().wait().unwrap());
    assert_eq!(target.to_vec::<i32>().unwrap(), [5; 4]);
    chains.pop();
    assert!(loader.get_batch().unwrap().is_some());
}

#[test]
fn an_execution_that_did_not_reach_the_device_can_be_repeated() {
    let (counter, control) = Counter::faulty(FaultPlan::default());
    counter.more.execute().unwrap().wait().unwrap();
    control.inject(Fault::Submit);
    let (send, receive) = channel();
    let error = counter.more.execute_async(move |result| send.send(result).unwrap()).unwrap_err();
    assert!(error.chain().contains("a test made it fail"), "{}", error.chain());
    assert!(receive.recv().unwrap().is_err(), "its completion hears of it");
    counter.more.execute().unwrap().wait().unwrap();
    assert_eq!(counter.number(), 2);
}

#[test]
fn a_tensor_that_is_seen_on_the_host_is_not_written() {
    let counter = Counter::new(&Device::host());
    let view = counter.number.bind(&Host).unwrap();
    assert!(matches!(counter.more.execute(), Err(Error::Borrowed { .. })));
    drop(view);
    counter.more.execute().unwrap().wait().unwrap();
    assert_eq!(counter.number(), 1);
}

/// What may have reached the device is given up, and the device counts as lost.
#[test]
fn an_execution_of_which_nothing_is_known_gives_its_memory_up() {
    for panics in [false, true] {
        let nth = 4;
        let mut plan = FaultPlan::default();
        if panics {
            plan.panic_in_submit = Some(nth);
        } else {
            plan.fail_after_enqueue = Some(nth);
        }
        let (counter, control) = Counter::faulty(plan);
        while control.submissions() + 1 < nth {
            counter.more.execute().unwrap().wait().unwrap();
        }
        let (send, receive) = channel();
        let _ = counter.more.execute_async(move |result| send.send(result).unwrap()).unwrap_err();
        assert!(receive.recv().unwrap().is_err());
        assert!(counter.more.execute().unwrap_err().is_device_lost());
        let Counter { memory, more, number, .. } = counter;
        drop((more, number));
        eventually("the end of it", || memory.stats().quarantined >= 800);
        assert_eq!(memory.stats().device_in_use, 0);
    }
}

/// Executions in flight when the device goes end with its error, in every state.
#[test]
fn a_lost_device_ends_every_execution() {
    let (counter, control) = Counter::faulty(FaultPlan::default());
    let staging = StagingBufferPool::with_buffer_size(&counter.memory, 1, 1024).unwrap();
    control.hold_transfers();
    let mut buffer = counter.buffer();
    buffer.upload(staging.get_buffer().unwrap(), &counter.number).unwrap();
    let _upload = buffer.execute().unwrap();
    let executions: Vec<_> = (0..10).map(|_| counter.more.execute().unwrap()).collect();
    control.lose();
    for execution in &executions {
        assert!(execution.wait().unwrap_err().is_device_lost());
    }
    let (send, receive) = channel();
    let completion = move |result: batchline::Result<()>| send.send(result).unwrap();
    assert!(counter.more.execute_async(completion).unwrap_err().is_device_lost());
    assert!(receive.recv().unwrap().unwrap_err().is_device_lost());
    let Counter { memory, number, more, .. } = counter;
    drop((number, more));
    eventually("the end of it", || memory.stats().quarantined >= 800);
}

/// Random losses and delays: each execution ends, with or without an error.
#[test]
fn every_execution_ends() {
    for seed in 0..20 {
        let max_delay = Duration::from_micros(100);
        let lose_at = Some(5 + seed);
        let plan = FaultPlan { seed, max_delay, lose_at, ..FaultPlan::default() };
        let (counter, _) = Counter::faulty(plan);
        let executions: Vec<_> = (0..30).map_while(|_| counter.more.execute().ok()).collect();
        let Counter { more, .. } = counter;
        drop(more);
        let ended: Vec<_> = executions.iter().map(|execution| execution.wait()).collect();
        let good = ended.iter().take_while(|result| result.is_ok()).count();
        assert!(ended[good..].iter().all(|result| result.is_err()), "seed {seed}: {ended:?}");
        assert!(good < 30, "seed {seed}: the device was lost");
    }
}
