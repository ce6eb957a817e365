//! A shuffled order that is computed, not stored.
//!
//! An epoch over a billion samples needs each index once, in an order that a saved state brings
//! back exactly. A shuffled list would be 8 GB, and resuming in its middle would shuffle it all
//! again. A [`Permutation`] is some numbers instead, and any position of it is had at once.
//!
//! # Construction
//!
//! A **Feistel network** on `k`-bit numbers: the number is cut into a left and a right part, and
//! in each round one part is changed by XOR with a hash of the other part and of the round's key;
//! then they change places. Whatever the hash, a round can be undone (the part that went into it
//! is still there), so the network is a bijection. M. Luby and C. Rackoff ("How to construct
//! pseudorandom permutations from pseudorandom functions", SIAM Journal on Computing 17(2), 1988)
//! showed that with a good hash three or four rounds can't be told from a random bijection by
//! those who see few of the values. We show all, and the parts have as few as four bits, so there
//! are [`ROUNDS`]. If `k` is odd, one part is a bit longer.
//!
//! To get from `0..2^k` to `0..len`, **cycle walking** (J. Black and P. Rogaway, "Ciphers with
//! arbitrary finite domains", CT-RSA 2002): a result that is `len` or more goes through the network
//! again, until one is not. The walk follows a cycle of the large bijection that began within
//! `0..len`, so it ends there, at the latest where it began; and leaving out those in between
//! leaves a bijection. As `2^k` is less than twice `len` (but for the smallest), the network runs
//! less than twice on average.
//!
//! None of this is secret: the order should look random to training, not to an adversary.

/// Rounds of the network, an even number. With two the tests below fail; with four they do if given
/// 400,000 keys; with six they don't.
const ROUNDS: usize = 8;

/// Least `k`. With 6, and parts of three bits, millions of keys show some orders of five numbers to
/// be more frequent than others by some tenths of a percent, however many the rounds; with 8 they
/// don't. It makes walks long where the data set is tiny: 256 / `len` runs on average.
const LEAST_BITS: u32 = 8;

/// Numbers that go through the network side by side. A round waits for the one before, and the
/// processor has room for several: 10 ns for each of eight, where one after the other took 26.
const ABREAST: usize = 8;

/// An order of `0..len` that depends on a key: each number occurs once.
///
/// It takes no memory to speak of and no time to make, and each position is computed on its own, in
/// some tens of nanoseconds (where `len` is below ten, a microsecond or two). What it computes is
/// part of the format of saved states, and so stays the same from release to release and on every
/// machine.
///
/// ```
/// use batchline::Permutation;
/// let order = Permutation::new(5, 42);
/// let mut indices: Vec<u64> = (0..order.len()).map(|i| order.index(i)).collect();
/// indices.sort();
/// assert_eq!(indices, [0, 1, 2, 3, 4]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permutation {
    len: u64,
    /// Bits of the left part, at the top.
    left: u32,
    /// Bits of the right part, as many or one more.
    right: u32,
    /// Per round.
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The order of `0..len` that belongs to the key. Equal arguments give equal orders; keys that
    /// differ, though it be by 1, give orders that have nothing to do with each other.
    pub fn new(len: u64, key: u64) -> Self {
        let bits = (u64::BITS - len.saturating_sub(1).leading_zeros()).max(LEAST_BITS);
        let keys = std::array::from_fn(|round| mix(&[key, round as u64]));
        Self { len, left: bits / 2, right: bits - bits / 2, keys }
    }

    /// How many numbers there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number at this position.
    ///
    /// # Panics
    /// When `position` is not less than [`len`](Self::len).
    pub fn index(&self, position: u64) -> u64 {
        assert!(position < self.len, "position {position} of a permutation of {}", self.len);
        let mut index = position;
        loop {
            index = self.network(index);
            if index < self.len {
                return index;
            }
        }
    }

    /// The numbers at the positions from `first` on. They are found side by side, several times
    /// faster than one after the other.
    ///
    /// # Panics
    /// When not all positions are less than [`len`](Self::len).
    pub fn indices(&self, first: u64, indices: &mut [u64]) {
        let end = first.checked_add(indices.len() as u64).filter(|end| *end <= self.len);
        assert!(end.is_some(), "positions from {first} on of a permutation of {}", self.len);
        let (groups, rest) = indices.as_chunks_mut::<ABREAST>();
        let mut next = first;
        for group in groups {
            *group = self.networks(std::array::from_fn(|place| next + place as u64));
            next += ABREAST as u64;
        }
        for (position, index) in (next..).zip(rest) {
            *index = self.network(position);
        }
        for index in indices {
            while *index >= self.len {
                *index = self.network(*index);
            }
        }
    }

    /// [`network`](Self::network) of several numbers, a round of all of them at a time.
    fn networks(&self, numbers: [u64; ABREAST]) -> [u64; ABREAST] {
        let mut left = numbers.map(|number| number >> self.right);
        let mut right = numbers.map(|number| number & (u64::MAX >> (u64::BITS - self.right)));
        for keys in self.keys.chunks_exact(2) {
            for (left, right) in left.iter_mut().zip(&right) {
                *left ^= scramble(right ^ keys[0]) >> (u64::BITS - self.left);
            }
            for (left, right) in left.iter().zip(&mut right) {
                *right ^= scramble(left ^ keys[1]) >> (u64::BITS - self.right);
            }
        }
        std::array::from_fn(|place| left[place] << self.right | right[place])
    }

    /// The bijection of `0..2^(left + right)`. Instead of changing places, the parts take turns.
    fn network(&self, number: u64) -> u64 {
        let mut left = number >> self.right;
        let mut right = number & (u64::MAX >> (u64::BITS - self.right));
        for keys in self.keys.chunks_exact(2) {
            left ^= scramble(right ^ keys[0]) >> (u64::BITS - self.left);
            right ^= scramble(left ^ keys[1]) >> (u64::BITS - self.right);
        }
        left << self.right | right
    }
}

