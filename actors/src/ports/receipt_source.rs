use std::time::Duration;

use async_trait::async_trait;

use super::{AckId, SourceCursor, StoreError};
use crate::model::{
    receipt::{Receipt, ReceiptReject},
    time::UnixMs,
};

/// What a poll of a source brought.
#[derive(Clone, Debug, Default)]
pub struct Polled {
    /// The receipts, at most a few thousand.
    pub receipts: Vec<Receipt>,
    /// What could not be read.
    pub rejects: Vec<ReceiptReject>,
    /// How many had a status that is of no interest.
    pub ignored: u64,
    /// How far the source is read with them; `None` if that has not changed.
    pub cursor: Option<SourceCursor>,
    /// What to acknowledge once all of that is durable.
    pub acks: Vec<AckId>,
}

/// Where receipts are fetched from. It delivers at least once, in any order; the ledger's inbox knows what it
/// has taken.
#[async_trait]
pub trait ReceiptSource: Send + Sync {
    /// Polls for receipts behind `cursor` (`None`: from the beginning); without any it waits for up to
    /// `wait`. A poll that fails is repeated with the same cursor: nothing is skipped (S0.1). Cancelling it
    /// loses nothing but time.
    async fn poll(&self, cursor: Option<&SourceCursor>, wait: Duration) -> Result<Polled, StoreError>;

    /// How far behind `now` a source is whose `cursor` says up to when it is read. `None`: it does not say.
    fn behind(&self, _cursor: Option<&SourceCursor>, _now: UnixMs) -> Option<Duration> {
        None
    }

    /// Drops what `poll` brought, after the commit. Repeating it is harmless.
    async fn acknowledge(&self, acks: &[AckId]) -> Result<(), StoreError>;
}
