//! Batches as an iterator and as a stream.

use super::AsyncDataLoader;
use crate::{GpuBatch, Result};

/// The batches of a loader, in order. See [`AsyncDataLoader::batches`].
#[derive(Debug)]
#[must_use = "batches come when they are asked for"]
pub struct Batches<'l> {
    loader: &'l AsyncDataLoader,
    over: bool,
}

impl<'l> Batches<'l> {
    pub(super) fn new(loader: &'l AsyncDataLoader) -> Self {
        Self { loader, over: false }
    }
}

impl Iterator for Batches<'_> {
    type Item = Result<GpuBatch>;

    fn next(&mut self) -> Option<Result<GpuBatch>> {
        if self.over {
            return None;
        }
        let next = self.loader.get_batch().transpose();
        self.over = is_ending(next.as_ref());
        next
    }
}

impl std::iter::FusedIterator for Batches<'_> {}

impl<'l> IntoIterator for &'l AsyncDataLoader {
    type Item = Result<GpuBatch>;
    type IntoIter = Batches<'l>;

    fn into_iter(self) -> Batches<'l> {
        self.batches()
    }
}

impl Iterator for AsyncDataLoader {
    type Item = Result<GpuBatch>;

    /// The next batch. An error is repeated for as long as one asks; [`AsyncDataLoader::batches`]
    /// ends after it.
    fn next(&mut self) -> Option<Result<GpuBatch>> {
        self.get_batch().transpose()
    }
}

/// Whether nothing comes after this item.
fn is_ending(item: Option<&Result<GpuBatch>>) -> bool {
    match item {
        Some(Ok(_)) => false,
        None | Some(Err(_)) => true,
    }
}

#[cfg(feature = "async")]
mod stream {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use super::super::Delivery;
    use super::{AsyncDataLoader, is_ending};
    use crate::memory::Patience;
    use crate::{GpuBatch, Result};

    /// The batches of a loader, in order. See [`AsyncDataLoader::stream`].
    #[derive(Debug)]
    #[must_use = "batches come when they are polled for"]
    pub struct BatchStream<'l> {
        loader: &'l AsyncDataLoader,
        over: bool,
    }

    impl<'l> BatchStream<'l> {
        pub(in super::super) fn new(loader: &'l AsyncDataLoader) -> Self {
            Self { loader, over: false }
        }
    }

    impl futures_core::Stream for BatchStream<'_> {
        type Item = Result<GpuBatch>;

        fn poll_next(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Self::Item>> {
            if self.over {
                return Poll::Ready(None);
            }
            let delivery = self
                .loader
                .pipeline()
                .and_then(|pipeline| pipeline.next(Patience::None, Some(context.waker())));
            let next = match delivery {
                Ok(Delivery::NotYet) => return Poll::Pending,
                Ok(Delivery::Ready(batch)) => Some(Ok(batch)),
                Ok(Delivery::End) => None,
                Err(error) => Some(Err(error)),
            };
            self.over = is_ending(next.as_ref());
            Poll::Ready(next)
        }
    }
}

#[cfg(feature = "async")]
pub use stream::BatchStream;
