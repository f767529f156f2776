//! The ledger of rows, in tables of its own (see `schema.sql`) beside outbox, queue and ledger.
//!
//! One writer at a time is what makes it simple: a transaction that [`record`]s sees every receipt that is
//! parked, and one that [`apply`]s sees every message that is recorded, so whichever comes second finds the
//! other, and no two workers ever hold the same receipt.

mod apply;
mod events;
pub(crate) mod fresh;
mod record;
mod reread;
mod sweep;
mod take;
#[cfg(test)]
mod tests;
mod view;

use std::sync::{Arc, atomic::Ordering};

use async_trait::async_trait;
use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        receipt::{EventId, Price, Receipt, ReceiptFacts, ReceiptKey},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Applied, Arrival, ReceiptLedger, SourceCursor, StatusChange, StoreError, Taken},
};
use rusqlite::{Connection, OptionalExtension as _, Row};

pub use reread::ReceiptOperator;
pub use view::ReceiptViewer;

use super::{
    EmbeddedStore,
    tx::{TxError, int, uint},
    writer::Durability,
};

/// Receipts per transaction that takes them: what other writes may have to wait for (F53).
const TAKE_STEP: usize = 2_000;

/// Rejects per transaction: they bring their texts, some megabytes at most.
const REJECTS_STEP: usize = 256;

impl EmbeddedStore {
    /// Whether changes of states by receipts and expiry are kept from now on, for whoever asks for
    /// [`changes`](ReceiptLedger::changes). Off unless set: nobody would delete them.
    pub fn keep_changes(&self, keep: bool) {
        self.keeps_changes.store(keep, Ordering::Relaxed);
    }

    /// Whether changes are kept, and how durable what makes them must be. A change may be reported to a store
    /// elsewhere, which remembers its number: a power cut must not give that number to another change. Without
    /// changes nothing leaves this store that a power cut could undo.
    fn changing(&self) -> (bool, Durability) {
        if self.keeps_changes.load(Ordering::Relaxed) {
            (true, Durability::Synced)
        } else {
            (false, Durability::Process)
        }
    }
}

#[async_trait]
impl ReceiptLedger for EmbeddedStore {
    async fn record(&self, records: Vec<MessageRecord>) -> Result<(), StoreError> {
        if records.is_empty() {
            return Ok(());
        }
        let bytes = records.iter().map(record_bytes).sum();
        self.writer().write(Durability::Synced, bytes, move |tx| record::record(tx, &records)).await
    }

    async fn take(&self, arrival: Arrival) -> Result<Taken, StoreError> {
        let Arrival { receipts, rejects, cursor, .. } = &arrival;
        if receipts.is_empty() && rejects.is_empty() && cursor.is_none() {
            return Ok(Taken::default());
        }
        let parts = receipts.len().div_ceil(TAKE_STEP).max(rejects.len().div_ceil(REJECTS_STEP)).max(1);
        let arrival = Arc::new(arrival);
        let mut taken = Taken::default();
        for number in 0..parts {
            let part = take::ArrivalPart { arrival: arrival.clone(), number, is_last: number + 1 == parts };
            let bytes = part.bytes();
            taken += self.writer().write(Durability::Synced, bytes, move |tx| take::take(tx, &part)).await?;
        }
        Ok(taken)
    }

    async fn cursor(&self, source: &str) -> Result<Option<SourceCursor>, StoreError> {
        let source = source.to_owned();
        self.reader().read(move |connection, _| take::cursor(connection, &source)).await
    }

    async fn apply(&self, receipts: usize, bytes: usize, at: UnixMs) -> Result<Applied, StoreError> {
        let (keep_changes, durability) = self.changing();
        self.writer()
            .write(durability, 0, move |tx| apply::apply(tx, receipts, bytes, at, keep_changes))
            .await
    }

    async fn waiting(&self) -> Result<u64, StoreError> {
        self.reader().read(|connection, _| take::waiting(connection)).await
    }

