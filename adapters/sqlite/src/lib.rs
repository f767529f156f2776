//! The embedded store: outbox, queue and ledger as one row per batch in one SQLite file.
//!
//! One writer thread groups commits ([`writer`]); reads have a thread and a connection of their own
//! ([`reader`]). The schema is `schema.sql`. A batch's path: `append` inserts it, due at once or later; [`leases`] give it
//! to workers when it is due; [`settle`] records what became of its messages. What is still open is due again in the
//! same row. The rules are `model::ledger`'s; [`stored`] is between them and the row.

mod append;
mod archive;
mod audit;
mod backlog;
mod ending;
mod entries;
mod holds;
mod leases;
mod limits;
mod lock;
mod messages;
mod open;
mod operator;
mod reader;
mod receipts;
mod redrive;
mod reports;
mod settle;
mod stored;
mod tx;
mod viewer;
mod writer;

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    thread,
};

use async_trait::async_trait;
use postrider_actors::{
    model::{
        canary::Trial,
        file::{Checkpoint, FileReport, FileState, Reject},
        hold::{HeldFile, HoldChange},
        ids::{BatchId, FileId},
        ledger::Evidence,
        priority::{FilePriority, Priority},
        room::OpenMessages,
        time::{MonoMs, UnixMs},
    },
    ports::{
        Append, Appended, Archive, Ended, EntryId, ItemOutcome, Lease, LeaseRequest, LeaseToken, Ledger,
        LimitsSet, Outbox, Queue, Release, Settled, Settlement, Steering, StoreError,
        console::{FileSelector, FilesAt, OrderedFiles},
    },
};

use self::{
    archive::KeptPlace,
    leases::Holders,
    open::Access,
    reader::Reader,
    tx::TxError,
    writer::{Durability, Writer},
};
pub use self::{
    backlog::Backlog,
    lock::{InstanceLock, LockError, is_running},
    open::{DATABASE, OpenError, SCHEMA_VERSION, schema_version},
    operator::Operator,
    receipts::{ReceiptOperator, ReceiptViewer},
    viewer::Viewer,
    writer::{OnFatal, exit_on_fatal},
};

