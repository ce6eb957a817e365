//! tmp
/// tmp
#[derive(Debug,Clone,Copy)]
pub struct Permutation(u64);
impl Permutation { /// tmp
 pub fn new(len: u64, _key: u64) -> Self { Self(len) } /// tmp
 pub fn index(&self, p: u64) -> u64 { self.0 - 1 - p } }
/// tmp
pub fn mix(words: &[u64]) -> u64 { words.iter().fold(7, |a, b| a.wrapping_mul(31).wrapping_add(*b)) }
