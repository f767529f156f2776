use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use super::{ItemOutcome, StoreError};
pub use crate::model::lease::{Lease, LeaseToken};
use crate::model::{
    ids::{BatchId, FileId},
    time::{MonoMs, UnixMs},
};

/// How much a worker wants for one destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// The destination.
    pub destination: Arc<str>,
    /// Enough once so many messages are due in what was leased (B10) …
    pub messages: usize,
    /// … and never more batches than this.
    pub batches: usize,
    /// The longest that a message may have to wait for its next attempt. One that waits for longer is due: its time was
    /// set by a clock that was ahead (F9). A store that has a clock of its own for that need not look.
    pub longest_wait: Duration,
    /// Instead of messages: what goes ahead of those that the worker has.
    pub first_turns: Option<FirstTurns>,
    /// The destination keeps an order: its oldest open batches are leased, due or not, by file and first row; none while
    /// another holder has one of its batches (B13). Only a store that one process leases from can do that.
    pub in_order: bool,
}

impl Want {
    /// Up to `messages` messages in up to `batches` batches, however long each of them may wait.
    pub fn new(destination: impl Into<Arc<str>>, messages: usize, batches: usize) -> Self {
        let destination = destination.into();
        Self {
            destination,
            messages,
            batches,
            longest_wait: Duration::MAX,
            first_turns: None,
            in_order: false,
        }
    }
}

/// What a worker that has enough is to have all the same: a batch of each file of which it has little or nothing, so that
/// a small file never waits for a large one that was leased ahead; and retries, if none waits at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstTurns {
    /// The files that it has enough of.
    pub besides: Vec<FileId>,
    /// Whether a retry is to come too.
    pub retries: bool,
}

impl FirstTurns {
    /// Batches that one call brings: where many files wait and few messages go, most are leased long before their turn.
    pub const BATCHES_MAX: usize = 16;
}

/// What a delivery worker asks for.
#[derive(Clone, Debug)]
pub struct LeaseRequest {
    /// Who asks; one name per worker and generation. The worker keeps this very `Arc` for as long as it lives, so that a
    /// store which only this process leases from can tell a worker that is late from one that is gone.
    pub holder: Arc<str>,
    /// What is wanted.
    pub wants: Vec<Want>,
    /// Until when the leases hold unless extended.
    pub until: MonoMs,
    /// What is due by then is leased.
    pub now: UnixMs,
    /// When this process was born, by the same clock: see [`Record::lease`](crate::model::ledger::Record::lease).
    pub born: UnixMs,
}

/// How a lease ends before its batch is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Release {
    /// Given back in good order; every message that was begun has been settled. Charges nothing.
    Unused,
    /// The same, because no request may begin for its file now (see [`Terms`](crate::model::terms::Terms)): nothing of the
    /// file is leased for that destination while the clock is between these, however many batches it has.
    Closed {
        /// When it was found closed: a clock that is set back before that says something else.
        from: UnixMs,
        /// When it may begin again.
        until: UnixMs,
    },
    /// Its holder is gone with messages unrecorded: they are suspects.
    Lost,
}

/// Batches with something to deliver, leased to workers when they are due. Holders extend their leases themselves; a
/// lease that nobody extends is lost after its deadline, unless only this process leases from the store and its holder
/// lives: a disk that was full for longer than a lease must not send everything twice. Settling (in the ledger) ends a lease too.
#[async_trait]
pub trait Queue: Send + Sync {
    /// What to call when a batch may have become ready that nothing in this process announced: it was sent by another
    /// process, or held back. Replaces what was given before.
    fn on_arrival(&self, _ring: Arc<dyn Fn() + Send + Sync>) {}

    /// Lets go of batches whose lease a settlement has ended: their every message is recorded in the ledger, or the
    /// store brings them again when they are due. For a queue that is not of one piece with the ledger: there, settling
    /// does it.
    async fn acknowledge(&self, _tokens: &[LeaseToken]) -> Result<(), StoreError> {
        Ok(())
    }

    /// Leases batches of which a message is due, by [`Record::lease`](crate::model::ledger::Record::lease); none of a
    /// disabled destination, and none that waits because its file is held or closed there. Of one destination by
    /// [`fairness`](crate::model::fairness): batches that are to be tried again before others, but where both wait those
    /// others get a fifth of the messages; then file by file, as they are urgent; then what has been due for longest. A
    /// queue between several machines has no such order but for first turns. Of a destination that keeps an order, see
    /// [`Want::in_order`]. Empty if there is nothing: it does not wait.
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

    /// Marks lost every lease whose deadline is before `now`, but for those of holders who live in this process where no
    /// other leases from the store. Returns how many.
    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError>;
}
