//! What a transaction will change, put together before it is written. `model::ledger` decides what becomes of each
//! record; here its answers are collected: two settlements of one batch see each other (B7).

use std::{collections::BTreeMap, sync::Arc};

use postrider_actors::{
    model::{
        ids::{BatchId, FileId},
        ledger::{Changes, CountChange, Failure, Record, codec},
        state::MessageState,
        time::UnixMs,
    },
    ports::{Settled, Settlement, StoreError},
};

use super::{
    depth::DepthChange,
    payload::PayloadId,
    record::{Records, StoredBatch},
};

/// A record before and after.
#[derive(Clone, Debug)]
pub(super) struct RecordChange {
    pub(super) before: StoredBatch,
    pub(super) after: Record,
    /// Failed attempts that are new.
    pub(super) failures: Vec<Failure>,
    /// What it carries from now on, if that changes, and until when that is kept.
    pub(super) payload: Option<(PayloadId, UnixMs)>,
}

impl RecordChange {
    /// Whether it is to be listed among batches with dead messages, or taken off the list.
    pub(super) fn changes_list(&self) -> bool {
        self.before.record.has_dead() != self.after.has_dead()
    }
}

/// By how much a file's counts for a destination change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CountDelta {
    pub(super) change: CountChange,
    /// When the last of it happened.
    pub(super) last_at: Option<UnixMs>,
}

/// The changes so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Draft {
    pub(super) changed: BTreeMap<BatchId, RecordChange>,
    pub(super) counts: BTreeMap<(FileId, Arc<str>), CountDelta>,
}

impl Draft {
    pub(super) fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.counts.is_empty()
    }

    /// Actions that it takes in a transaction.
    pub(super) fn actions(&self) -> usize {
        let of = |changed: &RecordChange| {
            1 + usize::from(!changed.failures.is_empty()) + usize::from(changed.changes_list())
        };
        // And one for the depth.
        self.changed.values().map(of).sum::<usize>() + self.counts.len() + 1
    }

    /// Bytes that it takes in a transaction, roughly.
    pub(super) fn bytes(&self) -> usize {
        let of = |changed: &RecordChange| {
            1_024 + codec::encode(&changed.after).len() + 16 * changed.failures.len()
        };
        self.changed.values().map(of).sum::<usize>() + self.counts.len() * 256
    }

    /// By how much the numbers of open messages change.
    pub(super) fn depth(&self) -> DepthChange {
        let mut depth = DepthChange::new();
        for ((_, destination), counted) in &self.counts {
            *depth.entry(destination.clone()).or_default() += counted.change.depth();
        }
        depth.retain(|_, messages| *messages != 0);
        depth
    }

    /// Records a settlement, whose batch is known. A draft that refused one is of no use.
    pub(super) fn settle(&mut self, known: &Records, settlement: &Settlement) -> Result<Settled, StoreError> {
        let id = settlement.token.batch;
        let Some(changed) = self.changed(known, id) else {
            tracing::warn!(batch = %id, "settled a batch that the store does not know");
            return Ok(Settled::Stale);
        };
        let changes = changed
            .after
            .settle(settlement.standing())
            .map_err(|rejected| StoreError::Permanent(format!("batch {id}: {rejected}")))?;
        let settled = Settled::of(&changes, &changed.after);
        self.take(id, changes);
        Ok(settled)
    }

    /// Opens dead messages of a batch again, which is known; how many.
    pub(super) fn redrive(&mut self, known: &Records, id: BatchId, indexes: &[u32], at: UnixMs) -> usize {
        let Some(changed) = self.changed(known, id) else { return 0 };
        let changes = changed.after.redrive(indexes.iter().copied(), at);
        let opened = changes.rose.len();
        self.take(id, changes);
        opened
    }

    /// The same with new bodies, which `payload` has; see `Record::rerender`.
    pub(super) fn rerender(
        &mut self,
        known: &Records,
        id: BatchId,
        indexes: &[u32],
        payload: (PayloadId, UnixMs),
        at: UnixMs,
    ) -> usize {
        let Some(changed) = self.changed(known, id) else { return 0 };
        changed.payload = Some(payload);
        let changes = changed.after.rerender(indexes.iter().copied(), at);
        let opened = changes.rose.len();
        self.take(id, changes);
        opened
    }

    /// Ends the open messages of a batch, which is known, as ones that are never sent.
    pub(super) fn end_open(&mut self, known: &Records, id: BatchId, state: MessageState, at: UnixMs) {
        let Some(changed) = self.changed(known, id) else { return };
        let changes = changed.after.end_open(state, at);
        self.take(id, changes);
    }

    /// What it does to the counts of all files and destinations together.
    pub(super) fn count_change(&self) -> CountChange {
        self.counts.values().fold(CountChange::default(), |mut sum, counted| {
            sum += counted.change;
            sum
        })
    }

    fn changed(&mut self, known: &Records, id: BatchId) -> Option<&mut RecordChange> {
        let before = known.get(&id)?.as_ref()?;
        Some(self.changed.entry(id).or_insert_with(|| RecordChange {
            before: before.clone(),
            after: before.record.clone(),
            failures: Vec::new(),
            payload: None,
        }))
    }

    /// Takes in what a rule has changed; a record that is as it was is forgotten.
    fn take(&mut self, id: BatchId, changes: Changes) {
        let Some(changed) = self.changed.get_mut(&id) else { return };
        changed.failures.extend(changes.failures);
        let of = (changed.before.file, changed.before.destination.clone());
        if changed.after == changed.before.record {
            self.changed.remove(&id);
        }
        if !changes.counts.is_zero() || changes.last_at.is_some() {
            let counted = self.counts.entry(of).or_default();
            counted.change += changes.counts;
            counted.last_at = counted.last_at.max(changes.last_at);
        }
    }
}
