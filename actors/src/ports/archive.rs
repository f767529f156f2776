use std::sync::Arc;

use async_trait::async_trait;

use super::{ItemOutcome, OutboxEntry, StoreError};
use crate::model::{batch::NewBatch, ids::BatchId, time::UnixMs};

/// Which side of dispatching a batch is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dispatch {
    /// The queue has not accepted it yet.
    Outstanding,
    /// The queue has accepted it.
    Dispatched,
}

/// Where a listing goes on. Opaque and self-contained: any process can go on from it, at any time.
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
    /// The entries, without their batches. Within the page in order of time (accepted, or dispatched).
    /// Of one partition key (a file) they come in order of row across pages too; nothing else is ordered
    /// beyond a page (S3.10).
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

/// Operations on the outbox as a whole: what its sweeper, its archiver and an operator need.
#[async_trait]
pub trait OutboxArchive: Send + Sync {
    /// Lists batches.
    async fn page(&self, query: PageQuery) -> Result<Page, StoreError>;

    /// Many batches by id, one answer per id in order.
    async fn get(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, Fetched)>, StoreError>;

    /// Removes dispatched batches with their payloads; what became of their messages stays in the ledger.
    /// `Permanent` for one that is outstanding, not settled, or holds the rows of a dead message (a redrive
    /// needs them). Removing what is gone already is `Ok`.
    async fn delete(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError>;

    /// How many batches are outstanding, without loading them. Unknown is an error, never 0.
    async fn count_outstanding(&self) -> Result<u64, StoreError>;

    /// Removes up to `limit` settled batches that were dispatched before `before`; how many it removed.
    async fn archive(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError>;
}
