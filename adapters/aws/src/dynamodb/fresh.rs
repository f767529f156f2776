//! What is known to be outstanding without asking: what this process has appended or left to be tried again, and what
//! its last sweeps of the index have found. Bounded; what does not fit is left to a sweep.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use postrider_actors::{
    model::{batch::NewBatch, ids::BatchId, time::UnixMs},
    ports::OutboxEntry,
};

/// Entries that are remembered: at a hundred bytes each a few megabytes. Beyond, batches that wait for
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
    /// Since when entries were outstanding that were handed out and are not marked yet, the first of them first.
    offered: HashMap<BatchId, VecDeque<u64>>,
    bytes: usize,
    /// Whether some of `offered` did not fit, ever.
    forgot: bool,
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

    /// Takes a batch that this process has left to be tried again; what was known of it is out of date.
    pub(super) fn again(&mut self, entry: OutboxEntry, created: u64) {
        self.remove(entry.id);
        self.dropped |= !self.take(entry, created);
    }

    /// Takes an entry that a sweep has found, as its record stands. Another process may have left it to be tried
    /// again, sooner than it is known to be due here.
    pub(super) fn found(&mut self, entry: OutboxEntry, created: u64) {
        if self.created(entry.id).is_some_and(|known| known < created) {
            self.remove(entry.id);
        }
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

    /// Since when an entry was outstanding that is to be marked as dispatched. By now it may be outstanding again: that
    /// one has to be dispatched too, so of several that were handed out the first is marked.
    pub(super) fn take_offered(&mut self, id: BatchId) -> Option<u64> {
        let Some(offered) = self.offered.get_mut(&id) else {
            // What was handed out and forgotten may be outstanding again, and that was not sent.
            return self.created(id).filter(|_| !self.forgot);
        };
        let first = offered.pop_front();
        if offered.is_empty() {
            self.offered.remove(&id);
        }
        first
    }

    /// It was not marked after all, and will be later.
    pub(super) fn offered(&mut self, id: BatchId, created: u64) {
        self.offered.entry(id).or_default().push_front(created);
    }

    fn created(&self, id: BatchId) -> Option<u64> {
        self.places.get(&id).map(|place| place.1)
    }

    /// Forgets an entry as it was outstanding since `created`.
    pub(super) fn remove_created(&mut self, id: BatchId, created: u64) {
        if self.created(id) == Some(created) {
            self.remove(id);
        }
    }

    /// Forgets an entry that was outstanding before `at`.
    pub(super) fn remove_before(&mut self, id: BatchId, at: u64) {
        if self.created(id).is_some_and(|created| created < at) {
            self.remove(id);
        }
    }

    /// Up to `limit` entries that are due by `due_by`, for none of `except`.
    pub(super) fn due(&mut self, due_by: UnixMs, limit: usize, except: &[Arc<str>]) -> Vec<OutboxEntry> {
        if self.offered.len() > ENTRIES_MAX {
            self.offered.clear(); // of what was never marked: at worst something is dispatched twice
            self.forgot = true;
        }
        let due = self.waiting.iter().take_while(|(place, _)| place.0 <= due_by);
        let due = due.filter(|(_, entry)| !except.contains(&entry.destination)).take(limit);
        due.map(|(place, entry)| {
            let offered = self.offered.entry(entry.id).or_default();
            if offered.back() != Some(&place.1) {
                offered.push_back(place.1);
            }
            entry.clone()
        })
        .collect()
    }

    pub(super) fn next_due(&self) -> Option<UnixMs> {
        self.waiting.keys().next().map(|place| place.0)
    }

    /// Whether an entry is known as it was outstanding since `created`.
    pub(super) fn contains(&self, id: BatchId, created: u64) -> bool {
        self.created(id) == Some(created)
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
    fn a_batch_that_is_outstanding_again_is_another_entry() {
        let mut fresh = Fresh::default();
        let batch = batch(1, 10);
        fresh.insert(batch.clone(), 7);
        let later = OutboxEntry {
            id: batch.id,
            destination: "d".into(),
            count: 1,
            not_before: UnixMs(30),
            batch: None,
        };
        fresh.found(later.clone(), 6);
        assert_eq!(
            (fresh.created(batch.id), fresh.next_due()),
            (Some(7), Some(UnixMs(10))),
            "it was read before"
        );
        assert_eq!(fresh.due(UnixMs(10), 9, &[]).len(), 1);
        // Sent, claimed, and left to be tried again before it was marked.
        fresh.again(later, 8);
        assert_eq!((fresh.created(batch.id), fresh.next_due()), (Some(8), Some(UnixMs(30))));
        assert_eq!(fresh.due(UnixMs(30), 9, &[]).len(), 1);
        assert_eq!(fresh.take_offered(batch.id), Some(7), "that is what was sent");
        fresh.remove_created(batch.id, 7);
        fresh.remove_before(batch.id, 8);
        assert!(fresh.contains(batch.id, 8), "it was dispatched before, not now");
        assert_eq!(fresh.take_offered(batch.id), Some(8));
        fresh.remove_created(batch.id, 8);
        assert_eq!(fresh.take_offered(batch.id), None);
        assert_eq!((fresh.created(batch.id), fresh.next_due(), fresh.bytes), (None, None, 0));
    }

    /// Another process has redriven what is known here as due in an hour, and is gone.
    #[test]
    fn i9_a_sweep_finds_what_is_due_sooner_than_is_known() {
        let mut fresh = Fresh::default();
        let batch = batch(1, 3_600);
        fresh.insert(batch.clone(), 7);
        assert!(fresh.contains(batch.id, 7) && !fresh.contains(batch.id, 8));
        let sooner = OutboxEntry {
            id: batch.id,
            destination: "d".into(),
            count: 1,
            not_before: UnixMs(10),
            batch: None,
        };
        fresh.found(sooner, 8);
        assert_eq!((fresh.created(batch.id), fresh.next_due()), (Some(8), Some(UnixMs(10))));
        fresh.remove_before(batch.id, 9);
        assert_eq!((fresh.created(batch.id), fresh.next_due(), fresh.bytes), (None, None, 0));
    }

    /// I9: a mark that does not know what was sent must not say that what waits now was.
    #[test]
    fn i9_what_was_forgotten_is_not_marked_as_something_else() {
        let mut fresh = Fresh::default();
        let sent = batch(1, 10);
        fresh.insert(sent.clone(), 7);
        assert_eq!(fresh.take_offered(sent.id), Some(7), "it is known however it was sent");
        for row in 2..=ENTRIES_MAX as u64 + 2 {
            fresh.offered(batch(row, 10).id, row);
        }
        fresh.due(UnixMs(9), 1, &[]);
        assert_eq!(fresh.take_offered(sent.id), None);
        assert!(fresh.contains(sent.id, 7));
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