/// A hash of a few words, of which every bit depends on all bits of all of them, on their order and
/// their number. It is part of the format of saved states.
///
/// The chain is that of the generator SplitMix64 with the words mixed in: G. L. Steele, D. Lea and
/// C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
pub fn mix(words: &[u64]) -> u64 {
    /// 2^64 divided by the golden ratio, odd: the step of SplitMix64. It keeps zeros from being
    /// hashed to zero.
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    words.iter().fold(words.len() as u64, |hash, word| scramble((hash ^ word).wrapping_add(STEP)))
}

/// A bijection in which each bit of the number changes each bit of the result with a probability
/// near one half: SplitMix64's, which has it, shifts and factors, from D. Stafford, "Better bit
/// mixing" (2011), variant 13.
fn scramble(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests {
    use super::*;

    fn order(len: u64, key: u64) -> Vec<u64> {
        let permutation = Permutation::new(len, key);
        (0..len).map(|position| permutation.index(position)).collect()
    }

    /// Whether counts of what should be equally frequent differ no more than chance has it: within
    /// five standard deviations of chi-square.
    fn assert_uniform(counts: &[u32], freedom: f64, scale: f64, what: &str) {
        let expected = f64::from(counts.iter().sum::<u32>()) / counts.len() as f64;
        let deviation = |count: &u32| (f64::from(*count) - expected).powi(2) / expected;
        let chi_square = scale * counts.iter().map(deviation).sum::<f64>();
        let off = (chi_square - freedom) / (2.0 * freedom).sqrt();
        assert!(off.abs() < 5.0, "{what}: chi-square is {off:.1} standard deviations off");
    }

    #[test]
    fn many_at_once_are_the_same() {
        for len in [0u64, 1, 2, 255, 256, 257, 1000, 70_000] {
            let permutation = Permutation::new(len, 3);
            let all = order(len, 3);
            for (first, count) in [(0, len), (len / 3, len / 2), (len, 0)] {
                let mut indices = vec![u64::MAX; count as usize];
                permutation.indices(first, &mut indices);
                assert_eq!(indices, all[first as usize..][..count as usize], "{first} of {len}");
            }
        }
        let beyond = std::panic::catch_unwind(|| Permutation::new(5, 0).indices(3, &mut [0; 3]));
        assert!(beyond.is_err());
    }

    #[test]
    fn each_number_once() {
        let lens = (0..300).chain([1000, 4095, 4096, 4097, 32_767, 32_769, 65_537]);
        for len in lens {
            let mut seen = vec![false; len as usize];
            for index in order(len, len ^ 0x5eed) {
                assert!(!std::mem::replace(&mut seen[index as usize], true), "{index} of {len}");
            }
            assert_eq!(Permutation::new(len, 1).is_empty(), len == 0);
        }
    }

    /// Undoes the rounds. What can be undone is a bijection, also where it is too long to try.
    fn position(permutation: &Permutation, index: u64) -> u64 {
        let Permutation { left: left_bits, right: right_bits, keys, len } = *permutation;
        let mut number = index;
        loop {
            let mut left = number >> right_bits;
            let mut right = number & (u64::MAX >> (64 - right_bits));
            for keys in keys.chunks_exact(2).rev() {
                right ^= scramble(left ^ keys[1]) >> (64 - right_bits);
                left ^= scramble(right ^ keys[0]) >> (64 - left_bits);
            }
            number = left << right_bits | right;
            if number < len {
                return number;
            }
        }
    }

    #[test]
    fn any_length_up_to_the_last() {
        let lens = (6..64).flat_map(|bits| [(1 << bits) - 1, 1 << bits, (1 << bits) + 1]);
        for len in lens.chain([u64::MAX / 2, u64::MAX - 1, u64::MAX]) {
            let permutation = Permutation::new(len, 3);
            assert_eq!(permutation.len(), len);
            for at in [0, 1, len / 3, len / 2, len - 2, len - 1] {
                let index = permutation.index(at);
                assert!(index < len);
                assert_eq!(position(&permutation, index), at, "of {len}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "position 7 of a permutation of 7")]
    fn a_position_outside_panics() {
        Permutation::new(7, 0).index(7);
    }

    #[test]
    fn keys_give_unrelated_orders() {
        assert_eq!(order(1000, 5), order(1000, 5));
        // In common with another order, as with the identity: one number on average.
        for key in 0..50 {
            for other in [key + 1, key ^ 1 << 63, !key] {
                let (a, b) = (order(1000, key), order(1000, other));
                assert!(a.iter().zip(&b).filter(|(a, b)| a == b).count() < 9);
            }
        }
    }

    #[test]
    fn each_number_is_as_often_at_each_position() {
        for (len, keys) in [(5, 1500), (10, 2000), (52, 1500), (256, 300)] {
            let mut counts = vec![0; (len * len) as usize];
            for key in 0..keys {
                for (position, index) in (0..).zip(order(len, key)) {
                    counts[(position * len + index) as usize] += 1;
                }
            }
            // Rows and columns of the table have fixed sums.
            let free = (len - 1) as f64;
            assert_uniform(&counts, free * free, free / len as f64, &format!("{len} numbers"));
        }
    }

    #[test]
    fn all_orders_of_five_are_as_frequent() {
        let mut counts = std::collections::BTreeMap::new();
        for key in 0..12_000 {
            *counts.entry(order(5, key)).or_insert(0) += 1;
        }
        let counts: Vec<u32> = counts.into_values().collect();
        assert_eq!(counts.len(), 120);
        assert_uniform(&counts, 119.0, 1.0, "orders");
    }

    #[test]
    fn neighbours_are_independent() {
        // Where two numbers that follow each other go, of few and of many.
        for (len, at) in [(10, 0), (10, 6), (1_000_000_000, 0), (1_000_000_000, 1 << 20)] {
            let mut counts = vec![0; 100];
            for key in 0..18_000 {
                let permutation = Permutation::new(len, key);
                let tenth = |position| permutation.index(position) / (len / 10);
                counts[(tenth(at) * 10 + tenth(at + 1)) as usize] += 1;
            }
            if len == 10 {
                let equal = (0..10).map(|i| counts[i * 11]).sum::<u32>();
                assert_eq!(equal, 0);
                counts = (0..100).filter(|i| i % 11 != 0).map(|i| counts[i]).collect();
            }
            assert_uniform(&counts, counts.len() as f64 - 1.0, 1.0, &format!("{len} at {at}"));
        }
    }

    #[test]
    fn a_long_order_looks_shuffled() {
        let len = 100_000;
        let order = order(len, 11);
        // Two random numbers below n are n/3 apart on average; so for any distance in the order.
        for apart in [1, 2, 64, 1000] {
            let gaps = order.iter().zip(&order[apart..]).map(|(a, b)| a.abs_diff(*b) as f64);
            let mean = gaps.sum::<f64>() / (order.len() - apart) as f64;
            assert!((mean / (len as f64 / 3.0) - 1.0).abs() < 0.01, "{mean} at {apart}");
        }
        // The next number is greater in half of the cases.
        let ascents = order.windows(2).filter(|pair| pair[0] < pair[1]).count();
        assert!(ascents.abs_diff(50_000) < 500, "{ascents} ascents");
        // Each hundredth of the order has its share of each hundredth of the numbers.
        let mut counts = vec![0; 10_000];
        for (position, index) in order.iter().enumerate() {
            counts[position / 1000 * 100 + (*index / 1000) as usize] += 1;
        }
        assert_uniform(&counts, 99.0 * 99.0, 1.0, "hundredths");
    }

    #[test]
    fn one_number_stays_in_place_on_average() {
        let keys = 2000;
        let fixed = |key| (0..).zip(order(52, key)).filter(|(i, index)| i == index).count();
        let mean = (0..keys).map(fixed).sum::<usize>() as f64 / keys as f64;
        // The variance of one order is 1 too.
        assert!((mean - 1.0).abs() < 5.0 / (keys as f64).sqrt(), "{mean}");
    }

    #[test]
    fn a_walk_is_short_on_average() {
        // The least favourable length: one more than a power of two.
        let len = (1 << 20) + 1;
        let permutation = Permutation::new(len, 9);
        let runs: u32 = (0..10_000)
            .map(|position| {
                let outside = |number: &u64| *number >= len;
                let walk = std::iter::successors(Some(permutation.network(position)), |number| {
                    outside(number).then(|| permutation.network(*number))
                });
                walk.map(|_| 1).sum::<u32>()
            })
            .sum();
        assert!((19_000..21_000).contains(&runs), "{runs}");
    }

    /// Saved states depend on these: another result here means another version of the format.
    #[test]
    fn the_order_never_changes() {
        assert_eq!(order(10, 0), [6, 0, 3, 9, 5, 8, 4, 2, 1, 7]);
        assert_eq!(order(7, 0xdead_beef), [3, 1, 2, 6, 0, 4, 5]);
        let start = |len, key| [0, 1, 2, len - 1].map(|at| Permutation::new(len, key).index(at));
        assert_eq!(start(50_000, 42), [46_067, 42_894, 43_935, 18_005]);
        assert_eq!(start(1_281_167, 1), [883_656, 120_911, 671_623, 904_976]);
        assert_eq!(
            start(1_000_000_000, 12_345),
            [936_882_529, 790_898_964, 884_334_335, 220_517_911]
        );
        assert_eq!(
            start(u64::MAX, u64::MAX),
            [
                17_001_108_752_494_442_497,
                12_252_817_511_271_024_546,
                1_594_069_801_986_873_104,
                7_144_085_967_402_449_910
            ]
        );
        assert_eq!(mix(&[]), 0);
        assert_eq!(mix(&[0]), 0x910a_2dec_8902_5cc1);
        assert_eq!(mix(&[1, 2, 3]), 0x0107_2dec_a745_5826);
    }

    #[test]
    fn a_hash_depends_on_every_bit_order_and_number() {
        let words = [3, 0, u64::MAX, 1 << 40];
        let hash = mix(&words);
        for bit in 0..256 {
            let mut changed = words;
            changed[bit / 64] ^= 1 << (bit % 64);
            // About half of the bits change: 32, with a standard deviation of 4.
            assert!((10..=54).contains(&(mix(&changed) ^ hash).count_ones()), "bit {bit}");
        }
        assert_ne!(mix(&[1, 2]), mix(&[2, 1]));
        assert_ne!(mix(&[0]), mix(&[0, 0]));
        assert_ne!(mix(&[0, 5]), mix(&[5]));
    }
}
