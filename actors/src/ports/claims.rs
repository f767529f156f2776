use std::sync::Arc;

use async_trait::async_trait;

use super::{Hint, ItemOutcome, Lease, LeaseToken, Release, StoreError, Want};
pub use crate::model::hint::{DueBatch, Origin};
use crate::model::{ids::BatchId, time::UnixMs};

/// Which due batches are asked for.
#[derive(Clone, Copy, Debug)]
pub struct DueQuery<'a> {
    /// Who asks: `NODE-START`, as in [`ClaimRequest::holder`].
    pub process: &'a str,
    /// Due by then.
    pub due_by: UnixMs,
    /// Of which destinations, and up to how many of each. None of any other: nothing of theirs can be sent now, and it
    /// must not stand in the way.
    pub wants: &'a [(Arc<str>, usize)],
    /// To be looked at anew: hints of these were sent and are gone from the queue, so that others have claimed them, or
    /// the hints are lost.
    pub confirm: &'a [BatchId],
}

/// How many messages of a destination are open, by where they stand (B21).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationDepth {
    /// The destination.
    pub destination: Arc<str>,
    /// In batches that are due and that nobody has claimed.
    pub due: u64,
    /// In batches that are not due yet.
    pub waiting: u64,
    /// In batches that a worker has; what it has recorded meanwhile may still be counted.
    pub leased: u64,
}

/// Who claims which batches.
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
    /// It is the holder's now, with what it carries.
    Granted(Box<Lease>),
    /// Another holder has it.
    Held {
        /// Until then, unless extended.
        until: UnixMs,
    },
    /// Nothing of it is due before then.
    Early {
        /// When its first message may be tried.
        due: UnixMs,
    },
    /// Its file is held at its destination (B11). It is listed as due again when that ends.
    Waits,
    /// Nothing is left to do for it.
    Settled,
    /// No such batch is stored (any more).
    Missing,
    /// Not now; ask again later: the store is busy, what the batch carries can't be read, or its destination is
    /// disabled (410). Nothing is claimed.
    Unavailable(String),
}

/// A store whose batches several processes share: which are due, and who has which. Whatever carries hints between the
/// processes is only a messenger: a claim alone makes a lease exclusive.
///
/// A batch is due from the time when its first open message is until somebody claims it, and again from the end of a
/// claim that leaves messages open: given back, settled, or run out. Sending a hint of it changes nothing (B20).
#[async_trait]
pub trait Claims: Send + Sync {
    /// Batches that are due, of each destination the oldest due first; none that waits because its file is held. An implementation may leave out, for a bounded
    /// time, what another process appended or left and will send a hint of itself; and it may list for a while what
    /// another process has claimed.
    async fn due(&self, query: DueQuery<'_>) -> Result<Vec<DueBatch>, StoreError>;

    /// What goes ahead of what a worker has, as [`Queue::lease`](super::Queue::lease) says of first turns, as far as this
    /// process knows of it. It is claimed without an entry: that would wait behind those of the others.
    async fn first_turns(&self, want: &Want, due_by: UnixMs) -> Result<Vec<Hint>, StoreError>;

    /// When the earliest batch becomes due, or did, as far as this process knows; `None` if it knows of none.
    async fn next_due(&self) -> Result<Option<UnixMs>, StoreError>;

    /// How many messages each destination has at `now`, of those that have any. Unknown is an error, never 0.
    async fn depths(&self, now: UnixMs) -> Result<Vec<DestinationDepth>, StoreError>;

    /// Claims batches by [`Record::lease`](crate::model::ledger::Record::lease), one answer per id in order. A batch
    /// whose content can't be read is given back by the store itself and is `Unavailable`.
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
