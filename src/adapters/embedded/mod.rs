//! The embedded store: outbox, queue and ledger as states of the same rows in one SQLite file.
//!
//! One writer thread groups commits ([`writer`]); reads have a thread and a connection of their own
//! ([`reader`]). The schema is `schema_1.sql` and its successors. A batch's way: `append` inserts it (phase `outstanding`),
//! [`leases`] move it to `queued` and `leased`, [`settle`] records what became of its messages until it
//! is `settled`.

mod append;
mod archive;
mod backlog;
mod claims;
mod entries;
mod leases;
mod lock;
mod messages;
mod open;
mod operator;
mod reader;
mod receipts;
mod redrive;
mod reports;
mod settle;
mod tx;
mod viewer;
mod writer;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    thread,
};

use async_trait::async_trait;
use postrider_actors::{
    model::{
        file::{Checkpoint, FileReport, FileState, Reject},
        ids::{BatchId, FileId},
        time::{MonoMs, UnixMs},
    },
    ports::{
        Append, Appended, Claim, ClaimRequest, Claims, EntryId, Fetched, ItemOutcome, Lease, LeaseRequest,
        LeaseToken, Ledger, Outbox, OutboxArchive, OutboxEntry, OutstandingQuery, Page, PageQuery, Queue,
        QueueDepth, Release, Settled, Settlement, StoreError,
    },
};

pub use self::{
    backlog::Backlog,
    lock::{InstanceLock, LockError},
    open::{DATABASE, OpenError, SCHEMA_VERSION, schema_version},
    operator::Operator,
    receipts::{ReceiptOperator, ReceiptViewer},
    viewer::Viewer,
    writer::{OnFatal, exit_on_fatal},
};
use self::{
    open::Access,
    reader::Reader,
    writer::{Durability, Writer},
};

/// The embedded store. Dropping it commits what it was given, checkpoints and joins its threads.
pub struct EmbeddedStore {
    handles: Option<Handles>,
    losses: usize,
    /// How far archiving has looked.
    archived_until: AtomicI64,
    /// Whether changes of states by receipts are kept.
    keeps_changes: AtomicBool,
}

struct Handles {
    writer: Writer,
    writing: thread::JoinHandle<()>,
    reader: Reader,
    reading: thread::JoinHandle<()>,
}

impl EmbeddedStore {
    /// Opens the store in `state_dir` for the daemon, which must hold the [`InstanceLock`]: makes and
    /// migrates it as needed, and marks lost what an earlier process had leased. Blocks.
    pub fn open(state_dir: &Path, on_fatal: OnFatal) -> Result<Self, OpenError> {
        let connection = open::open(state_dir, Access::Own)?;
        let failed = |detail: String| OpenError::Unavailable { path: state_dir.join(DATABASE), detail };
        let losses = leases::lose_all(&connection).map_err(|error| failed(error.to_string()))?;
        check_depth(&connection).map_err(|error| failed(error.to_string()))?;
        let read = open::open(state_dir, Access::Read)?;
        let (writer, writing) =
            Writer::start(connection, on_fatal).map_err(|error| failed(error.to_string()))?;
        let (reader, reading) = Reader::start(read).map_err(|error| failed(error.to_string()))?;
        Ok(Self {
            handles: Some(Handles { writer, writing, reader, reading }),
            losses,
            archived_until: AtomicI64::new(0),
            keeps_changes: AtomicBool::new(false),
        })
    }

    /// How many leases of an earlier process were marked lost when it was opened.
    pub fn losses(&self) -> usize {
        self.losses
    }

    /// How many batches are not settled. Its time grows with their number: about 0.1 s for a million.
    pub async fn backlog(&self) -> Result<Backlog, StoreError> {
        self.reader().read(|connection, _| backlog::read(connection)).await
    }

    fn writer(&self) -> &Writer {
        &self.handles.as_ref().expect("handles are taken only by drop").writer
    }

