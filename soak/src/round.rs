//! One round: a device, and one or two tasks that work on it at the same time.

use batchline::MemoryLimits;

use crate::bench::{Bench, Devices, Setting};
use crate::pools::PoolRound;
use crate::random::Random;
use crate::stream::StreamRound;

#[derive(Debug, Clone)]
enum Task {
    Stream(Box<StreamRound>),
    Pools(PoolRound),
}

impl Task {
    fn run(&self, bench: &Bench) {
        match self {
            Task::Stream(stream) => stream.run(bench),
            Task::Pools(pools) => pools.run(bench),
        }
    }
}

/// What a round does; all of it follows from its seed.
#[derive(Debug, Clone)]
pub struct Round {
    setting: Setting,
    tasks: Vec<Task>,
}

impl Round {
    pub fn new(seed: u64, devices: Devices) -> Self {
        let mut random = Random::new(seed, 0);
        let task = |seed, pools, alone| match pools {
            true => Task::Pools(PoolRound::new(seed)),
            false => Task::Stream(Box::new(StreamRound::new(seed, alone))),
        };
        let alone = !random.one_in(5);
        let mut tasks = vec![task(seed, alone && random.one_in(6), alone)];
        if !alone {
            // Another loader, or the pools, on the same device's memory.
            tasks.push(task(!seed, random.one_in(2), false));
        }
        Self { setting: Setting::new(seed, devices), tasks }
    }

    /// # Panics
    /// Something is not as it must be.
    pub fn run(&self) {
        let limits = match &self.tasks[..] {
            [Task::Stream(stream)] => stream.limit().map(|(device, staging)| {
                MemoryLimits::default().device_limit(device).staging_limit(staging)
            }),
            _ => None,
        };
        let bench = Bench::new(self.setting, limits.unwrap_or_default());
        std::thread::scope(|scope| {
            let others: Vec<_> =
                self.tasks[1..].iter().map(|task| scope.spawn(|| task.run(&bench))).collect();
            self.tasks[0].run(&bench);
            for other in others {
                other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            }
        });
        bench.close();
    }
}

/// Has whatever is made once, and stays, made before anything is measured.
pub fn warm_up(devices: Devices) {
    let bench = Bench::new(Setting::new(0, devices), MemoryLimits::default());
    PoolRound::new(0).run(&bench);
    bench.close();
    #[cfg(feature = "cuda")]
    if devices == Devices::Cuda {
        // A driver makes threads of its own when something is used for the first time.
        (0..30).for_each(|number| Round::new(u64::MAX / 2 + number, devices).run());
    }
    #[cfg(feature = "wgpu")]
    {
        let memory = batchline::MemoryManager::new(&crate::bench::wgpu(false));
        let tensor = memory.upload(&[1u8; 64], &[64]).expect("a tensor");
        assert_eq!(tensor.to_vec::<u8>().expect("its bytes"), [1; 64]);
    }
}