    async fn parked(&self) -> Result<u64, StoreError> {
        self.reader().read(|connection, _| take::parked(connection)).await
    }

    /// Always 0: see the module's documentation.
    async fn rejoin(&self, _limit: usize) -> Result<usize, StoreError> {
        Ok(0)
    }

    async fn orphan(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.writer().write(Durability::Process, 0, move |tx| sweep::orphan(tx, before, limit)).await
    }

    async fn expire(
        &self,
        destination: &str,
        before: UnixMs,
        limit: usize,
        at: UnixMs,
    ) -> Result<usize, StoreError> {
        let (keep_changes, durability) = self.changing();
        let destination: Arc<str> = destination.into();
        self.writer()
            .write(durability, 0, move |tx| sweep::expire(tx, &destination, before, limit, at, keep_changes))
            .await
    }

    async fn changes(&self, after: Option<u64>, limit: usize) -> Result<Vec<StatusChange>, StoreError> {
        self.reader().read(move |connection, caches| sweep::changes(connection, caches, after, limit)).await
    }

    async fn forget_changes(&self, numbers: &[u64]) -> Result<(), StoreError> {
        let numbers = numbers.to_vec();
        self.writer().write(Durability::Process, 0, move |tx| sweep::forget_changes(tx, &numbers)).await
    }

    async fn retire(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.writer().write(Durability::Process, 0, move |tx| sweep::retire(tx, before, limit)).await
    }
}

/// How many bytes a row takes, roughly.
fn record_bytes(record: &MessageRecord) -> usize {
    let text = |text: &Option<Box<str>>| text.as_ref().map_or(0, |text| text.len());
    size_of::<MessageRecord>() + record.recipient.len() + text(&record.detail) + text(&record.provider_id)
}

/// The number of a file that has rows, if it has any.
fn file_number(connection: &Connection, id: &[u8; 16]) -> Result<Option<i64>, TxError> {
    Ok(connection
        .prepare_cached("SELECT seq FROM ledger_files WHERE id = ?1")?
        .query_row([id], |row| row.get(0))
        .optional()?)
}

fn state(byte: u8) -> Result<MessageState, TxError> {
    MessageState::from_byte(byte)
        .ok_or_else(|| TxError::Refused(format!("message state {byte} was written by a newer version")))
}

fn time(ms: Option<i64>) -> Option<UnixMs> {
    ms.map(|ms| UnixMs(uint(ms)))
}

fn ms(time: Option<UnixMs>) -> Option<i64> {
    time.map(|time| int(time.0))
}

/// The columns of a receipt that [`read_receipt`] reads, in its order.
const RECEIPT_COLUMNS: &str =
    "event, file, row, provider_id, state, at, provider_status, carrier, response, provider_sent_at, price";

/// Reads a receipt from [`RECEIPT_COLUMNS`], which begin at column `first`.
fn read_receipt(row: &Row<'_>, first: usize) -> Result<Receipt, TxError> {
    let key = match row.get::<_, Option<String>>(first + 3)? {
        Some(provider_id) => ReceiptKey::Provider(provider_id.into()),
        None => ReceiptKey::Message(MessageId {
            file: FileId(row.get(first + 1)?),
            row: uint(row.get(first + 2)?),
        }),
    };
    Ok(Receipt {
        event: EventId(row.get(first)?),
        key,
        state: state(row.get(first + 4)?)?,
        at: time(row.get(first + 5)?),
        facts: read_facts(row, first + 6)?,
    })
}

/// Reads status, carrier, response, the provider's time and price from column `first` on.
fn read_facts(row: &Row<'_>, first: usize) -> Result<ReceiptFacts, TxError> {
    Ok(ReceiptFacts {
        status: row.get(first)?,
        carrier: row.get(first + 1)?,
        response: row.get(first + 2)?,
        sent_at: time(row.get(first + 3)?),
        price: row.get::<_, Option<i64>>(first + 4)?.map(Price),
    })
}