    fn reader(&self) -> &Reader {
        &self.handles.as_ref().expect("handles are taken only by drop").reader
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        let Some(Handles { writer, writing, reader, reading }) = self.handles.take() else { return };
        // The writer goes last, for who closes last moves the log into the database and removes it. A
        // panic of theirs was logged by the hook when it happened.
        drop(reader);
        let _ = reading.join();
        drop(writer);
        let _ = writing.join();
    }
}

/// Why a store could not be migrated.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The daemon runs, or the state directory can't be used.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The store can't be used.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Brings the store in `state_dir`, which must be there, up to date; its version then. Holds the
/// [`InstanceLock`] meanwhile.
pub fn migrate(state_dir: &Path) -> Result<i32, MigrateError> {
    schema_version(state_dir)?;
    let _lock = InstanceLock::acquire(state_dir)?;
    drop(open::open(state_dir, Access::Own)?);
    Ok(schema_version(state_dir)?)
}

/// The depth is kept by every transaction; a count that disagrees is a defect, mended and reported.
fn check_depth(connection: &rusqlite::Connection) -> rusqlite::Result<()> {
    let (kept, counted): (i64, i64) = connection.query_row(
        "SELECT depth, (SELECT coalesce(sum(accepted - sent - dead), 0) FROM file_destinations) FROM counters",
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    if kept != counted {
        tracing::error!(kept, counted, "the store's depth disagreed with its files; the count is taken");
        connection.execute("UPDATE counters SET depth = ?1", [counted])?;
    }
    Ok(())
}

#[async_trait]
impl Outbox for EmbeddedStore {
    async fn find_file(&self, id: FileId) -> Result<Option<(FileState, Checkpoint)>, StoreError> {
        self.reader().read(move |connection, _| reports::find(connection, id)).await
    }

    async fn append(&self, append: Append) -> Result<Appended, StoreError> {
        let bytes = append.batches.iter().map(|batch| batch.payload.len()).sum::<usize>()
            + append.rejects.iter().map(|reject| reject.raw.len()).sum::<usize>();
        self.writer().write(Durability::Synced, bytes, move |tx| append::append(tx, &append)).await
    }

    async fn known_entries(&self, entries: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        let entries = entries.to_vec();
        self.reader().read(move |connection, _| entries::known(connection, &entries)).await
    }

    async fn outstanding(&self, query: OutstandingQuery<'_>) -> Result<Vec<OutboxEntry>, StoreError> {
        let OutstandingQuery { due_by, limit, with_batches, except } = query;
        let except = except.to_vec();
        self.reader()
            .read(move |connection, caches| {
                leases::outstanding(connection, caches, due_by, limit, with_batches, &except)
            })
            .await
    }

    async fn mark_dispatched(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let ids = ids.to_vec();
        self.writer().write(Durability::Process, 0, move |tx| leases::dispatch(tx, &ids)).await
    }

    async fn next_due(&self) -> Result<Option<UnixMs>, StoreError> {
        self.reader().read(|connection, _| leases::next_due(connection)).await
    }

    async fn depth(&self) -> Result<u64, StoreError> {
        self.reader().read(|connection, _| reports::depth(connection)).await
    }
}

#[async_trait]
impl Queue for EmbeddedStore {
    fn stores_batches(&self) -> bool {
        false
    }

    async fn send(&self, entries: &[OutboxEntry]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        self.writer().write(Durability::Process, 0, move |tx| leases::dispatch(tx, &ids)).await
    }

    async fn queue_depth(&self) -> Result<QueueDepth, StoreError> {
        self.reader().read(|connection, _| leases::depth(connection)).await
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        self.writer().write(Durability::Process, 0, move |tx| leases::lease(tx, &request)).await
    }

    async fn extend(
        &self,
        tokens: &[LeaseToken],
        until: MonoMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let tokens = tokens.to_vec();
        self.writer().write(Durability::Process, 0, move |tx| leases::extend(tx, &tokens, until)).await
    }

    async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        let tokens = tokens.to_vec();
        self.writer().write(Durability::Process, 0, move |tx| leases::release(tx, &tokens, how)).await
    }

    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError> {
        let holder: Arc<str> = holder.into();
        self.writer().write(Durability::Process, 0, move |tx| leases::release_holder(tx, &holder)).await
    }

    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError> {
        self.writer().write(Durability::Process, 0, move |tx| leases::rescue(tx, now)).await
    }
}

