use std::sync::Arc;

use async_trait::async_trait;

use super::{LeaseToken, StoreError};
use crate::model::{
    batch::NewBatch,
    file::{FileReport, Reject},
    ids::FileId,
    outcome::Verdict,
    record::MessageRecord,
    time::UnixMs,
};

/// What a worker has to say about one leased batch.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// The lease it worked under.
    pub token: LeaseToken,
    /// New facts: index in the batch, and what to record.
    pub verdicts: Vec<(u32, Verdict)>,
    /// The retry batches that carry on every message with a `Verdict::Retry` here.
    pub retries: Vec<NewBatch>,
    /// The same facts, a record per verdict, for a ledger that keeps a row of each message; empty if none does.
    pub records: Vec<MessageRecord>,
}

/// How a settlement was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Recorded; messages of the batch are still open and the lease goes on.
    Open,
    /// Recorded, and with it the whole batch: the lease has ended.
    Complete,
    /// The lease was not current. What was sent is recorded, for a 2xx is a fact whoever reports it
    /// (I7); failures were left to the current holder and no retry was appended.
    Stale,
}

/// What became of every message.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Records facts, appends the retries to the outbox and acknowledges completed batches: one
    /// transaction, or in that order, so that no crash loses a message. Returns after the sync, one
    /// answer per settlement in order. Recording is `max`, and a settlement that is repeated because the
    /// first answer was lost changes nothing: it is answered as it was, or `Stale`.
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError>;

    /// Holds a destination's messages until an operator enables it again (410). Idempotent.
    async fn disable_destination(&self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError>;

    /// The destinations that are disabled.
    async fn disabled_destinations(&self) -> Result<Vec<Arc<str>>, StoreError>;

    /// What there is to say of a file now.
    async fn report(&self, file: FileId) -> Result<Option<FileReport>, StoreError>;

    /// Up to `limit` rejected rows after row `after`, in order.
    async fn rejects(&self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError>;

    /// Up to `limit` files, the latest first.
    async fn latest_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError>;

    /// Up to `limit` files of `feed` that are closed and settled but whose final report is not marked
    /// as written.
    async fn settled_files(&self, feed: &str, limit: usize) -> Result<Vec<FileReport>, StoreError>;

    /// Records that final reports are written. A redrive clears the mark.
    async fn mark_reported(&self, files: &[FileId]) -> Result<(), StoreError>;
}
