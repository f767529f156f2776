use std::sync::Arc;

use async_trait::async_trait;

use super::{ItemOutcome, StoreError};
use crate::model::{
    batch::NewBatch,
    file::{Checkpoint, FileRecord, FileState, Reject},
    ids::{BatchId, FileId},
    time::UnixMs,
};

/// One step of a file into the outbox: rows and the checkpoint behind them, in one transaction.
#[derive(Clone, Debug)]
pub struct Append {
    /// The file; inserted if it is not known yet.
    pub file: Arc<FileRecord>,
    /// Batches of rows between the last checkpoint and this one, for every destination of the file.
    pub batches: Vec<NewBatch>,
    /// Rows of that stretch that were refused.
    pub rejects: Vec<Reject>,
    /// Row numbers of that stretch that were left out as duplicates.
    pub duplicates: Vec<u64>,
    /// How far the file is read with this step. An append whose checkpoint is not beyond the stored
    /// one changes no counter: it is a repetition.
    pub checkpoint: Checkpoint,
    /// `Ingesting`, or how the file was closed with this step.
    pub state: FileState,
    /// When.
    pub at: UnixMs,
}

/// A batch that the queue has not accepted yet.
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
    /// The batch itself, if it was asked for.
    pub batch: Option<NewBatch>,
}

/// Batches that the queue has not accepted yet, and the files they come from. The only point of
/// durability on the way in: what `append` returned `Ok` for survives a power cut.
#[async_trait]
pub trait Outbox: Send + Sync {
    /// What is stored of a file; `None` if it was never seen.
    async fn find_file(&self, id: FileId) -> Result<Option<(FileState, Checkpoint)>, StoreError>;

    /// Stores one step of a file, all or nothing. Batches are inserted if absent. Returns after the
    /// sync. Appends of one file take effect in the order in which they were called. Appending to a
    /// `Failed` or `SourceLost` file reopens it: the same bytes were dropped again.
    async fn append(&self, append: Append) -> Result<(), StoreError>;

    /// Up to `limit` batches that are not dispatched and due at `now`, oldest due first.
    /// `with_batches` asks for the batches themselves, for a queue that stores them.
    async fn outstanding(
        &self,
        now: UnixMs,
        limit: usize,
        with_batches: bool,
    ) -> Result<Vec<OutboxEntry>, StoreError>;

    /// Records that the queue has accepted batches. Repeating it is harmless.
    async fn mark_dispatched(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError>;

    /// When the earliest batch that is not dispatched is due; `None` if there is none.
    async fn next_due(&self) -> Result<Option<UnixMs>, StoreError>;

    /// How many messages have no final state yet, dispatched or not. Unknown is an error, never 0.
    async fn depth(&self) -> Result<u64, StoreError>;
}
