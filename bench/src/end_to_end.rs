//! Whole runs over the data sets that the tool offers: computed ones and the digits.

use batchline::{AsyncDataLoader, AsyncDataLoaderConfig, Device, Host, SampleBuffer, formats};

use crate::measure::{Contestant, Scale, interleave, timed};
use crate::report::Report;

pub fn measure(scale: Scale, report: &mut Report) {
    let digits = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/digits");
    let sets = [
        ("digits, 8x8 u8", digits, 100, 64),
        ("synthetic 3x224x224 u8", "synthetic:4096,3x224x224,u8", 2, 256),
        ("synthetic 28x28 f32", "synthetic:100000,28x28,f32", 2, 256),
    ];
    report.row("end to end", "whole runs, 2 workers, shuffled, beside reads of one thread");
    for (name, spec, epochs, batch) in sets {
        let epochs = scale.pick(epochs, 1);
        verify(spec, batch);
        let samples = formats::open(spec).expect("it is there").len() as f64 * epochs as f64;
        let ours = || {
            let loader = loader(spec, batch, epochs);
            let (time, ()) = timed(|| {
                loader.start().expect("it starts");
                while loader.get_batch().expect("nothing fails").is_some() {}
            });
            samples / time.as_secs_f64()
        };
        let reads = || {
            let dataset = formats::open(spec).expect("it is there");
            let mut sample = SampleBuffer::new(dataset.spec()).expect("samples have a size");
            let (time, ()) = timed(|| {
                for index in (0..epochs).flat_map(|_| 0..dataset.len()) {
                    sample.fill(|window| dataset.read(index, window)).expect("nothing fails");
                }
            });
            samples / time.as_secs_f64()
        };
        let contestants = vec![
            Contestant::new("batchline", ours),
            Contestant::new("reads into one sample", reads),
        ];
        let series = interleave(scale.pick(5, 1), "samples/s", contestants);
        report.compare(format!("{name}, batch {batch}"), &series[0], &series[1], None);
    }
}

fn loader(spec: &str, batch: u64, epochs: u64) -> AsyncDataLoader {
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(batch)
        .epochs(epochs)
        .shuffle(true)
        .device(Device::host())
        .build()
        .expect("the settings are good");
    AsyncDataLoader::new(formats::open(spec).expect("it is there"), config).expect("samples")
}

/// Compares all that is delivered with what a plain read of the same samples gives.
fn verify(spec: &str, batch: u64) {
    use batchline::Sampler;
    let dataset = formats::open(spec).expect("it is there");
    let order = batchline::Shuffled::new(dataset.len(), 0);
    let mut sample = SampleBuffer::new(dataset.spec()).expect("samples have a size");
    let loader = loader(spec, batch, 1);
    loader.start().expect("it starts");
    let mut position = 0;
    while let Some(batch) = loader.get_batch().expect("nothing fails") {
        let inputs = batch.input_tensor().bind(&Host).expect("the host's memory");
        let labels = batch.label_tensor().expect("labels").bind(&Host).expect("the host's memory");
        let rows = usize::try_from(batch.len()).expect("a batch");
        let (input, label) = (inputs.bytes().len() / rows, labels.bytes().len() / rows);
        for row in 0..rows {
            sample
                .fill(|window| dataset.read(order.index(0, position), window))
                .expect("nothing fails");
            assert!(sample.bytes(0) == &inputs.bytes()[row * input..][..input], "input {position}");
            assert!(sample.bytes(1) == &labels.bytes()[row * label..][..label], "label {position}");
            position += 1;
        }
    }
    assert_eq!(position, dataset.len(), "samples are missing");
}
