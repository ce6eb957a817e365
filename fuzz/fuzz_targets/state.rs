//! Saved states: what is accepted is saved again as it was; and whatever a state says, a loader
//! refuses it or goes on exactly where it says.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, DType, Delivery, Device, Error, FnDataset, HostTensor,
    IterSource, LoaderState, MemoryManager, Sample, SampleMut, SampleSpec,
};
use batchline_fuzz::check_error;
use libfuzzer_sys::fuzz_target;

const SAMPLES: i64 = 10;
const BATCH: u64 = 4;
/// Batches of an epoch.
const BATCHES: u64 = 3;
const EPOCHS: u64 = 3;
/// More than an epoch, so that its end is met.
const TAKEN: usize = 5;

static MEMORY: LazyLock<MemoryManager> = LazyLock::new(|| MemoryManager::new(&Device::host()));

fuzz_target!(|text: &str| {
    let accepted = LoaderState::from_json(text);
    if let Ok(state) = &accepted {
        assert_eq!(LoaderState::from_json(&state.to_json()).as_ref().ok(), Some(state));
    }
    // The checksum would keep nearly everything out: take what it is about by itself.
    let value: Option<serde_json::Value> = serde_json::from_str(text).ok();
    let inner = value.as_ref().map(|value| value.pointer("/state").unwrap_or(value).clone());
    let state = inner.and_then(|inner| serde_json::from_value::<LoaderState>(inner).ok());
    match (&accepted, &state) {
        (Ok(accepted), state) => assert_eq!(Some(accepted), state.as_ref()),
        (Err(error), _) => check_error(error),
    }
    let Some(state) = state else { return };
    let signed = LoaderState::from_json(&state.to_json());
    match &signed {
        Ok(signed) => assert_eq!(signed, &state),
        Err(error) => check_error(error),
    }
    assert_eq!(signed.is_ok(), state.version == LoaderState::VERSION);
    for stream in [Stream::Planned, Stream::Endless, Stream::Pulled] {
        // As it is, it is another stream's, unless by chance.
        if let Err(error) = stream.loader(Some(state.clone())) {
            check_error(&error);
        }
        let mut own = stream.loader(None).expect("sound settings").state();
        own.version = state.version;
        (own.epoch, own.position) = (state.epoch, state.position);
        own.skipped.clone_from(&state.skipped);
        go_on(stream, own);
    }
});

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stream {
    Planned,
    Endless,
    Pulled,
}

impl Stream {
    fn loader(self, resume: Option<LoaderState>) -> Result<AsyncDataLoader, Error> {
        let mut config = AsyncDataLoaderConfig::builder()
            .batch_size(BATCH)
            .workers(1)
            .prefetch_depth(1)
            .memory_manager(MEMORY.clone());
        config = if self == Stream::Endless { config.endless() } else { config.epochs(EPOCHS) };
        if let Some(state) = resume {
            config = config.resume_from(state);
        }
        if self == Stream::Pulled {
            let source = IterSource::new(|| {
                (0..SAMPLES).map(|number| Ok(Sample::new(HostTensor::scalar(number))))
            });
            return AsyncDataLoader::from_source(source, config.build()?);
        }
        let spec = SampleSpec::new(DType::I64, &[])?;
        let read =
            |index: u64, sample: &mut SampleMut<'_>| Ok(sample.write(0, &[index.cast_signed()])?);
        AsyncDataLoader::new(FnDataset::new(SAMPLES.unsigned_abs(), spec, read), config.build()?)
    }
}

/// Goes on from a state that fits the stream but for the place, and checks each batch and each
/// state on the way.
fn go_on(stream: Stream, state: LoaderState) {
    let (mut epoch, mut position) = (state.epoch, state.position);
    let loader = match stream.loader(Some(state.clone())) {
        Ok(loader) => loader,
        Err(error) => {
            assert!(matches!(error, Error::State { .. }), "{error:?}");
            return check_error(&error);
        }
    };
    assert_eq!(loader.state(), state);
    loader.start().expect("it starts");
    for _ in 0..TAKEN {
        let delivery = loader.get_batch_timeout(Duration::from_secs(20));
        if stream == Stream::Pulled && position > BATCHES && epoch < EPOCHS {
            let error = delivery.expect_err("the source does not reach so far");
            return check_error(&error);
        }
        if position >= BATCHES {
            (epoch, position) = (epoch.saturating_add(1), 0);
        }
        match delivery.expect("a batch or the end") {
            Delivery::Ready(batch) => {
                let first = position.cast_signed() * BATCH.cast_signed();
                let expected: Vec<i64> =
                    (first..SAMPLES.min(first + BATCH.cast_signed())).collect();
                assert_eq!(batch.input_tensor().to_vec::<i64>().expect("its elements"), expected);
            }
            Delivery::End => {
                assert!(stream != Stream::Endless && epoch >= EPOCHS, "it ends in epoch {epoch}");
                break;
            }
            Delivery::NotYet => panic!("it hangs"),
        }
        assert!(stream == Stream::Endless || epoch < EPOCHS, "it goes on in epoch {epoch}");
        position += 1;
        // A pull source does not know its last batch.
        if stream != Stream::Pulled && position == BATCHES {
            (epoch, position) = (epoch + 1, 0);
        }
        let now = loader.state();
        assert_eq!((now.epoch, now.position), (epoch, position));
        assert_eq!(now.skipped, state.skipped);
    }
    loader.stop().expect("it stops");
}
