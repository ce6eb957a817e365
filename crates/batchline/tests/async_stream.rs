//! The stream wakes its task when there is something, and not otherwise.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use batchline::{AsyncDataLoader, AsyncDataLoaderConfig, DType, Device, FnDataset, SampleSpec};
use futures_core::Stream;

#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn it_wakes_without_polling_and_ends() {
    let spec = SampleSpec::new(DType::I64, &[]).unwrap();
    let dataset = FnDataset::new(20, spec, |index, sample| {
        std::thread::sleep(Duration::from_millis(1));
        if index == 17 {
            return Err("enough".into());
        }
        Ok(sample.write(0, &[index.cast_signed()])?)
    });
    let config =
        AsyncDataLoaderConfig::builder().batch_size(5).device(Device::host()).build().unwrap();
    let loader = AsyncDataLoader::new(dataset, config).unwrap();
    loader.start().unwrap();
    let mut stream = loader.stream();
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    let mut context = Context::from_waker(&waker);
    let (mut batches, mut polls) = (0, 0);
    let error = loop {
        polls += 1;
        match Pin::new(&mut stream).poll_next(&mut context) {
            Poll::Ready(Some(Ok(batch))) => {
                assert_eq!(batch.batch_id(), batches);
                batches += 1;
            }
            Poll::Ready(Some(Err(error))) => break error,
            Poll::Ready(None) => panic!("an error was to come"),
            Poll::Pending => {
                let seen = count.0.load(Ordering::SeqCst);
                let deadline = Instant::now() + Duration::from_secs(10);
                while count.0.load(Ordering::SeqCst) == seen {
                    assert!(Instant::now() < deadline, "never woken");
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        }
    };
    assert_eq!(batches, 3);
    assert!(error.chain().contains("enough"));
    assert!(polls <= 4 + 1 + count.0.load(Ordering::SeqCst), "{polls} polls");
    assert!(matches!(Pin::new(&mut stream).poll_next(&mut context), Poll::Ready(None)));
}
