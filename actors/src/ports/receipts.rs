use std::{ops::AddAssign, sync::Arc};

use async_trait::async_trait;

use super::StoreError;
use crate::model::{
    ids::MessageId,
    receipt::{EventId, Receipt, ReceiptReject},
    record::MessageRecord,
    state::MessageState,
    time::UnixMs,
};

/// How far a source was read. Opaque to all but the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceCursor(pub String);

/// What a source brought at once.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The source's name.
    pub source: Arc<str>,
    /// The destination whose messages its receipts are about.
    pub destination: Arc<str>,
    /// The receipts.
    pub receipts: Vec<Receipt>,
    /// What could not be read.
    pub rejects: Vec<ReceiptReject>,
    /// How far the source is read with them; `None`: it keeps no cursor, or it has not moved.
    pub cursor: Option<SourceCursor>,
    /// When.
    pub at: UnixMs,
}

/// What of an arrival was new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Receipts that wait in the inbox now.
    pub new: u64,
    /// Receipts that had been taken before.
    pub known: u64,
    /// How many of the new ones have an id under which another receipt came before.
    pub reused_ids: u64,
    /// Rejects that were not known.
    pub rejected: u64,
}

impl AddAssign for Taken {
    fn add_assign(&mut self, more: Self) {
        let Self { new, known, reused_ids, rejected } = more;
        self.new += new;
        self.known += known;
        self.reused_ids += reused_ids;
        self.rejected += rejected;
    }
}

/// The result of one application. Receipts that were taken from the inbox are each in exactly one of
/// `matched`, `parked`, `rejected`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Receipts whose message is known.
    pub matched: u64,
    /// Receipts whose message is not known (yet).
    pub parked: u64,
    /// Receipts that can't be applied: they are among the rejects, with the reason.
    pub rejected: u64,
    /// Messages whose state changed.
    pub changed: u64,
    /// Messages that now are known to have failed and to have arrived.
    pub conflicts: u64,
}

impl Applied {
    /// How many receipts were taken from the inbox.
    pub fn total(&self) -> u64 {
        self.matched + self.parked + self.rejected
    }
}

impl AddAssign for Applied {
    fn add_assign(&mut self, more: Self) {
        let Self { matched, parked, rejected, changed, conflicts } = more;
        self.matched += matched;
        self.parked += parked;
        self.rejected += rejected;
        self.changed += changed;
        self.conflicts += conflicts;
    }
}

/// A message's new state, for the feed of status changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusChange {
    /// Ascends with time, roughly; unique.
    pub number: u64,
    /// The message.
    pub id: MessageId,
    /// At which destination.
    pub destination: Arc<str>,
    /// The destination's own id for it.
    pub provider_id: Option<String>,
    /// Where it stood.
    pub before: MessageState,
    /// Its state.
    pub state: MessageState,
    /// When that was recorded.
    pub at: UnixMs,
}

/// The part of the ledger that keeps a row of each message, and joins receipts with them.
///
/// A message is identified by its id and its destination. Its row's state is the maximum of what delivery
/// recorded, what receipts say and `expired` (I7). Every operation may be repeated, and called by several
/// workers of several processes at once; none of them blocks `record` for longer than its own small step.
#[async_trait]
pub trait ReceiptLedger: Send + Sync {
    /// Records what delivery says: inserts rows or merges into them by [`record_rank`]. Receipts that were
    /// parked for one of them go back into the inbox. Returns after the sync.
    ///
    /// [`record_rank`]: crate::model::record::record_rank
    async fn record(&self, records: Vec<MessageRecord>) -> Result<(), StoreError>;

    /// Puts receipts into the inbox, keeps rejects and moves the source's cursor, all or nothing. A receipt whose
    /// source and event are known is left out, and so is a reject. Any number of them: an implementation divides
    /// them (F53), the cursor goes with the last part. It notes when receipts or rejects last came, to a second, and
    /// when the cursor last moved. Returns after the sync.
    async fn take(&self, arrival: Arrival) -> Result<Taken, StoreError>;

