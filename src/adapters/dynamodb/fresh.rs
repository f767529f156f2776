//! What is known to be outstanding without asking: what this process has appended, and what its last sweeps of
//! the index have found. Bounded; what does not fit is left to a sweep.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use postrider_actors::{
    model::{batch::NewBatch, ids::BatchId, time::UnixMs},
    ports::OutboxEntry,
};

/// Entries that are remembered: at a hundred bytes each a few megabytes. Beyond, retries that wait for
/// hours are found by the sweep when they are due.
const ENTRIES_MAX: usize = 20_000;

/// Bytes of payload that are kept with them, so that they need not be read before they are sent.
const BYTES_MAX: usize = 64 * 1024 * 1024;

/// Oldest due first, then in the order of `OutstandingCreatedTime`.
type Place = (UnixMs, u64, BatchId);

/// Entries that wait to be dispatched.
#[derive(Default)]
pub(super) struct Fresh {
    waiting: BTreeMap<Place, OutboxEntry>,
    places: HashMap<BatchId, Place>,
    bytes: usize,
    /// Whether something of this process did not fit since it was last asked.
    dropped: bool,
}

impl Fresh {
    /// Takes a batch that this process has appended.
    pub(super) fn insert(&mut self, batch: NewBatch, created: u64) {
        let entry = OutboxEntry {
            id: batch.id,
            destination: batch.header.destination.as_str().into(),
            count: batch.count,
            not_before: batch.not_before,
            batch: Some(batch),
        };
        self.dropped |= !self.take(entry, created);
    }

    /// Takes an entry that a sweep has found.
    pub(super) fn found(&mut self, entry: OutboxEntry, created: u64) {
        self.take(entry, created);
    }

    fn take(&mut self, mut entry: OutboxEntry, created: u64) -> bool {
        if self.places.contains_key(&entry.id) {
            return true;
        }
        if self.places.len() >= ENTRIES_MAX {
            return false;
        }
        let bytes = entry.batch.as_ref().map_or(0, |batch| batch.payload.len());
        if self.bytes + bytes > BYTES_MAX {
            entry.batch = None;
        } else {
            self.bytes += bytes;
        }
        let place = (entry.not_before, created, entry.id);
        self.places.insert(entry.id, place);
        self.waiting.insert(place, entry);
        true
    }

    /// Forgets an entry: it is dispatched, or gone. Whether it was there.
    pub(super) fn remove(&mut self, id: BatchId) -> bool {
        let Some(place) = self.places.remove(&id) else { return false };
        let entry = self.waiting.remove(&place).expect("every place is taken");
        self.bytes -= entry.batch.map_or(0, |batch| batch.payload.len());
        true
    }

    /// Up to `limit` entries that are due by `due_by`, for none of `except`.
    pub(super) fn due(&self, due_by: UnixMs, limit: usize, except: &[Arc<str>]) -> Vec<OutboxEntry> {
        let due = self.waiting.values().take_while(|entry| entry.not_before <= due_by);
        due.filter(|entry| !except.contains(&entry.destination)).take(limit).cloned().collect()
    }

    pub(super) fn next_due(&self) -> Option<UnixMs> {
        self.waiting.keys().next().map(|place| place.0)
    }

    pub(super) fn contains(&self, id: BatchId) -> bool {
        self.places.contains_key(&id)
    }

    /// Takes note that something of this process may be outstanding that is not here.
    pub(super) fn note_dropped(&mut self) {
        self.dropped = true;
    }

    /// Whether something was dropped since the last call.
    pub(super) fn take_dropped(&mut self) -> bool {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use postrider_actors::testing::fixtures;

    use super::*;

    fn batch(row: u64, due: u64) -> NewBatch {
        let file = fixtures::file("feed", 1, &["d"]);
        fixtures::batch(&file, "d", row..=row, UnixMs(due))
    }

    #[test]
    fn the_oldest_due_comes_first_and_nothing_that_is_excepted() {
        let mut fresh = Fresh::default();
        for (row, due) in [(1, 30), (2, 10), (3, 20), (4, 10)] {
            fresh.insert(batch(row, due), row);
        }
        let rows = |entries: Vec<OutboxEntry>| -> Vec<u64> {
            entries.into_iter().map(|entry| entry.batch.unwrap().first_row).collect()
        };
        assert_eq!(rows(fresh.due(UnixMs(20), 9, &[])), [2, 4, 3]);
        assert_eq!(rows(fresh.due(UnixMs(99), 1, &[])), [2]);
        assert!(fresh.due(UnixMs(99), 9, &["d".into()]).is_empty());
        assert_eq!(fresh.next_due(), Some(UnixMs(10)));
        assert!(fresh.remove(batch(2, 10).id) && !fresh.remove(batch(2, 10).id));
        assert_eq!(rows(fresh.due(UnixMs(20), 9, &[])), [4, 3]);
    }

    #[test]
    fn i8_what_does_not_fit_is_left_to_the_sweep() {
        let mut fresh = Fresh::default();
        for row in 1..=ENTRIES_MAX as u64 {
            fresh.insert(batch(row, row), row);
        }
        assert!(!fresh.take_dropped());
        fresh.insert(batch(99_999, 1), 1);
        assert!(fresh.take_dropped() && !fresh.take_dropped());
        assert_eq!(fresh.due(UnixMs(u64::MAX), usize::MAX, &[]).len(), ENTRIES_MAX);
    }
}
