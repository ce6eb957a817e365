//! tmp
pub(crate) fn mix(words: &[u64]) -> u64 { words.iter().sum() }
