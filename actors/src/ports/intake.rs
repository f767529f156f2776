use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::{ItemOutcome, QueueDepth, StoreError};
use crate::model::time::UnixMs;

pub use crate::model::intake::AckId;

/// One entry of an inbound queue, ours until its visibility timeout runs out.
#[derive(Clone)]
pub struct IntakeEntry {
    /// The queue's own id for it, the same at every delivery; at most 128 bytes.
    pub id: String,
    /// What this delivery of it is extended, released or deleted by.
    pub ack: AckId,
    /// What it says.
    pub body: Bytes,
    /// When it was sent, the same at every delivery.
    pub sent_at: UnixMs,
    /// How often it was delivered, this delivery included; 0 if the queue does not say.
    pub receives: u32,
}

impl std::fmt::Debug for IntakeEntry {
    /// Counts, never the body (I10).
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IntakeEntry")
            .field("id", &self.id)
            .field("receives", &self.receives)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// The queue that a feed reads. It delivers at least once, in any order, and again whatever is not deleted
/// before its visibility timeout.
///
/// Operations on many take any number of ack ids and answer one outcome per id, in order. `Permanent`: this
/// delivery is not ours any more; the entry is gone or will be delivered again. What may be fixed from
/// outside while the process runs (a queue that is away, a permission that is missing) is `Retryable`.
#[async_trait]
pub trait Intake: Send + Sync {
    /// Takes up to `limit` entries, and never more than the engine's own maximum, for as long as the
    /// intake's visibility timeout. Without any it waits for up to `wait`; an empty answer is not an error.
    /// Cancelling it loses no entry: what was on its way comes again after the visibility timeout.
    async fn receive(&self, limit: usize, wait: Duration) -> Result<Vec<IntakeEntry>, StoreError>;

    /// How long an entry that was received or extended stays ours.
    fn visibility(&self) -> Duration;

    /// Restarts the visibility timeout of entries. The holder does this before half of it is over.
    async fn extend(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError>;

    /// Deletes entries: only after the commit of what they brought. `Ok` for what is gone already.
    async fn delete(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError>;

    /// Gives entries back, to be delivered again at once.
    async fn release(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError>;

    /// How many entries the queue holds. Unknown is an error, never 0.
    async fn depth(&self) -> Result<QueueDepth, StoreError>;
}
