//! What a ledger of rows knows of one message, read back for the conformance suite.

use std::sync::Arc;

use async_trait::async_trait;

use crate::model::{
    ids::MessageId,
    outcome::Reason,
    receipt::{ReceiptFacts, ReportedStates},
    state::MessageState,
    time::UnixMs,
};

/// One message at one destination, as a ledger has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerRow {
    /// The message.
    pub id: MessageId,
    /// Where it went.
    pub destination: Arc<str>,
    /// Where it came from.
    pub feed: Arc<str>,
    /// Who gets it.
    pub recipient: Box<str>,
    /// The maximum of what delivery recorded, what final receipts say and `expired` (I7).
    pub state: MessageState,
    /// Of the greatest record.
    pub attempts: u32,
    /// Of the greatest record.
    pub status: u16,
    /// Of the greatest record.
    pub reason: Option<Reason>,
    /// Of the greatest record.
    pub detail: Option<Box<str>>,
    /// The least that any record brought.
    pub provider_id: Option<Box<str>>,
    /// Of the greatest record.
    pub accepted_at: UnixMs,
    /// Of the greatest record.
    pub at: UnixMs,
    /// Which final states receipts reported.
    pub reported: ReportedStates,
    /// The greatest receipt.
    pub receipt: Option<LedgerReceipt>,
}

/// What a row keeps of its greatest receipt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerReceipt {
    /// What it reported.
    pub state: MessageState,
    /// When that happened, by the provider.
    pub at: Option<UnixMs>,
    /// The rest of it.
    pub facts: ReceiptFacts,
}

/// How much a ledger holds beside the inbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerTally {
    /// Rows: one per message and destination.
    pub rows: u64,
    /// Parked receipts.
    pub parked: u64,
    /// Receipts that were given up.
    pub orphans: u64,
    /// Receipts that could not be read.
    pub rejects: u64,
}

/// When a source brought what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerSource {
    /// When receipts or rejects last came.
    pub receipts_at: Option<UnixMs>,
    /// When its cursor last moved.
    pub cursor_at: Option<UnixMs>,
}

/// How the suite looks into a ledger. It sees the last commit.
#[async_trait]
pub trait RowReader: Send + Sync {
    /// A message's row at `destination`, if it has one.
    async fn row(&self, id: MessageId, destination: &str) -> Option<LedgerRow>;

    /// How much there is.
    async fn tally(&self) -> LedgerTally;

    /// A source that ever brought something.
    async fn source(&self, name: &str) -> Option<LedgerSource>;
}
