//! Receipts from an inbound queue, e.g. SQS: an entry is one receipt or an array of them, bare or inside a
//! notification of Amazon SNS.
//!
//! A queue gives a few entries at a time, and the inbox takes hundreds in one commit. So when entries come,
//! more are fetched, several receives at once, until there are enough or no more. They are deleted after the
//! commit (S4.3); repeats are recognised. The queue keeps the position, so there is no cursor.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::future::join_all;
use postrider_actors::{
    flow::{blocking, delete_entries},
    model::receipt_format::{ReadReceipts, ReceiptFormat, notification},
    ports::{AckId, Intake, IntakeEntry, Polled, ReceiptSource, SourceCursor, StoreError},
};

/// Entries asked for at once: what SQS gives at most.
const RECEIVE_MAX: usize = 10;

/// Concurrent receives, once it is known that there are entries.
const RECEIVES_AT_ONCE: usize = 10;

/// No more is fetched when the held bodies have so many bytes. A round may bring ten receives more.
const BODIES_BYTES_MAX: usize = 8 << 20;

/// How long entries are gathered at most: they are invisible to others and wait for their commit.
const GATHER_MAX: Duration = Duration::from_secs(2);

/// Limits of one poll and of one entry.
#[derive(Clone, Copy, Debug)]
pub struct QueueReceiptsLimits {
    /// No more entries are fetched when there are so many; every entry is at least one receipt.
    pub receipts: usize,
    /// The most receipts of one entry; one with more is rejected as a whole.
    pub entry_receipts: usize,
}

/// A queue of receipts.
pub struct QueueReceipts {
    intake: Arc<dyn Intake>,
    format: ReceiptFormat,
    limits: QueueReceiptsLimits,
}

impl QueueReceipts {
    /// Reads what `intake` brings as `format` says.
    pub fn new(intake: Arc<dyn Intake>, format: ReceiptFormat, limits: QueueReceiptsLimits) -> Self {
        Self { intake, format, limits }
    }

    /// Entries, once the first have come: as many as there are, within the limits.
    async fn gather(&self, mut entries: Vec<IntakeEntry>) -> Vec<IntakeEntry> {
        let until = tokio::time::Instant::now() + GATHER_MAX.min(self.intake.visibility() / 4);
        let mut bytes: usize = entries.iter().map(|entry| entry.body.len()).sum();
        while entries.len() < self.limits.receipts
            && bytes < BODIES_BYTES_MAX
            && tokio::time::Instant::now() < until
        {
            let missing = (self.limits.receipts - entries.len()).div_ceil(RECEIVE_MAX);
            let receives = missing.min(RECEIVES_AT_ONCE);
            let round = (0..receives).map(|_| self.intake.receive(RECEIVE_MAX, Duration::ZERO));
            let before = entries.len();
            let mut has_failed = false;
            for received in join_all(round).await {
                match received {
                    Ok(more) => {
                        bytes += more.iter().map(|entry| entry.body.len()).sum::<usize>();
                        entries.extend(more);
                    }
                    // What was received is kept; the next poll fails if the error stays.
                    Err(error) => {
                        tracing::debug!(source = %self.format.source(), %error, "a receive failed");
                        has_failed = true;
                    }
                }
            }
            if has_failed || entries.len() - before < receives * RECEIVE_MAX / 2 {
                break; // that was nearly all
            }
        }
        entries
    }
}

/// What entries hold. One that can't be read is a reject by its id.
fn read(format: &ReceiptFormat, entries: &[IntakeEntry], entry_receipts: usize) -> ReadReceipts {
    let mut all = ReadReceipts::default();
    for entry in entries {
        let inside = notification(&entry.body);
        let body = inside.as_ref().map_or(&entry.body[..], |text| text.as_bytes());
        let place = |item| format!("{}[{item}]", entry.id);
        match format.read_body(body, entry_receipts, place) {
            Ok(mut read) => {
                all.receipts.append(&mut read.receipts);
                all.rejects.append(&mut read.rejects);
                all.ignored += read.ignored;
            }
            Err(error) => all.rejects.push(format.reject(body, entry.id.clone(), error.to_string())),
        }
    }
    all
}

#[async_trait]
impl ReceiptSource for QueueReceipts {
    async fn poll(&self, _: Option<&SourceCursor>, wait: Duration) -> Result<Polled, StoreError> {
        let first = self.intake.receive(RECEIVE_MAX, wait).await?;
        if first.is_empty() {
            return Ok(Polled::default());
        }
        let entries = self.gather(first).await;
        let acks = entries.iter().map(|entry| entry.ack.clone()).collect();
        let (format, limit) = (self.format.clone(), self.limits.entry_receipts);
        let read = blocking(move || Ok(read(&format, &entries, limit)))
            .await
            .map_err(|error: std::io::Error| StoreError::Retryable(error.to_string()))?;
        let ReadReceipts { receipts, rejects, ignored } = read;
        Ok(Polled { receipts, rejects, ignored, cursor: None, acks })
    }

    async fn acknowledge(&self, acks: &[AckId]) -> Result<(), StoreError> {
        if let Err((entries, why)) = delete_entries(&*self.intake, acks).await {
            tracing::warn!(source = %self.format.source(), entries, why, "entries can't be deleted: they come again and are known");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
