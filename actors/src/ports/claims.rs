use std::sync::Arc;

use async_trait::async_trait;

use super::{ItemOutcome, LeaseToken, Release, StoreError};
use crate::model::{batch::StateVector, ids::BatchId, time::UnixMs};

/// Who wants which batches, which a queue has handed to it.
#[derive(Clone, Debug)]
pub struct ClaimRequest {
    /// One name per worker and generation, unique among all processes: `PROCESS/worker#generation`, where
    /// PROCESS is `NODE-START` (see [`is_earlier_life`](crate::model::lease::is_earlier_life)).
    pub holder: Arc<str>,
    /// The batches, each once, and none that the holder has in hand: it would be granted twice.
    pub batches: Vec<BatchId>,
    /// Until when the claims hold unless extended, by the wall clock: other machines read it.
    pub until: UnixMs,
    /// When the claims begin.
    pub now: UnixMs,
}

/// The answer for one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is the holder's now.
    Granted {
        /// Proof of it: the ledger takes failures and retries only from who has the latest.
        fence: u64,
        /// How many leases of it were lost, this claim's predecessor included if it was.
        losses: u32,
        /// What is recorded already.
        states: StateVector,
    },
    /// Another holder has it: the queue delivered it twice, or too early.
    Held {
        /// Until then, unless extended.
        until: UnixMs,
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
    /// Claims batches, one answer per id in order, whether they are marked as dispatched or not: a queue may
    /// deliver before its acceptance is recorded, and a batch that was claimed is dispatched.
    ///
    /// A claim whose deadline is before `now`, or whose holder is an earlier life of the same process, is
    /// lost: the batch is granted anew and the loss is counted. Until then only its holder can get it: what a
    /// holder has already is granted to it again and charges nothing, for its first answer was lost.
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
