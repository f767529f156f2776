use std::sync::Arc;

use async_trait::async_trait;

use super::StoreError;
use crate::model::{
    batch::{NewBatch, PayloadWriter, Rows},
    file::{Checkpoint, FileRecord, FileState, Reject},
    hold::HoldChange,
    ids::{BatchId, FileId},
    room::OpenMessages,
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
    /// What waits from this step on, or does no longer; made with the step if that changes anything.
    pub hold: Option<HoldStep>,
    /// When.
    pub at: UnixMs,
    /// The entries of an inbound queue that these rows came from; empty for a dropped file. Stored with
    /// them, so that an entry that is delivered to us twice is taken once.
    pub entries: Vec<EntryId>,
}

/// A change of what is held of a step's file, at some of its destinations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldStep {
    /// The destinations.
    pub destinations: Vec<Arc<str>>,
    /// What changes at each of them.
    pub change: HoldChange,
}

/// An entry of an inbound queue, by the feed and the queue's own id for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId {
    /// The feed.
    pub feed: Arc<str>,
    /// The id, at most 128 bytes.
    pub id: String,
    /// When it was sent, the same at every delivery.
    pub sent_at: UnixMs,
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It is stored, now or before.
    Stored,
    /// Nothing is stored: these entries were taken before, as part of another file. Build the step again
    /// without them.
    Known(Vec<EntryId>),
}

/// The most that one step may hold. One batch or one row may always be appended, whatever its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendLimits {
    /// Batches.
    pub batches: usize,
    /// Bytes of payload, each batch counted for itself.
    pub bytes: usize,
    /// Minutes in which the entries of an inbound queue were sent (B22).
    pub entry_minutes: usize,
}

impl AppendLimits {
    /// No limit but the caller's own.
    pub const NONE: Self = Self { batches: usize::MAX, bytes: usize::MAX, entry_minutes: usize::MAX };
}

impl Append {
    /// I1 at the gate: every row between the stored checkpoint and this one is, at each destination of the
    /// file, in exactly one of: a batch, the rejects, the duplicates. What is wrong, otherwise.
    ///
    /// Every implementation of [`Outbox`] refuses (`Permanent`) a step beyond the stored checkpoint that
    /// breaks this: stored, it could never balance.
    pub fn check_balance(&self, before: &Checkpoint) -> Result<(), String> {
        let after = &self.checkpoint;
        let grown = |after: u64, before: u64, what: &str| {
            after.checked_sub(before).ok_or_else(|| {
                format!("the checkpoint of file {} goes from {before} {what} back to {after}", self.file.id)
            })
        };
        let rows = grown(after.rows, before.rows, "rows")?;
        grown(after.offset, before.offset, "bytes")?;
        let rejected = grown(after.rejected, before.rejected, "rejected rows")?;
        let duplicates = grown(after.duplicates, before.duplicates, "duplicate rows")?;
        if (rejected, duplicates) != (self.rejects.len() as u64, self.duplicates.len() as u64) {
            return Err(format!(
                "file {}: the checkpoint counts {rejected} rejected and {duplicates} duplicate rows, the step \
                 brings {} and {}",
                self.file.id,
                self.rejects.len(),
                self.duplicates.len()
            ));
        }
        for destination in &self.file.destinations {
            let batches = self.batches.iter().filter(|batch| batch.header.destination == *destination);
            let accepted: u64 = batches.map(|batch| u64::from(batch.count)).sum();
            if accepted + rejected + duplicates != rows {
                return Err(format!(
                    "file {}, destination {destination}: {rows} rows became {accepted} messages, {rejected} \
                     rejected and {duplicates} duplicate rows",
                    self.file.id
                ));
            }
        }
        for batch in &self.batches {
            let id = BatchId::derive(self.file.id, &batch.header.destination, batch.first_row);
            let is_ours = batch.header.file == self.file.id
                && self.file.destinations.contains(&batch.header.destination);
            let is_here = batch.first_row > before.rows && batch.first_row <= after.rows && batch.count > 0;
            if !(batch.id == id && is_ours && is_here) {
                return Err(format!(
                    "batch {} (destination {}, row {}, {} messages) is not one of rows {}..={} of file {} for one of \
                     its destinations",
                    batch.id,
                    batch.header.destination,
                    batch.first_row,
                    batch.count,
                    before.rows + 1,
                    after.rows,
                    self.file.id
                ));
            }
        }
        Ok(())
    }
}