#[async_trait]
impl Claims for EmbeddedStore {
    async fn claim(&self, request: ClaimRequest) -> Result<Vec<(BatchId, Claim)>, StoreError> {
        self.writer().write(Durability::Process, 0, move |tx| claims::claim(tx, &request)).await
    }

    async fn extend_claims(
        &self,
        tokens: &[LeaseToken],
        until: UnixMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let tokens = tokens.to_vec();
        self.writer().write(Durability::Process, 0, move |tx| claims::extend(tx, &tokens, until)).await
    }

    async fn release_claims(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        self.release(tokens, how).await
    }
}

#[async_trait]
impl OutboxArchive for EmbeddedStore {
    async fn page(&self, query: PageQuery) -> Result<Page, StoreError> {
        self.reader().read(move |connection, caches| archive::page(connection, caches, &query)).await
    }

    async fn get(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, Fetched)>, StoreError> {
        let ids = ids.to_vec();
        self.reader().read(move |connection, caches| archive::get(connection, caches, &ids)).await
    }

    async fn delete(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let ids = ids.to_vec();
        self.writer().write(Durability::Process, 0, move |tx| archive::delete(tx, &ids)).await
    }

    async fn count_outstanding(&self) -> Result<u64, StoreError> {
        self.reader().read(|connection, _| archive::count_outstanding(connection)).await
    }

    async fn archive(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        let after = self.archived_until.load(Ordering::Relaxed);
        let step = self
            .writer()
            .write(Durability::Process, 0, move |tx| archive::archive(tx, after, before, limit))
            .await?;
        self.archived_until.store(step.looked_until, Ordering::Relaxed);
        Ok(step.archived)
    }

    async fn forget_entries(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.writer()
            .write(Durability::Process, 0, move |tx| archive::forget_entries(tx, before, limit))
            .await
    }
}

#[async_trait]
impl Ledger for EmbeddedStore {
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError> {
        let retries = settlements.iter().flat_map(|settlement| &settlement.retries);
        let bytes = retries.map(|batch| batch.payload.len()).sum();
        self.writer()
            .write(Durability::Synced, bytes, move |tx| {
                settlements.iter().map(|settlement| settle::settle(tx, settlement)).collect()
            })
            .await
    }

    async fn disable_destination(&self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError> {
        let (name, reason) = (name.to_owned(), reason.to_owned());
        self.writer().write(Durability::Synced, 0, move |tx| append::disable(tx, &name, &reason, at)).await
    }

    async fn disabled_destinations(&self) -> Result<Vec<Arc<str>>, StoreError> {
        self.reader().read(|connection, _| reports::disabled(connection)).await
    }

    async fn report(&self, file: FileId) -> Result<Option<FileReport>, StoreError> {
        self.reader().read(move |connection, _| reports::report(connection, file)).await
    }

    async fn rejects(&self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError> {
        self.reader().read(move |connection, _| reports::rejects(connection, file, after, limit)).await
    }

    async fn latest_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.reader().read(move |connection, _| reports::list(connection, None, limit)).await
    }

    async fn settled_files(&self, feed: &str, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        let feed = feed.to_owned();
        self.reader().read(move |connection, _| reports::unreported(connection, &feed, limit)).await
    }

    async fn mark_reported(&self, files: &[FileId]) -> Result<(), StoreError> {
        let files = files.to_vec();
        self.writer().write(Durability::Synced, 0, move |tx| append::mark_reported(tx, &files)).await
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod view_tests;
