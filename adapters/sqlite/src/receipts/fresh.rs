//! What the writer holds in memory of the events that were taken last.

use std::collections::BTreeMap;

/// An event and its source; see [`key`](super::events::key).
pub(crate) type EventKey = [u8; 16];

/// Events that are not in blocks yet. Once there are so many, they are merged into them: each block that a merge writes
/// gets as many of them at once as possible. A restart reads them, in some 30 ms.
const FRESH_EVENTS_MAX: usize = 1 << 17;

/// The events of `receipt_events_fresh`, apart from those that a merge in progress has put into blocks.
pub(crate) struct FreshEvents {
    /// With the day on which each was taken.
    pub(super) days: BTreeMap<EventKey, u16>,
    /// The last row that is in `days`. Another process may add more.
    pub(super) read_until: i64,
    pub(super) merge: Option<Merge>,
    pub(super) max: usize,
}

/// A merge in progress. It is forgotten at a rollback or a restart, and begun again: what it did before is found done.
pub(super) struct Merge {
    /// Rows up to this one are merged as a whole when it is done.
    pub(super) rows_until: i64,
    /// All keys before this one are done.
    pub(super) next: EventKey,
}

impl Default for FreshEvents {
    fn default() -> Self {
        Self { days: BTreeMap::new(), read_until: 0, merge: None, max: FRESH_EVENTS_MAX }
    }
}
