//! Several tensors per sample: sentences of different lengths, padded, with a label, a mask that
//! tells words from padding, and a weight for the loss.
//!
//! `cargo run -p batchline --example several_tensors`

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, DType, Device, FnDataset, Host, SampleSpec,
};

const LONGEST: usize = 16;

/// A made-up corpus: sentence `index` as numbers of words.
fn sentence(index: u64) -> Vec<i32> {
    (0..1 + index % LONGEST as u64).map(|word| ((index * 7 + word * 3) % 1000) as i32).collect()
}

fn main() -> Result<(), batchline::Error> {
    // The window of each tensor holds an earlier batch's bytes, so every one is filled whole.
    let spec = SampleSpec::new(DType::I32, &[LONGEST as u64])?
        .label(DType::I64, &[])?
        .weight("mask", DType::Bool, &[LONGEST as u64])?
        .weight("importance", DType::F32, &[])?;
    let sentences = FnDataset::new(1000, spec, |index, sample| {
        let words = sentence(index);
        let (used, padding) = sample.elements::<i32>(0)?.split_at_mut(words.len());
        used.copy_from_slice(&words);
        padding.fill(-1);
        sample.write(1, &[i64::try_from(index % 2)?])?;
        for (place, inside) in sample.weight(0).iter_mut().enumerate() {
            *inside = u8::from(place < words.len());
        }
        let importance = 1.0 / words.len() as f32;
        Ok(sample.write(3, &[importance])?)
    });

    let config = AsyncDataLoaderConfig::builder()
        .batch_size(100)
        .workers(4)
        .shuffle(true)
        .device(Device::host())
        .build()?;
    let loader = AsyncDataLoader::new(sentences, config)?;
    loader.start()?;
    let (mut words, mut padding, mut importance) = (0u64, 0u64, 0f64);
    for batch in &loader {
        let batch = batch?;
        if batch.batch_id() == 0 {
            for tensor in batch.spec().tensors() {
                let shape = batch.tensor(&tensor.name).expect("named in the spec").shape();
                println!("{:20} in a batch: {shape}", tensor.to_string());
            }
        }
        let bound = batch.bind(&Host)?;
        let numbers = bound.input().as_slice::<i32>()?;
        let [mask, weight] = bound.weights() else { unreachable!("the spec has two weights") };
        for (number, inside) in numbers.iter().zip(mask.bytes()) {
            assert_eq!(*number >= 0, *inside == 1, "the mask covers the words");
            (words, padding) = (words + u64::from(*inside), padding + u64::from(1 - *inside));
        }
        importance += weight.as_slice::<f32>()?.iter().map(|one| f64::from(*one)).sum::<f64>();
    }
    println!("{words} words and {padding} places of padding; importance {importance:.2} in all");
    assert_eq!(words, (0..1000).map(|index| sentence(index).len() as u64).sum::<u64>());
    Ok(())
}
