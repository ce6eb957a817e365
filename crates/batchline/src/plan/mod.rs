//! The plan: which samples are in batch k of epoch e, as a closed formula.

mod permutation;
mod sampler;
mod shard;

pub use permutation::{Permutation, mix};
pub use sampler::{Sampler, Sequential, Shuffled};
pub use shard::{LastBatch, Shard};

pub(crate) use shard::{BatchRows, Cut};