    /// How far a source was read; `None` if it never was.
    async fn cursor(&self, source: &str) -> Result<Option<SourceCursor>, StoreError>;

    /// Takes up to `receipts` receipts, or the first that together have more than `bytes`, out of the inbox
    /// and applies them, all or nothing: to the messages they are about, or parks them. What another worker
    /// holds is skipped. If as many wait, it takes at least half of `receipts`: they may be stored in groups. One that
    /// can't be applied, whatever is wrong with it or with its message's row, becomes a reject and holds up no other.
    async fn apply(&self, receipts: usize, bytes: usize, at: UnixMs) -> Result<Applied, StoreError>;

    /// How many receipts wait in the inbox. Unknown is an error, never 0.
    async fn waiting(&self) -> Result<u64, StoreError>;

    /// How many receipts are parked. Unknown is an error, never 0.
    async fn parked(&self) -> Result<u64, StoreError>;

    /// Puts up to `limit` parked receipts whose message is known by now back into the inbox; how many. It is
    /// what `record` does too: whichever comes second finds the other.
    async fn rejoin(&self, limit: usize) -> Result<usize, StoreError>;

    /// Gives up to `limit` receipts up that were parked before `before`: they are orphans from then on; how
    /// many. Nobody looks for its message any more, but it joins when that is recorded.
    async fn orphan(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError>;

    /// Marks up to `limit` messages of `destination` expired that were sent before `before` and have had no
    /// final receipt; how many.
    async fn expire(
        &self,
        destination: &str,
        before: UnixMs,
        limit: usize,
        at: UnixMs,
    ) -> Result<usize, StoreError>;

    /// Up to `limit` state changes by receipts and expiry after number `after`, in order. Only a ledger that
    /// was opened to keep them has any.
    async fn changes(&self, after: Option<u64>, limit: usize) -> Result<Vec<StatusChange>, StoreError>;

    /// Forgets changes that were delivered.
    async fn forget_changes(&self, numbers: &[u64]) -> Result<(), StoreError>;

    /// One bounded step of retention: removes up to `limit` of what is older than `before`: rows of messages,
    /// orphans, rejects, and the memory of which events were taken. Roughly how many; 0 if nothing is left. An
    /// implementation may remove whole partitions instead.
    async fn retire(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError>;
}

/// The results of reading a source's rejects again. Each is named by its event.
#[derive(Clone, Debug)]
pub struct Reread {
    /// The source's name.
    pub source: Arc<str>,
    /// The destination whose messages its receipts are about.
    pub destination: Arc<str>,
    /// Those that are receipts now.
    pub receipts: Vec<(EventId, Receipt)>,
    /// Those whose status is of no interest now.
    pub ignored: Vec<EventId>,
    /// Those that still can't be read, and why.
    pub rejected: Vec<(EventId, String)>,
    /// When.
    pub at: UnixMs,
}

/// The rejects of a ledger of rows, for reading them again once a mapping is fixed: a command does that, with or without a
/// running daemon.
#[async_trait]
pub trait ReceiptRejects: Send + Sync {
    /// Up to `limit` rejects of `source` with an event greater than `after`, in the order of their events.
    async fn rejects(
        &self,
        source: &str,
        after: Option<EventId>,
        limit: usize,
    ) -> Result<Vec<ReceiptReject>, StoreError>;

    /// Settles rejects that were read again, all or nothing; at most some hundred, and it may be repeated. Receipts
    /// go into the inbox as by [`ReceiptLedger::take`], unless their event is known. With those that are of no
    /// interest they leave the rejects; the others have a new reason. From then on both events of a receipt are
    /// known, its own and its reject's: it is neither taken nor rejected again. Returns after the sync.
    async fn settle_rejects(&self, reread: Reread) -> Result<Taken, StoreError>;
}
