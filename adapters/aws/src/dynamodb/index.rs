//! Entries of the index `OutstandingAllTopics`, and what they count up to.

use std::{collections::BTreeMap, sync::Arc};

use postrider_actors::{
    model::{ids::BatchId, time::UnixMs},
    ports::DestinationDepth,
};

use super::{
    item::{DUE, Damaged, Item, LOOK_AT, OPEN, OUTSTANDING_CREATED_TIME, OWNER, Reading, TOPIC},
    keys,
};

/// What waits and is worked on, counted from the whole index.
#[derive(Clone, Debug, Default)]
pub(super) struct IndexCount {
    pub(super) depths: Vec<DestinationDepth>,
    pub(super) outstanding: u64,
}

/// An entry of the index.
pub(super) struct IndexEntry {
    pub(super) id: BatchId,
    pub(super) destination: Arc<str>,
    pub(super) owner: String,
    pub(super) due: UnixMs,
    pub(super) look_at: UnixMs,
    pub(super) open: u64,
    /// Nobody has it, as far as the index knows.
    pub(super) is_outstanding: bool,
}

impl IndexEntry {
    fn read(item: &Item) -> Result<Self, Damaged> {
        let reading = Reading(item);
        Ok(Self {
            id: keys::batch_of_key(item)?,
            destination: reading.text(TOPIC)?.into(),
            owner: reading.text(OWNER)?.to_owned(),
            due: reading.time(DUE)?,
            look_at: reading.time(LOOK_AT)?,
            open: reading.number(OPEN)?,
            is_outstanding: item.contains_key(OUTSTANDING_CREATED_TIME),
        })
    }
}

/// Counts entries of the index by destination, and by whether somebody has them.
pub(super) fn count(entries: &[IndexEntry], now: UnixMs) -> IndexCount {
    let mut depths: BTreeMap<Arc<str>, DestinationDepth> = BTreeMap::new();
    let mut outstanding = 0;
    for swept in entries {
        let destination = swept.destination.clone();
        let depth = depths.entry(destination.clone()).or_insert_with(|| DestinationDepth {
            destination,
            due: 0,
            waiting: 0,
            leased: 0,
        });
        *match (swept.is_outstanding, swept.due <= now) {
            (false, _) => &mut depth.leased,
            (true, true) => &mut depth.due,
            (true, false) => &mut depth.waiting,
        } += swept.open;
        outstanding += u64::from(swept.is_outstanding);
    }
    IndexCount { depths: depths.into_values().collect(), outstanding }
}

/// Reads entries of the index.
pub(super) fn read(items: &[Item]) -> Vec<IndexEntry> {
    let mut entries = Vec::with_capacity(items.len());
    for item in items {
        match IndexEntry::read(item) {
            Ok(swept) => entries.push(swept),
            Err(error) => {
                tracing::error!(%error, "an entry of the outbox's index can't be read and is left out");
            }
        }
    }
    entries
}
