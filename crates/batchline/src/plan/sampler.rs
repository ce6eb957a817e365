//! In which order samples come.

use super::permutation::{Permutation, mix};

/// The order of an epoch, as a closed formula: what comes at a position can be asked without
/// asking for the positions before it. So a shuffle takes no memory, a batch is known without the
/// ones before it, and a resume costs nothing.
///
/// ```
/// use batchline::Sampler;
///
/// /// Every class as often as every other: 1000 draws an epoch.
/// struct Balanced {
///     by_class: Vec<Vec<u64>>,
/// }
///
/// impl Sampler for Balanced {
///     fn len(&self) -> u64 {
///         1000
///     }
///     fn index(&self, epoch: u64, position: u64) -> u64 {
///         let class = &self.by_class[(position as usize) % self.by_class.len()];
///         let draw = batchline::mix(&[epoch, position]);
///         class[(draw % class.len() as u64) as usize]
///     }
///     fn fingerprint(&self) -> u64 {
///         batchline::mix(&[0xba1a, self.by_class.len() as u64])
///     }
/// }
/// ```
pub trait Sampler: Send + Sync {
    /// The number of positions in an epoch. It must not change.
    fn len(&self) -> u64;

    /// Whether an epoch has no positions.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sample at a position, which is below [`len`](Self::len). The same arguments must give
    /// the same sample, always. An index outside the data set is an error of that sample.
    fn index(&self, epoch: u64, position: u64) -> u64;

    /// The samples at the positions from `first` on, all of them below [`len`](Self::len). An order
    /// that has something to prepare per epoch does it here once for many.
    fn indices(&self, epoch: u64, first: u64, indices: &mut [u64]) {
        for (position, index) in (first..).zip(indices) {
            *index = self.index(epoch, position);
        }
    }

    /// A number that tells this order from others, so that a saved state is not continued in
    /// another order.
    fn fingerprint(&self) -> u64;
}

macro_rules! forward_sampler {
    ($($pointer:ty),*) => {$(
        #[deny(clippy::missing_trait_methods)]
        impl<S: Sampler + ?Sized> Sampler for $pointer {
            fn len(&self) -> u64 {
                (**self).len()
            }
            fn is_empty(&self) -> bool {
                (**self).is_empty()
            }
            fn index(&self, epoch: u64, position: u64) -> u64 {
                (**self).index(epoch, position)
            }
            fn indices(&self, epoch: u64, first: u64, indices: &mut [u64]) {
                (**self).indices(epoch, first, indices);
            }
            fn fingerprint(&self) -> u64 {
                (**self).fingerprint()
            }
        }
    )*};
}

forward_sampler!(Box<S>, std::sync::Arc<S>);

/// Every sample once, in the data set's own order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequential {
    len: u64,
}

impl Sequential {
    /// The order `0..len`.
    pub fn new(len: u64) -> Self {
        Self { len }
    }
}

impl Sampler for Sequential {
    fn len(&self) -> u64 {
        self.len
    }

    fn index(&self, _: u64, position: u64) -> u64 {
        position
    }

    fn fingerprint(&self) -> u64 {
        mix(&[0x5e9, self.len])
    }
}

/// Every sample once, in an order that depends on the seed and the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shuffled {
    len: u64,
    seed: u64,
}

impl Shuffled {
    /// The orders of `0..len` that belong to `seed`.
    pub fn new(len: u64, seed: u64) -> Self {
        Self { len, seed }
    }

    fn order(&self, epoch: u64) -> Permutation {
        Permutation::new(self.len, mix(&[self.seed, epoch]))
    }
}

impl Sampler for Shuffled {
    fn len(&self) -> u64 {
        self.len
    }

    fn index(&self, epoch: u64, position: u64) -> u64 {
        self.order(epoch).index(position)
    }

    fn indices(&self, epoch: u64, first: u64, indices: &mut [u64]) {
        self.order(epoch).indices(first, indices);
    }

    fn fingerprint(&self) -> u64 {
        mix(&[0x54f, self.len, self.seed])
    }
}
