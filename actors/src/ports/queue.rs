use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;

use super::{ItemOutcome, OutboxEntry, StoreError};
use crate::model::{
    batch::{BatchHeader, StateVector},
    ids::BatchId,
    outcome::Attempt,
    time::{MonoMs, UnixMs},
};

/// Proof of a lease. The fence grows with every lease of a batch, so that a holder who was thought
/// dead can be told from the one who has it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseToken {
    /// The batch.
    pub batch: BatchId,
    /// Which lease of it.
    pub fence: u64,
}

/// A leased batch.
#[derive(Clone)]
pub struct Lease {
    /// Proof of the lease.
    pub token: LeaseToken,
    /// The batch of the first attempt that these messages belong to.
    pub root: BatchId,
    /// What its messages have in common.
    pub header: Arc<BatchHeader>,
    /// The round of delivery.
    pub drive: u32,
    /// How many attempts its messages had before.
    pub attempt: u32,
    /// When the messages were accepted.
    pub accepted_at: UnixMs,
    /// The encoded rows.
    pub payload: Bytes,
    /// What is recorded already: only unsettled messages are to be sent.
    pub states: StateVector,
    /// The failed attempts so far, per message; empty if there were none.
    pub history: Vec<Vec<Attempt>>,
    /// How many leases of it were lost: its holder vanished with messages unrecorded. See `model::suspect`.
    pub losses: u32,
}

impl fmt::Debug for Lease {
    /// Counts, never payload (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("token", &self.token)
            .field("destination", &self.header.destination)
            .field("attempt", &self.attempt)
            .field("count", &self.states.0.len())
            .field("losses", &self.losses)
            .finish_non_exhaustive()
    }
}

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

/// Dispatched batches, leased to delivery workers. Holders extend their leases themselves; a lease
/// that nobody extends is lost after its deadline. Settling (in the ledger) ends a lease too.
#[async_trait]
pub trait Queue: Send + Sync {
    /// Whether `send` needs the batches themselves, or shares the outbox's storage.
    fn stores_batches(&self) -> bool;

    /// Accepts batches. An id that is there already is `Ok`.
    async fn send(&self, entries: &[OutboxEntry]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError>;

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
