use std::sync::Arc;

use async_trait::async_trait;

use super::{ItemOutcome, StoreError};
use crate::model::{batch::NewBatch, ids::BatchId, time::UnixMs};

/// Which side of dispatching a batch is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dispatch {
    /// It waits, due or not: a message of it is open, and nobody has claimed it.
    Outstanding,
    /// A worker has it, or it is settled.
    Dispatched,
}

/// A stored batch, as it is listed.
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
}

/// Where a listing continues. Opaque and self-contained: any process can continue from it, at any time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(pub String);

/// What to list.
#[derive(Clone, Debug)]
pub struct PageQuery {
    /// Which side.
    pub dispatch: Dispatch,
    /// Only this destination; `None`: all of them.
    pub destination: Option<Arc<str>>,
    /// Up to how many.
    pub limit: usize,
    /// Where the last page ended; `None` for the first.
    pub cursor: Option<Cursor>,
}

/// A page of a listing.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The entries. Of one partition key (a file, at one destination) first attempts that wait come in order of row,
    /// within a page and across pages; nothing else is ordered (S3.10).
    pub entries: Vec<OutboxEntry>,
    /// Where the next one begins; `None` if this was the last. Never a cursor to nothing.
    pub next: Option<Cursor>,
}

/// One batch of a get-many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// Here it is.
    Batch(NewBatch),
    /// No such batch is stored.
    Missing,
    /// The store did not get to it within its retries; it may be there.
    Unprocessed,
}

/// Operations on an outbox that several machines share, as a whole: what its sweeper and an operator need (S3).
#[async_trait]
pub trait OutboxPages: Send + Sync {
    /// Lists batches that are stored: those that are outstanding, or those that are dispatched, settled or not.
    /// What changes sides meanwhile may be missed or listed on both. `Permanent` for an invalid cursor.
    async fn page(&self, query: PageQuery) -> Result<Page, StoreError>;

    /// Many batches by id, one answer per id in order.
    async fn get(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, Fetched)>, StoreError>;

    /// Removes the payloads of dispatched batches; what became of their messages stays in the ledger. `Permanent` for
    /// one from which a message may still have to be sent, by [`Record::why_kept`](crate::model::ledger::Record::why_kept).
    /// Removing what is gone already is `Ok`.
    async fn delete(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError>;

    /// How many batches are outstanding, without loading them. Unknown is an error, never 0.
    async fn count_outstanding(&self) -> Result<u64, StoreError>;
}

/// Archiving: removing what is settled and old.
#[async_trait]
pub trait Archive: Send + Sync {
    /// One bounded step of removing payloads that nothing needs any more, by
    /// [`Record::why_kept`](crate::model::ledger::Record::why_kept), of batches that were accepted before
    /// `before`: up to `limit`; how many it removed. 0 does not mean that none is left: the next step looks further.
    async fn archive(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError>;

    /// Forgets up to `limit` entries of inbound queues that were taken before `before`; how many. For a store
    /// that does not let them expire by itself.
    async fn forget_entries(&self, _before: UnixMs, _limit: usize) -> Result<usize, StoreError> {
        Ok(0)
    }
}
