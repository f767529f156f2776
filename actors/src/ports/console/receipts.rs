//! What an operator's commands ask of a ledger of rows: the state of each message, and its receipts.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    model::{
        ids::{FileId, MessageId},
        outcome::Reason,
        receipt::{EventId, ReceiptFacts, ReceiptKey, RejectedText, ReportedStates},
        state::MessageState,
        time::UnixMs,
    },
    ports::{SourceCursor, StoreError},
};
use async_trait::async_trait;

/// The lower bounds of the classes of age that gaps are counted in.
pub const GAP_AGES: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_hours(1),
    Duration::from_hours(6),
    Duration::from_hours(24),
    Duration::from_hours(48),
    Duration::from_hours(72),
];

/// What commands read of a ledger of rows. Each answer is a snapshot of its own, and as much as its arguments
/// allow, so that a reader holds nothing up.
#[async_trait]
pub trait ReceiptView: Send + Sync {
    /// The message at each of its destinations, by their names. Empty if nothing was recorded of it.
    async fn message(&self, id: MessageId) -> Result<Vec<MessageRow>, StoreError>;

    /// How many messages there are by destination and state: of a file, or of all files, which reads every row.
    async fn counts(&self, file: Option<FileId>) -> Result<Vec<StateCount>, StoreError>;

    /// Up to `limit` messages that were sent to `destination` before `before` and have had no final receipt,
    /// expired or not, the oldest first, after `after`.
    async fn gaps(
        &self,
        destination: &str,
        before: UnixMs,
        after: Option<&GapPlace>,
        limit: usize,
    ) -> Result<Vec<Gap>, StoreError>;

    /// How many of them there are, by age at `now`: one number per class of [`GAP_AGES`].
    async fn gap_ages(&self, destination: &str, now: UnixMs) -> Result<[u64; GAP_AGES.len()], StoreError>;

    /// Up to `limit` receipts that wait for their message, the longest waiting first.
    async fn parked(&self, which: &ReceiptFilter, limit: usize) -> Result<Vec<HeldReceipt>, StoreError>;

    /// Up to `limit` receipts whose message never came, the latest first.
    async fn orphans(&self, which: &ReceiptFilter, limit: usize) -> Result<Vec<HeldReceipt>, StoreError>;

    /// Up to `limit` receipts that could not be read, the latest first.
    async fn rejects(&self, which: &ReceiptFilter, limit: usize) -> Result<Vec<RejectedReceipt>, StoreError>;

    /// Every source that ever brought something, by name.
    async fn sources(&self) -> Result<Vec<SourceRow>, StoreError>;
}

/// Which receipts; all that is set must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReceiptFilter {
    /// Of this source.
    pub source: Option<String>,
    /// Of sources whose receipts are about messages to this destination.
    pub destination: Option<String>,
}

/// What is known of a message at one destination.
#[derive(Clone, PartialEq, Eq)]
pub struct MessageRow {
    /// The message.
    pub id: MessageId,
    /// Where it went.
    pub destination: Arc<str>,
    /// Where it came from.
    pub feed: Arc<str>,
    /// Who gets it.
    pub recipient: String,
    /// Its state: the maximum of what delivery, receipts and the clock said.
    pub state: MessageState,
    /// What delivery said: `Retrying`, `Dead` or `Sent`.
    pub recorded: MessageState,
    /// How many attempts it had.
    pub attempts: u32,
    /// The last answer's HTTP status, 0 without an answer.
    pub status: u16,
    /// Why the last attempt failed, if it did.
    pub reason: Option<Reason>,
    /// What the destination itself said of that.
    pub detail: Option<String>,
    /// The destination's own id for it.
    pub provider_id: Option<String>,
    /// When its row was accepted, or last redriven.
    pub accepted_at: UnixMs,
    /// When the last attempt ended.
    pub recorded_at: UnixMs,
    /// When anything of this last changed.
    pub updated_at: UnixMs,
    /// Which final states receipts reported.
    pub reported: ReportedStates,
    /// The greatest of its receipts, if there was one.
    pub receipt: Option<AppliedReceipt>,
}

impl fmt::Debug for MessageRow {
    /// No recipient and no response (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageRow")
            .field("id", &self.id)
            .field("destination", &self.destination)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// The receipt whose facts a message's row shows.
#[derive(Clone, PartialEq, Eq)]
pub struct AppliedReceipt {
    /// What it said.
    pub state: MessageState,
    /// Its identity.
    pub event: EventId,
    /// When the provider says that happened.
    pub at: Option<UnixMs>,
    /// The rest of it.
    pub facts: ReceiptFacts,
}

/// The number of messages in one state.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StateCount {
    /// Where they went.
    pub destination: Arc<str>,
    /// Their state.
    pub state: MessageState,
    /// How many.
    pub messages: u64,
}

/// A message that was sent and has had no final receipt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The message.
    pub id: MessageId,
    /// `Sent` or `Expired`.
    pub state: MessageState,
    /// The destination's own id for it: what to ask the provider for.
    pub provider_id: Option<String>,
    /// When it was sent.
    pub sent_at: UnixMs,
}

impl Gap {
    /// Where a walk that has seen it continues.
    pub fn place(&self) -> GapPlace {
        GapPlace { sent_at: self.sent_at, id: self.id }
    }
}

/// The position of a walk over gaps: they are ordered by time, then by id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GapPlace {
    /// When the last one was sent.
    pub sent_at: UnixMs,
    /// Which it was.
    pub id: MessageId,
}

/// A receipt that has no message (yet).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldReceipt {
    /// The destination of its source.
    pub destination: Arc<str>,
    /// The source that brought it.
    pub source: Arc<str>,
    /// Its identity within the source.
    pub event: EventId,
    /// What it names.
    pub key: ReceiptKey,
    /// What it says.
    pub state: MessageState,
    /// Since when it is held: parked, or given up.
    pub since: UnixMs,
}

/// A receipt that could not be read.
#[derive(Clone, PartialEq, Eq)]
pub struct RejectedReceipt {
    /// The source that brought it.
    pub source: Arc<str>,
    /// Where it stood there.
    pub place: String,
    /// What is wrong with it.
    pub reason: String,
    /// When it came.
    pub at: UnixMs,
    /// What is kept of it.
    pub text: RejectedText,
}

impl fmt::Debug for RejectedReceipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RejectedReceipt({} {}: {})", self.source, self.place, self.reason)
    }
}

/// The state of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceRow {
    /// Its name.
    pub name: Arc<str>,
    /// The destination whose messages its receipts are about.
    pub destination: Arc<str>,
    /// How far it was read; `None` if it keeps no cursor.
    pub cursor: Option<SourceCursor>,
    /// When receipts last came from it, whether they could be read or not.
    pub receipts_at: Option<UnixMs>,
    /// When its cursor last moved: when it was last looked at with success, if it is read by time.
    pub cursor_at: Option<UnixMs>,
    /// How many of its receipts wait in the inbox.
    pub waiting: u64,
    /// How many of them wait for their message.
    pub parked: u64,
}
