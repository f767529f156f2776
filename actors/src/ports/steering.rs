use std::{collections::BTreeMap, ops::AddAssign, sync::Arc};

use async_trait::async_trait;

use super::StoreError;
use crate::model::{
    canary::Trial,
    hold::{HeldFile, HoldChange},
    ids::FileId,
    ledger::CountChange,
    limits::SetLimits,
    priority::{FilePriority, Priority},
    time::UnixMs,
};

/// What is set for each destination for which anything is.
pub type LimitsSet = BTreeMap<Arc<str>, SetLimits>;

/// What a step has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Batches.
    pub batches: usize,
    /// What that did to the counts of each destination.
    pub counts: BTreeMap<Arc<str>, CountChange>,
}

impl AddAssign for Ended {
    fn add_assign(&mut self, other: Self) {
        self.batches += other.batches;
        for (destination, counts) in other.counts {
            *self.counts.entry(destination).or_default() += counts;
        }
    }
}

/// What operators say of destinations, and they and the canary of files that are on their way. Each is a part of one
/// row of the store, looked at when batches are leased and before every request (B11).
#[async_trait]
pub trait Steering: Send + Sync {
    /// Every file of which messages are held, once per destination where they are. Where several processes share the
    /// store it may be a second old, but for what this process has changed.
    async fn held_files(&self) -> Result<Vec<HeldFile>, StoreError>;

    /// What is set for destinations. It may be as old.
    async fn set_limits(&self) -> Result<LimitsSet, StoreError>;

    /// Changes what is held of a file at a destination, or at all of its destinations, by [`HoldChange::apply`]. Returns
    /// after the sync, at how many destinations it changed something. A file that is not known is an answer: 0.
    async fn change_hold(
        &self,
        file: FileId,
        destination: Option<&str>,
        change: &HoldChange,
    ) -> Result<usize, StoreError>;

    /// How urgent files are by an order, at which destinations: of those that have something open, and may be of others.
    /// What is not listed is as urgent as it was when it was accepted. As old as [`Steering::held_files`].
    async fn priorities(&self) -> Result<Vec<FilePriority>, StoreError>;

    /// Orders how urgent a file is at a destination, or at all of its destinations. Returns after the sync, at how many
    /// destinations it changed something.
    async fn prioritize(
        &self,
        file: FileId,
        destination: Option<&str>,
        priority: Priority,
    ) -> Result<usize, StoreError>;

    /// Ends what is open of up to `batches` batches, or a few more where they are read together, that no worker has: of files that are cancelled, and of those whose
    /// time is over at `now` ([`Terms::is_over`](crate::model::terms::Terms::is_over)), whatever holds them.
    /// Where nothing is left to end the hold goes. Fewer than asked for: the rest is done, or not there yet.
    async fn end_step(&self, batches: usize, now: UnixMs) -> Result<Ended, StoreError>;

    /// What became of the messages of a file at a destination, of the batches that begin before row `before`.
    async fn trial(&self, file: FileId, destination: &str, before: u64) -> Result<Trial, StoreError>;
}
