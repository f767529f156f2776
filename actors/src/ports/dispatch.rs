use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{ItemOutcome, Queue, StoreError};
use crate::model::{batch::NewBatch, ids::BatchId, time::UnixMs};

/// A batch that the queue has not accepted yet, or that is due again.
#[derive(Clone, Debug)]
pub struct OutboxEntry {
    /// The batch.
    pub id: BatchId,
    /// Where it goes.
    pub destination: Arc<str>,
    /// How many messages.
    pub count: u32,
    /// When it may be delivered.
    pub not_before: UnixMs,
    /// The batch itself, if it was asked for.
    pub batch: Option<NewBatch>,
}

/// Which outstanding batches are asked for.
#[derive(Clone, Copy, Debug)]
pub struct OutstandingQuery<'a> {
    /// Due then, oldest due first.
    pub due_by: UnixMs,
    /// Up to how many.
    pub limit: usize,
    /// None of these destinations: nothing of theirs can be dispatched now, and it must not stand in the
    /// way of the others.
    pub except: &'a [Arc<str>],
}

/// A store whose batches another queue carries to workers: it says which are to be sent.
///
/// A batch is outstanding until the queue has accepted it or a worker has claimed it, and again from the end of a claim
/// that leaves messages open, from a claim that came too early, and from a redrive; due when its first open message is.
#[async_trait]
pub trait DispatchSource: Send + Sync {
    /// Outstanding batches, with what they carry. An implementation may leave out, for a bounded time, what another
    /// process appended and will dispatch itself.
    async fn outstanding(&self, query: OutstandingQuery<'_>) -> Result<Vec<OutboxEntry>, StoreError>;

    /// Records that the queue has accepted batches, as they were last listed. Repeating it is harmless. One that was
    /// claimed since is left as it is: what the queue accepted is spent, and the batch would be forgotten.
    async fn mark_dispatched(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError>;

    /// When the earliest outstanding batch is due; `None` if nothing is outstanding.
    async fn next_due(&self) -> Result<Option<UnixMs>, StoreError>;
}

/// How many batches a queue holds. Its parts are counted at different moments: it is a gauge, no proof.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueDepth {
    /// Ready to be leased.
    pub visible: u64,
    /// Leased.
    pub in_flight: u64,
    /// Accepted, but not due yet.
    pub delayed: u64,
}

impl QueueDepth {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.visible + self.in_flight + self.delayed
    }
}

/// A queue that batches are sent to: it carries them to workers, and the store that they come from knows the truth.
#[async_trait]
pub trait DispatchTarget: Queue {
    /// How long before a batch is due it may be sent. What is due later waits in the outbox.
    fn reach(&self) -> Duration {
        Duration::ZERO
    }

    /// Accepts batches. An id that is there already is `Ok`.
    async fn send(&self, entries: &[OutboxEntry]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError>;

    /// How many batches it holds. Unknown is an error, never 0.
    async fn queue_depth(&self) -> Result<QueueDepth, StoreError>;
}
