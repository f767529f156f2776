use std::sync::Arc;

use async_trait::async_trait;

use super::{ItemOutcome, LeaseToken, Release, StoreError};
use crate::model::{ids::BatchId, ledger::Record, time::UnixMs};

/// Who wants which batches, which a queue has handed to it.
#[derive(Clone, Debug)]
pub struct ClaimRequest {
    /// One name per worker and generation, unique among all processes: `PROCESS/worker#generation`, where
    /// PROCESS is `NODE-START` (see [`is_earlier_life`](crate::model::ledger::is_earlier_life)).
    pub holder: Arc<str>,
    /// The batches, each once, and none that the holder has in hand: it would be granted twice.
    pub batches: Vec<BatchId>,
    /// Until when the claims hold unless extended, by the wall clock: other machines read it.
    pub until: UnixMs,
    /// When the claims begin.
    pub now: UnixMs,
    /// When this process was born: see [`Record::lease`].
    pub born: UnixMs,
}

/// The answer for one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is the holder's now: the record as it stands, with the fence that proves it.
    Granted(Box<Record>),
    /// Another holder has it: the queue delivered it twice.
    Held {
        /// Until then, unless extended.
        until: UnixMs,
    },
    /// Nothing of it is due before then: the queue delivered it too early, or an old entry for it. It is outstanding
    /// again, and the entry may be deleted.
    Early {
        /// When its first message may be tried.
        due: UnixMs,
    },
    /// Nothing is left to do for it: acknowledge it.
    Settled,
    /// No such batch is stored (any more).
    Missing,
    /// Not now; ask again later: the store is busy, or the batch's destination is disabled (410).
    Unavailable(String),
}

/// Exclusive claims on stored batches, for a queue that only carries them: it delivers at least once, to
/// anybody, and fences nobody. The store that holds outbox and ledger keeps them.
#[async_trait]
pub trait Claims: Send + Sync {
    /// Claims batches by [`Record::lease`], one answer per id in order, whether they are marked as dispatched or not: a
    /// queue may deliver before its acceptance is recorded, and a batch that was claimed is dispatched.
    async fn claim(&self, request: ClaimRequest) -> Result<Vec<(BatchId, Claim)>, StoreError>;

    /// Moves deadlines. `Permanent` for a claim that is not held any more. One that has run out but was not
    /// given to another is still held.
    async fn extend_claims(
        &self,
        tokens: &[LeaseToken],
        until: UnixMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError>;

    /// Gives claims back: they can be claimed at once. A token that is not current is ignored.
    async fn release_claims(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError>;
}
