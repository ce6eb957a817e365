//! Closures as sources: the same text once as windows that are read in any order, and once line
//! by line.
//!
//! `cargo run -p batchline --example closure_source`

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, DType, Device, FnDataset, HostTensor, IterSource,
    Sample, SampleSpec,
};

const TEXT: &str = include_str!("../LICENSE-APACHE");
const WINDOW: usize = 32;

fn main() -> Result<(), batchline::Error> {
    let settings = || AsyncDataLoaderConfig::builder().batch_size(64).device(Device::host());

    // Random access: a window of the text, and as its label the window one byte further on, as a
    // language model is trained. All workers call the closure at once.
    let spec = SampleSpec::new(DType::U8, &[WINDOW as u64])?.label(DType::U8, &[WINDOW as u64])?;
    let windows = FnDataset::new((TEXT.len() - WINDOW) as u64, spec, |index, sample| {
        let text = &TEXT.as_bytes()[usize::try_from(index)?..][..=WINDOW];
        let (input, label) = sample.input_and_label();
        input.copy_from_slice(&text[..WINDOW]);
        label.copy_from_slice(&text[1..]);
        Ok(())
    });
    let loader = AsyncDataLoader::new(windows, settings().shuffle(true).build()?)?;
    loader.start()?;
    let batch = loader.get_batch()?.expect("a first batch");
    let inputs = batch.input_tensor().to_vec::<u8>()?;
    let labels = batch.label_tensor().expect("a label").to_vec::<u8>()?;
    assert_eq!(inputs[1..WINDOW], labels[..WINDOW - 1], "the label is one byte ahead");
    println!(
        "{} windows of {WINDOW} bytes an epoch, shuffled; the first four:",
        TEXT.len() - WINDOW
    );
    for window in inputs.chunks(WINDOW).take(4) {
        println!("  {:?}", String::from_utf8_lossy(window));
    }
    drop(loader);

    // One after another: the length of each line. The closure makes a new iterator per epoch.
    let lengths = IterSource::new(|| {
        TEXT.lines().map(|line| Ok(Sample::new(HostTensor::scalar(line.len() as i64))))
    });
    let loader = AsyncDataLoader::from_source(lengths, settings().epochs(2).build()?)?;
    loader.start()?;
    let (mut lines, mut longest) = (0, 0);
    for batch in &loader {
        let lengths = batch?.input_tensor().to_vec::<i64>()?;
        lines += lengths.len();
        longest = longest.max(lengths.into_iter().max().unwrap_or(0));
    }
    println!("{lines} lines in two epochs, the longest of {longest} bytes");
    assert_eq!(lines, 2 * TEXT.lines().count());
    Ok(())
}
