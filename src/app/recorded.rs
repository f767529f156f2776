//! A ledger that keeps a row of each message beside what it settles by batch.

use std::sync::Arc;

use async_trait::async_trait;
use postrider_actors::{
    model::{
        file::{FileReport, Reject},
        ids::FileId,
        time::UnixMs,
    },
    ports::{Ledger, ReceiptLedger, Settled, Settlement, StoreError},
};

/// Records rows first and settles then. Both may be repeated, so a crash between them costs a repetition and
/// no row: what is settled is recorded.
pub(super) struct Recorded {
    rows: Arc<dyn ReceiptLedger>,
    ledger: Arc<dyn Ledger>,
}

impl Recorded {
    pub(super) fn new(rows: Arc<dyn ReceiptLedger>, ledger: Arc<dyn Ledger>) -> Self {
        Self { rows, ledger }
    }
}

#[async_trait]
impl Ledger for Recorded {
    async fn settle(&self, mut settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError> {
        let mut records = Vec::new();
        for settlement in &mut settlements {
            records.append(&mut settlement.records);
        }
        if !records.is_empty() {
            self.rows.record(records).await?;
            postrider_actors::failpoint!("record.after");
        }
        self.ledger.settle(settlements).await
    }

    async fn disable_destination(&self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError> {
        self.ledger.disable_destination(name, reason, at).await
    }

    async fn disabled_destinations(&self) -> Result<Vec<Arc<str>>, StoreError> {
        self.ledger.disabled_destinations().await
    }

    async fn report(&self, file: FileId) -> Result<Option<FileReport>, StoreError> {
        self.ledger.report(file).await
    }

    async fn rejects(&self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError> {
        self.ledger.rejects(file, after, limit).await
    }

    async fn latest_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.ledger.latest_files(limit).await
    }

    async fn timed_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.ledger.timed_files(limit).await
    }

    async fn settled_files(&self, feed: &str, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.ledger.settled_files(feed, limit).await
    }

    async fn mark_reported(&self, files: &[FileId]) -> Result<(), StoreError> {
        self.ledger.mark_reported(files).await
    }
}
