//! What the outside world must offer. Each trait's documentation is its contract; the conformance
//! suites in `testing` check it, on the fakes and on every real implementation.
//!
//! Operations on many return an outcome per id. A timeout is [`ItemOutcome::Unknown`]: the caller
//! repeats it with the same ids, which every operation here allows.

mod archive;
mod calls;
mod claims;
mod clock;
pub mod console;
mod in_flight;
mod inbox;
mod intake;
mod ledger;
mod outbox;
mod queue;
mod rates;
mod receipt_source;
mod receipts;
mod spans;
mod steering;
mod table;
mod transport;
mod webhook;

pub use archive::{Archive, Cursor, Dispatch, Fetched, OutboxEntry, OutboxPages, Page, PageQuery};
pub use calls::CallObserver;
pub use claims::{Claim, ClaimRequest, Claims, DestinationDepth, DueBatch, DueQuery, Origin};
pub use clock::Clock;
pub use in_flight::InFlight;
pub use inbox::{
    Candidate, ClaimError, ClaimedFile, Expected, Inbox, InboxChange, RejectSink, Scan, Seen, Unowned,
};
pub use intake::{AckId, Intake, IntakeEntry};
pub use ledger::{Ledger, Settled, Settlement};
pub use outbox::{Append, AppendLimits, Appended, EntryId, HoldStep, Outbox};
pub use queue::{FirstTurns, Lease, LeaseRequest, LeaseToken, Queue, Release, Want};
pub use rates::RateTable;
pub use receipt_source::{Polled, ReceiptSource};
pub use receipts::{
    Applied, Arrival, ReceiptLedger, ReceiptRejects, Reread, SourceCursor, StatusChange, Taken,
};
pub use spans::SpanSink;
pub use steering::{Ended, LimitsSet, Steering};
pub use table::{Table, TableError};
pub use transport::{Handle, Hint, Outgoing, QueueDepth, Received, Transport, TransportLimits};
pub use webhook::{Answer, ItemAnswer, Webhook, WebhookRequest};

use crate::model::call::{Failure, FailureKind};

/// Why a store operation as a whole failed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum StoreError {
    /// It did not happen and may succeed later.
    #[error("the store can't do this now: {0}")]
    Retryable(String),
    /// It did not happen, and will not until somebody grants a permission or makes what is missing. It is waited
    /// for; the adapter says so once.
    #[error("the store denies this: {0}")]
    Denied(String),
    /// It did not happen and repeating it won't help.
    #[error("the store refused: {0}")]
    Permanent(String),
    /// It may or may not have happened; repeat it with the same ids.
    #[error("the store did not answer: {0}")]
    Unknown(String),
}

impl From<Failure> for StoreError {
    fn from(Failure { kind, why, .. }: Failure) -> Self {
        match kind {
            FailureKind::Throttled | FailureKind::Unavailable => Self::Retryable(why),
            FailureKind::Denied | FailureKind::Refused => Self::Denied(why),
            FailureKind::Invalid => Self::Permanent(why),
            FailureKind::Unknown => Self::Unknown(why),
        }
    }
}

/// The outcome of one item of an operation on many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ItemOutcome {
    /// Done.
    Ok,
    /// Not done; may succeed later.
    Retryable(String),
    /// Not done; repeating won't help.
    Permanent(String),
    /// May or may not be done; repeat it.
    Unknown(String),
}

impl From<StoreError> for ItemOutcome {
    /// What an operation that failed as a whole says of each of its items.
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Retryable(why) | StoreError::Denied(why) => Self::Retryable(why),
            StoreError::Permanent(why) => Self::Permanent(why),
            StoreError::Unknown(why) => Self::Unknown(why),
        }
    }
}

impl From<Failure> for ItemOutcome {
    fn from(failure: Failure) -> Self {
        StoreError::from(failure).into()
    }
}