impl Append {
    /// The same step without what is behind row `rows`, which another process has stored meanwhile: two machines may be
    /// given the same file, and cut it differently. What is wrong with a batch, if it can't be read.
    pub fn after(mut self, rows: u64) -> Result<Self, String> {
        let cut = |batch: NewBatch| -> Result<Option<NewBatch>, String> {
            if batch.first_row > rows {
                return Ok(Some(batch));
            }
            let content = Rows::decode(batch.payload.clone())
                .map_err(|error| format!("batch {}: {error}", batch.id))?;
            let mut left = PayloadWriter::with_capacity(batch.payload.len());
            let mut first_row = None;
            for index in (0..content.len()).filter(|&index| content.row(index) > rows) {
                first_row = first_row.or(Some(content.row(index)));
                left.push(content.row(index), content.bytes(index));
            }
            Ok(first_row.map(|first_row| NewBatch {
                id: BatchId::derive(batch.header.file, &batch.header.destination, first_row),
                first_row,
                count: left.count(),
                payload: left.finish(),
                ..batch
            }))
        };
        let batches: Result<Vec<_>, String> = self.batches.into_iter().map(cut).collect();
        self.batches = batches?.into_iter().flatten().collect();
        self.rejects.retain(|reject| reject.row > rows);
        self.duplicates.retain(|&row| row > rows);
        Ok(self)
    }
}

/// Where batches are kept, and the files they come from. The only point of durability on the way in: what `append` returned `Ok` for survives a power cut.
#[async_trait]
pub trait Outbox: Send + Sync {
    /// The most that one `append` takes.
    fn append_limits(&self) -> AppendLimits {
        AppendLimits::NONE
    }

    /// What is stored of a file; `None` if it was never seen.
    async fn find_file(&self, id: FileId) -> Result<Option<(FileState, Checkpoint)>, StoreError>;

    /// Stores one step of a file, all or nothing. Batches are inserted if absent. Returns after the
    /// sync. Appends of one file take effect in the order in which they were called. Appending to a
    /// `Failed` or `SourceLost` file reopens it: the same bytes were dropped again. A store that several machines share
    /// takes of a step what another machine, which reads the same file, has not stored yet: [`Append::after`].
    async fn append(&self, append: Append) -> Result<Appended, StoreError>;

    /// Which of these entries were taken before.
    async fn known_entries(&self, entries: &[EntryId]) -> Result<Vec<EntryId>, StoreError>;

    /// How many messages of each destination have no final state yet; of those that have any. Unknown is an error, never 0.
    async fn open_messages(&self) -> Result<OpenMessages, StoreError>;

    /// All of them together.
    async fn depth(&self) -> Result<u64, StoreError> {
        Ok(self.open_messages().await?.values().sum())
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::testing::fixtures;

    #[test]
    fn what_another_machine_has_stored_is_cut_off() {
        let file = fixtures::file("feed", 1, &["d", "e"]);
        let step = fixtures::step_without(&file, 1..=10, &[2, 6], &[7], UnixMs(5));
        assert_eq!(step.clone().after(0).unwrap().batches, step.batches);
        let rest = step.clone().after(5).unwrap();
        let expected = fixtures::batch(&file, "d", 8..=10, UnixMs(5));
        assert_eq!((rest.batches.len(), &rest.batches[0]), (2, &expected));
        assert_eq!(
            (rest.rejects.len(), &rest.duplicates[..], rest.checkpoint),
            (1, &[7][..], step.checkpoint)
        );
        let before = Checkpoint { offset: 0, rows: 5, rejected: 1, duplicates: 0 };
        assert_eq!(rest.check_balance(&before), Ok(()));
        assert!(step.after(10).unwrap().batches.is_empty());
    }
}
