//! What sources bring: into the inbox, once.

use std::sync::Arc;

use postrider_actors::{
    model::receipt::{Price, Receipt, ReceiptKey, ReceiptReject},
    ports::{Arrival, SourceCursor, Taken},
};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::{TAKE_STEP, ms};
use crate::adapters::embedded::tx::{Tx, TxError, int, uint};

/// What of an arrival is taken in one transaction.
pub(super) struct Part {
    pub(super) arrival: Arc<Arrival>,
    /// Which part, from 0.
    pub(super) number: usize,
    /// Whether the cursor goes with it.
    pub(super) is_last: bool,
}

impl Part {
    pub(super) fn receipts(&self) -> &[Receipt] {
        self.arrival.receipts.chunks(TAKE_STEP).nth(self.number).unwrap_or_default()
    }

    fn rejects(&self) -> &[ReceiptReject] {
        self.arrival.rejects.chunks(TAKE_STEP).nth(self.number).unwrap_or_default()
    }
}

/// `ReceiptLedger::take` of a part.
pub(super) fn take(tx: &mut Tx<'_>, part: &Part) -> Result<Taken, TxError> {
    let Arrival { source, destination, cursor, at, .. } = &*part.arrival;
    let (connection, at) = (tx.connection, int(at.0));
    let destination = tx.destination(destination)?;
    let cursor = cursor.as_ref().filter(|_| part.is_last).map(|cursor| &cursor.0);
    let source: i64 = connection
        .prepare_cached(
            "INSERT INTO receipt_sources (name, destination, cursor, at) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (name) DO UPDATE SET destination = excluded.destination, at = excluded.at,
                 cursor = coalesce(excluded.cursor, cursor)
             RETURNING seq",
        )?
        .query_row(params![&**source, destination, cursor, at], |row| row.get(0))?;
    let mut remember = connection.prepare_cached(
        "INSERT INTO receipt_events (source, event, at) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING",
    )?;
    let mut insert = connection.prepare_cached(
        "INSERT INTO receipts (phase, since, source, event, destination, file, row, provider_id, state, at,
             provider_status, carrier, response, provider_sent_at, price)
         VALUES (0, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
    )?;
    let mut taken = Taken::default();
    for receipt in part.receipts() {
        if remember.execute(params![source, receipt.event.0, at])? == 0 {
            taken.known += 1;
            continue;
        }
        taken.new += 1;
        let (id, provider_id) = match &receipt.key {
            ReceiptKey::Message(id) => (Some(id), None),
            ReceiptKey::Provider(provider_id) => (None, Some(&**provider_id)),
        };
        insert.execute(params![
            at,
            source,
            receipt.event.0,
            destination,
            id.map(|id| id.file.0),
            id.map(|id| int(id.row)),
            provider_id,
            receipt.state as u8,
            ms(receipt.at),
            receipt.facts.status,
            receipt.facts.carrier,
            receipt.facts.response,
            ms(receipt.facts.sent_at),
            receipt.facts.price.map(|Price(price)| price),
        ])?;
    }
    let mut reject = connection.prepare_cached(
        "INSERT INTO receipt_rejects (source, event, place, reason, at) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT DO NOTHING",
    )?;
    for ReceiptReject { event, place, reason } in part.rejects() {
        taken.rejected += reject.execute(params![source, event.0, place, reason, at])? as u64;
    }
    Ok(taken)
}

/// `ReceiptLedger::cursor`.
pub(super) fn cursor(connection: &Connection, source: &str) -> Result<Option<SourceCursor>, TxError> {
    let cursor: Option<Option<String>> = connection
        .prepare_cached("SELECT cursor FROM receipt_sources WHERE name = ?1")?
        .query_row([source], |row| row.get(0))
        .optional()?;
    Ok(cursor.flatten().map(SourceCursor))
}

/// `ReceiptLedger::waiting`: a count over an index of nothing else.
pub(super) fn waiting(connection: &Connection) -> Result<u64, TxError> {
    let count = connection
        .prepare_cached("SELECT count(*) FROM receipts INDEXED BY receipts_waiting WHERE phase = 0")?
        .query_row([], |row| row.get(0))?;
    Ok(uint(count))
}
