use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{ItemOutcome, OutboxEntry, StoreError};
pub use crate::model::lease::{Lease, LeaseToken};
use crate::model::{ids::BatchId, time::MonoMs};

/// What a delivery worker asks for.
#[derive(Clone, Debug)]
pub struct LeaseRequest {
    /// Who asks; one name per worker and generation.
    pub holder: Arc<str>,
    /// Up to how many batches for which destination.
    pub wants: Vec<(Arc<str>, usize)>,
    /// Until when the leases hold unless extended.
    pub until: MonoMs,
}

/// How a lease ends before its batch is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Given back in good order; every message that was begun has been settled. Charges nothing.
    Unused,
    /// Its holder is gone with messages unrecorded: they are suspects.
    Lost,
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

/// Dispatched batches, leased to delivery workers. Holders extend their leases themselves; a lease
/// that nobody extends is lost after its deadline. Settling (in the ledger) ends a lease too.
#[async_trait]
pub trait Queue: Send + Sync {
    /// Whether `send` needs the batches themselves, or shares the outbox's storage.
    fn stores_batches(&self) -> bool;

    /// How long before a batch is due it may be sent. What is due later waits in the outbox.
    fn reach(&self) -> Duration {
        Duration::ZERO
    }

    /// What to call when a batch may have become ready that no `send` of this process announced: by
    /// another process, or after a delay. Replaces what was given before.
    fn on_arrival(&self, _ring: Arc<dyn Fn() + Send + Sync>) {}

    /// Accepts batches. An id that is there already is `Ok`.
    async fn send(&self, entries: &[OutboxEntry]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError>;

    /// Forgets batches whose every message is recorded in the ledger. For a queue that is not of one piece
    /// with the ledger: there, settling does it.
    async fn acknowledge(&self, _tokens: &[LeaseToken]) -> Result<(), StoreError> {
        Ok(())
    }

    /// How many batches it holds. Unknown is an error, never 0.
    async fn queue_depth(&self) -> Result<QueueDepth, StoreError>;

    /// Leases due batches, never more than asked for per destination, none of a disabled
    /// destination. Empty if there is nothing: it does not wait.
    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError>;

    /// Moves deadlines. `Permanent` for a lease that is not held any more: stop working on it.
    async fn extend(
        &self,
        tokens: &[LeaseToken],
        until: MonoMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError>;

    /// Gives leases back. A token that is not current is ignored.
    async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError>;

    /// Marks lost every lease of `holder`, who is known to be gone. Returns how many.
    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError>;

    /// Marks lost every lease whose deadline is before `now`. Returns how many.
    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError>;
}
