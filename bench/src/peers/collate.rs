//! One vector per batch for the peers: fresh, or that of a batch which was dropped.

use std::sync::{Arc, Mutex};

/// Where the memory of a peer's batch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Collate {
    Fresh,
    Reused,
}

/// Copies rows into batches.
#[derive(Debug, Clone)]
pub(super) struct Collator {
    /// The vectors of dropped batches; `None` where each batch gets a fresh one.
    dropped: Option<Arc<Mutex<Vec<Vec<u8>>>>>,
}

/// The rows of a batch, one behind the other.
#[derive(Debug, Clone)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    dropped: Option<Arc<Mutex<Vec<Vec<u8>>>>>,
}

impl Collator {
    pub(super) fn new(collate: Collate) -> Self {
        Self { dropped: (collate == Collate::Reused).then(Arc::default) }
    }

    pub(super) fn batch(&self, rows: &[&[u8]]) -> Batch {
        let dropped = self.dropped.as_ref();
        let mut bytes = dropped
            .and_then(|dropped| dropped.lock().expect("nobody panics").pop())
            .unwrap_or_default();
        bytes.clear();
        bytes.reserve_exact(rows.iter().map(|row| row.len()).sum());
        for row in rows {
            bytes.extend_from_slice(row);
        }
        Batch { bytes, dropped: self.dropped.clone() }
    }
}

impl Batch {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if let Some(dropped) = &self.dropped {
            dropped.lock().expect("nobody panics").push(std::mem::take(&mut self.bytes));
        }
    }
}