/// The embedded store. Dropping it commits what it was given, checkpoints and joins its threads.
pub struct EmbeddedStore {
    handles: Option<Handles>,
    losses: usize,
    holders: Holders,
    /// How far archiving has looked.
    archived_until: Mutex<KeptPlace>,
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
        Self::open_after(state_dir, &Evidence::unknown(), on_fatal)
    }

    /// The same, where it may be known what the earlier process had in flight when it died (B17).
    pub fn open_after(state_dir: &Path, evidence: &Evidence, on_fatal: OnFatal) -> Result<Self, OpenError> {
        let connection = open::open(state_dir, Access::Own)?;
        let path = state_dir.join(DATABASE);
        // A page that is damaged may be met here first: that does not pass, as a full disk does.
        let failed = |error: TxError| OpenError::from_tx(&path, &error);
        leases::try_quarantined(&connection).map_err(failed)?;
        let losses = leases::lose_all(&connection, evidence).map_err(failed)?;
        check_depth(&connection).map_err(failed)?;
        let read = open::open(state_dir, Access::Read)?;
        let no_thread =
            |error: io::Error| OpenError::Unavailable { path: path.clone(), detail: error.to_string() };
        let (writer, writing) = Writer::start(connection, on_fatal).map_err(no_thread)?;
        let (reader, reading) = Reader::start(read).map_err(no_thread)?;
        Ok(Self {
            handles: Some(Handles { writer, writing, reader, reading }),
            losses,
            holders: Holders::default(),
            archived_until: Mutex::default(),
            keeps_changes: AtomicBool::new(false),
        })
    }

    /// How many leases of an earlier process were marked lost when it was opened.
    pub fn losses(&self) -> usize {
        self.losses
    }

    /// How many batches are not settled, by what they wait for at `now`. Its time grows with their number: about 0.1 s
    /// for a million.
    pub async fn backlog(&self, now: UnixMs) -> Result<Backlog, StoreError> {
        self.reader().read(move |connection, _| backlog::read(connection, now)).await
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

/// Open messages are counted by every transaction; a count that disagrees is a defect, corrected and reported.
fn check_depth(connection: &rusqlite::Connection) -> Result<(), TxError> {
    let corrected = connection.execute(
        "UPDATE destinations SET open = c.counted
           FROM (SELECT n.seq, coalesce(sum(d.accepted - d.sent - d.dead - d.unsent - d.cancelled), 0) AS counted
                   FROM destinations n LEFT JOIN file_destinations d ON d.destination = n.seq GROUP BY n.seq) c
          WHERE c.seq = destinations.seq AND c.counted <> destinations.open",
        [],
    )?;
    if corrected > 0 {
        tracing::error!(
            destinations = corrected,
            "counts of open messages disagreed with the store's files; corrected"
        );
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

    async fn open_messages(&self) -> Result<OpenMessages, StoreError> {
        self.reader().read(|connection, _| reports::open_messages(connection)).await
    }
}

#[async_trait]
impl Queue for EmbeddedStore {
    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        self.holders.note(&request.holder);
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
        let living = self.holders.living();
        self.writer().write(Durability::Process, 0, move |tx| leases::rescue(tx, now, &living)).await
    }
}

#[async_trait]
impl Steering for EmbeddedStore {
    async fn held_files(&self) -> Result<Vec<HeldFile>, StoreError> {
        self.reader().read(|connection, _| holds::list(connection)).await
    }

    async fn set_limits(&self) -> Result<LimitsSet, StoreError> {
        self.reader().read(|connection, _| limits::list(connection)).await
    }

    async fn change_hold(
        &self,
        file: FileId,
        destination: Option<&str>,
        change: &HoldChange,
    ) -> Result<usize, StoreError> {
        let files = OrderedFiles::Named(FileSelector::Id(file));
        let of = FilesAt { files, destination: destination.map(str::to_owned) };
        let change = change.clone();
        self.writer().write(Durability::Synced, 0, move |tx| holds::change_of(tx, &of, &change)).await
    }

    async fn priorities(&self) -> Result<Vec<FilePriority>, StoreError> {
        self.reader().read(|connection, _| holds::priorities(connection)).await
    }

    async fn prioritize(
        &self,
        file: FileId,
        destination: Option<&str>,
        priority: Priority,
    ) -> Result<usize, StoreError> {
        let files = OrderedFiles::Named(FileSelector::Id(file));
        let of = FilesAt { files, destination: destination.map(str::to_owned) };
        self.writer().write(Durability::Synced, 0, move |tx| holds::prioritize(tx, &of, priority)).await
    }

    async fn end_step(&self, batches: usize, now: UnixMs) -> Result<Ended, StoreError> {
        self.writer().write(Durability::Synced, 0, move |tx| ending::step(tx, batches, now)).await
    }

    async fn trial(&self, file: FileId, destination: &str, before: u64) -> Result<Trial, StoreError> {
        let destination = destination.to_owned();
        self.reader().read(move |connection, _| holds::trial(connection, file, &destination, before)).await
    }
}

#[async_trait]
impl Archive for EmbeddedStore {
    async fn archive(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        let after = *self.archived_until.lock().unwrap_or_else(PoisonError::into_inner);
        let step = self
            .writer()
            .write(Durability::Process, 0, move |tx| archive::archive(tx, after, before, limit))
            .await?;
        *self.archived_until.lock().unwrap_or_else(PoisonError::into_inner) = step.looked_until;
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
        self.writer()
            .write(Durability::Synced, 0, move |tx| {
                settlements.iter().map(|settlement| settle::settle(tx, settlement)).collect()
            })
            .await
    }

    async fn disable_destination(&self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError> {
        let (name, reason) = (name.to_owned(), reason.to_owned());
        self.writer().write(Durability::Synced, 0, move |tx| append::disable(tx, &name, &reason, at)).await?;
        Ok(())
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

    async fn timed_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.reader().read(move |connection, _| reports::timed(connection, limit)).await
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
mod damage_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod view_tests;
