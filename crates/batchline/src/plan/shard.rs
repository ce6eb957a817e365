//! Which rows of an epoch make up a batch, for one rank.

use crate::{Error, Result};

/// The part of the stream that one of several processes gets: each global batch of
/// `batch_size · world_size` samples is dealt out to the ranks, in order, so the union over the
/// ranks is the stream of a single one with that batch size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shard {
    /// This process, from 0.
    pub rank: u64,
    /// The number of processes.
    pub world_size: u64,
}

impl Default for Shard {
    /// All of it.
    fn default() -> Self {
        Self { rank: 0, world_size: 1 }
    }
}

/// What becomes of the samples that don't make up a whole global batch at the end of an epoch.
/// In each case all ranks see the same number of batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum LastBatch {
    /// The last batch is short. Its samples are dealt out evenly to the ranks; a rank for which
    /// none is left gets an empty batch.
    #[default]
    Keep,
    /// They are left out.
    Drop,
    /// The last batch is filled up with samples from the beginning of the epoch.
    Pad,
}

/// Epochs cut into batches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    pub(crate) len: u64,
    pub(crate) batch_size: u64,
    pub(crate) shard: Shard,
    pub(crate) last: LastBatch,
}

/// The rows of one batch, on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchRows {
    /// The first position in the epoch. Positions at or past its end start again at 0.
    pub(crate) first: u64,
    pub(crate) rows: u64,
    /// How many of the rows, the last ones, fill the batch up.
    pub(crate) padding: u64,
}

impl Cut {
    /// Checks the settings.
    pub(crate) fn new(len: u64, batch_size: u64, shard: Shard, last: LastBatch) -> Result<Self> {
        let cut = Self { len, batch_size, shard, last };
        if len == 0 {
            let problem = "has no samples";
            return Err(Error::config("the data set", problem, "check its path and its filter"));
        }
        if cut.batches() == 0 {
            return Err(Error::config(
                "drop_last",
                format!(
                    "leaves no batch: {len} samples are fewer than the {} of one",
                    cut.global()
                ),
                "use a smaller batch size, or keep the last batch",
            ));
        }
        Ok(cut)
    }

    /// Samples of a global batch.
    pub(crate) fn global(&self) -> u64 {
        // Checked when the configuration was built.
        self.batch_size * self.shard.world_size
    }

    /// Batches of an epoch, the same for all ranks.
    pub(crate) fn batches(&self) -> u64 {
        match self.last {
            LastBatch::Drop => self.len / self.global(),
            LastBatch::Keep | LastBatch::Pad => self.len.div_ceil(self.global()),
        }
    }

    /// The rows of batch `batch`, which is below [`batches`](Self::batches).
    pub(crate) fn rows(&self, batch: u64) -> BatchRows {
        let start = batch * self.global();
        let left = self.len - start;
        let Shard { rank, world_size } = self.shard;
        if left >= self.global() {
            let first = start + rank * self.batch_size;
            return BatchRows { first, rows: self.batch_size, padding: 0 };
        }
        if self.last == LastBatch::Pad {
            let first = start + rank * self.batch_size;
            let real = self.len.saturating_sub(first).min(self.batch_size);
            return BatchRows { first, rows: self.batch_size, padding: self.batch_size - real };
        }
        let (share, extra) = (left / world_size, left % world_size);
        let first = start + rank * share + rank.min(extra);
        BatchRows { first, rows: share + u64::from(rank < extra), padding: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions(cut: Cut) -> Vec<Vec<u64>> {
        (0..cut.batches())
            .map(|batch| {
                let rows = cut.rows(batch);
                (rows.first..rows.first + rows.rows).map(|position| position % cut.len).collect()
            })
            .collect()
    }

    /// The ranks' batches, put together, are those of a single rank with the global batch size.
    #[test]
    fn ranks_together_are_the_single_stream() {
        for last in [LastBatch::Keep, LastBatch::Drop, LastBatch::Pad] {
            for (len, global, world_size) in [(100, 12, 4), (97, 12, 3), (13, 12, 6), (5, 4, 4)] {
                let whole = Cut::new(len, global, Shard::default(), last).unwrap();
                let ranks: Vec<_> = (0..world_size)
                    .map(|rank| {
                        let shard = Shard { rank, world_size };
                        positions(Cut::new(len, global / world_size, shard, last).unwrap())
                    })
                    .collect();
                for (batch, expected) in positions(whole).into_iter().enumerate() {
                    let together: Vec<u64> =
                        ranks.iter().flat_map(|rank| rank[batch].clone()).collect();
                    assert_eq!(together, expected, "{last:?} {len} {global} {world_size}");
                }
            }
        }
    }

    #[test]
    fn padding_is_counted_and_shares_differ_by_one_at_most() {
        let cut =
            |rank, last| Cut::new(10, 3, Shard { rank, world_size: 2 }, last).unwrap().rows(1);
        // Positions 6..10 are left: 6, 7, 8 and 9, then 0 and 1 again.
        assert_eq!(cut(0, LastBatch::Pad), BatchRows { first: 6, rows: 3, padding: 0 });
        assert_eq!(cut(1, LastBatch::Pad), BatchRows { first: 9, rows: 3, padding: 2 });
        assert_eq!(cut(0, LastBatch::Keep), BatchRows { first: 6, rows: 2, padding: 0 });
        assert_eq!(cut(1, LastBatch::Keep), BatchRows { first: 8, rows: 2, padding: 0 });
    }

    #[test]
    fn nothing_to_deliver_is_an_error() {
        let shard = Shard::default();
        assert!(Cut::new(0, 4, shard, LastBatch::Keep).is_err());
        let error = Cut::new(3, 4, shard, LastBatch::Drop).unwrap_err().to_string();
        assert!(error.contains("3 samples are fewer than the 4"), "{error}");
    }
}
