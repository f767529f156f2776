use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;

use super::{LeaseToken, StoreError};
use crate::model::{
    file::{FileReport, Reject},
    ids::FileId,
    ledger::{Changes, MessageVerdict, Record, Standing},
    record::MessageRecord,
    time::UnixMs,
};

/// What a worker has to say about one leased batch.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// The lease it worked under.
    pub token: LeaseToken,
    /// New facts, in the order in which they became known.
    pub verdicts: Vec<MessageVerdict>,
    /// What the destination itself said of dead messages, by index.
    pub details: BTreeMap<u32, Box<str>>,
    /// The same facts, a record per verdict, for a ledger that keeps a row of each message; empty if none does.
    pub records: Vec<MessageRecord>,
    /// The worker has nothing more to do for the batch: its lease ends with this, whatever is left.
    pub ends: bool,
    /// The message that it begins next, by itself, once this is recorded (B17).
    pub begins: Option<u32>,
}

impl Settlement {
    /// As the rules take it.
    pub fn standing(&self) -> Standing<'_> {
        Standing {
            fence: self.token.fence,
            verdicts: &self.verdicts,
            details: &self.details,
            ends: self.ends,
            begins: self.begins,
        }
    }
}

/// How a settlement was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Recorded; messages of the batch are still open and the lease continues.
    Open,
    /// Recorded, and the lease has ended as the worker said; messages are left, to be tried when they are due.
    Released,
    /// Recorded, and with it the whole batch: the lease has ended.
    Complete,
    /// The lease was not current. What was sent is recorded, because a 2xx is a fact whoever reports it
    /// (I7); failures were left to the current holder.
    Stale,
}

impl Settled {
    /// The answer to a settlement that made these changes and left the record so.
    pub fn of(changes: &Changes, record: &Record) -> Self {
        if !changes.was_current {
            Self::Stale
        } else if record.is_settled() {
            Self::Complete
        } else if record.holder.is_none() {
            Self::Released
        } else {
            Self::Open
        }
    }
}

/// What became of every message.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Records facts by [`Record::settle`], with the history and the counts that follow from them, all or
    /// nothing. Returns after the sync, one answer per settlement in order; one about a batch that is not
    /// stored is `Stale`. A settlement that is repeated because the first answer was lost changes nothing:
    /// it is answered as it was, or `Stale`.
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

    /// Up to `limit` files that are not settled and whose terms say by when they are to be done, the earliest first. Where
    /// several processes share the ledger: those that this one has taken in.
    async fn timed_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError>;

    /// Up to `limit` files of `feed` that are closed and settled but whose final report is not marked
    /// as written.
    async fn settled_files(&self, feed: &str, limit: usize) -> Result<Vec<FileReport>, StoreError>;

    /// Records that final reports are written. A redrive clears the mark.
    async fn mark_reported(&self, files: &[FileId]) -> Result<(), StoreError>;
}
