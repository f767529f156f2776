//! Taking what sources bring into the inbox, or among the rejects, once.

use std::sync::Arc;

use postrider_actors::{
    model::{
        codec,
        receipt::{Receipt, ReceiptReject, RejectedText},
        time::UnixMs,
    },
    ports::{Arrival, SourceCursor, Taken},
};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::{
    REJECTS_STEP, TAKE_STEP,
    events::{Events, Memory},
    ms,
};
use crate::tx::{Tx, TxError, int, uint};

/// What of an arrival is taken in one transaction.
pub(super) struct ArrivalPart {
    pub(super) arrival: Arc<Arrival>,
    /// Which part, from 0.
    pub(super) number: usize,
    /// Whether the cursor goes with it.
    pub(super) is_last: bool,
}

impl ArrivalPart {
    fn receipts(&self) -> &[Receipt] {
        self.arrival.receipts.chunks(TAKE_STEP).nth(self.number).unwrap_or_default()
    }

    fn rejects(&self) -> &[ReceiptReject] {
        self.arrival.rejects.chunks(REJECTS_STEP).nth(self.number).unwrap_or_default()
    }

    /// How many bytes it brings, roughly.
    pub(super) fn bytes(&self) -> usize {
        let receipts: usize = self.receipts().iter().map(Receipt::held_bytes).sum();
        let rejects: usize = self.rejects().iter().map(|reject| reject.text.text.len()).sum();
        receipts + rejects
    }
}

/// `ReceiptLedger::take` of a part.
pub(super) fn take(tx: &mut Tx<'_>, part: &ArrivalPart) -> Result<Taken, TxError> {
    let Arrival { source, destination, cursor, at, .. } = &*part.arrival;
    tx.widen_cache()?;
    let destination = tx.destination(destination)?;
    let has_receipts = !part.arrival.receipts.is_empty() || !part.arrival.rejects.is_empty();
    let cursor = cursor.as_ref().filter(|_| part.is_last).map(|cursor| &*cursor.0);
    let source =
        note_source(tx, source, destination, has_receipts.then_some(*at), cursor.map(|to| (to, *at)))?;
    let mut taken = put(tx, source, destination, part.receipts(), *at)?;
    let mut reject = tx.connection.prepare_cached(
        "INSERT INTO receipt_rejects (source, event, place, reason, at, happened_at, text, is_whole)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT DO NOTHING",
    )?;
    let events = Events::open(tx)?;
    for ReceiptReject { event, at: happened_at, place, reason, text } in part.rejects() {
        // It was taken before, when it could be read.
        if events.is_known(source, *event)? {
            continue;
        }
        let RejectedText { text, is_whole } = text;
        let values = params![source, event.0, place, reason, int(at.0), ms(*happened_at), text, is_whole];
        taken.rejected += reject.execute(values)? as u64;
    }
    Ok(taken)
}

/// The number of a source, with what is new of it.
pub(super) fn note_source(
    tx: &Tx<'_>,
    name: &str,
    destination: i64,
    receipts_at: Option<UnixMs>,
    cursor: Option<(&str, UnixMs)>,
) -> Result<i64, TxError> {
    let (cursor, cursor_at) = cursor.unzip();
    Ok(tx
        .connection
        .prepare_cached(
            "INSERT INTO receipt_sources (name, destination, receipts_at, cursor, cursor_at)
             VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (name) DO UPDATE SET destination = excluded.destination,
                 receipts_at = coalesce(excluded.receipts_at, receipts_at),
                 cursor = coalesce(excluded.cursor, cursor), cursor_at = coalesce(excluded.cursor_at, cursor_at)
             RETURNING seq",
        )?
        .query_row(params![name, destination, ms(receipts_at), cursor, ms(cursor_at)], |row| row.get(0))?)
}

/// Receipts of a row of the inbox: two make a batch to apply.
const CHUNK: usize = 500;

/// Puts those receipts into the inbox whose event is not known.
pub(super) fn put<'a>(
    tx: &mut Tx<'_>,
    source: i64,
    destination: i64,
    receipts: impl IntoIterator<Item = &'a Receipt>,
    at: UnixMs,
) -> Result<Taken, TxError> {
    let receipts: Vec<_> = receipts.into_iter().collect();
    let events: Vec<_> = receipts.iter().map(|receipt| receipt.event).collect();
    let memories = Events::open(tx)?.remember(source, at, &events)?;
    let mut taken = Taken::default();
    let mut new = Vec::with_capacity(receipts.len());
    for (receipt, memory) in receipts.into_iter().zip(memories) {
        if memory == Memory::Known {
            taken.known += 1;
        } else {
            taken.new += 1;
            taken.reused_ids += u64::from(memory == Memory::NewOfKnownId);
            new.push(receipt);
        }
    }
    put_new(tx, source, destination, &new)?;
    Ok(taken)
}

/// Puts receipts into the inbox whose events were known to nobody else.
pub(super) fn put_new(
    tx: &Tx<'_>,
    source: i64,
    destination: i64,
    receipts: &[&Receipt],
) -> Result<(), TxError> {
    let mut insert = tx.connection.prepare_cached(
        "INSERT INTO receipt_inbox (source, destination, receipts, body) VALUES (?1, ?2, ?3, ?4)",
    )?;
    for chunk in receipts.chunks(CHUNK) {
        insert.execute(params![
            source,
            destination,
            int(chunk.len() as u64),
            codec::encode_receipts(chunk)
        ])?;
    }
    Ok(())
}

/// `ReceiptLedger::cursor`.
pub(super) fn cursor(connection: &Connection, source: &str) -> Result<Option<SourceCursor>, TxError> {
    let cursor: Option<Option<String>> = connection
        .prepare_cached("SELECT cursor FROM receipt_sources WHERE name = ?1")?
        .query_row([source], |row| row.get(0))
        .optional()?;
    Ok(cursor.flatten().map(SourceCursor))
}

/// `ReceiptLedger::waiting`.
pub(super) fn waiting(connection: &Connection) -> Result<u64, TxError> {
    let count = connection
        .prepare_cached("SELECT coalesce(sum(receipts), 0) FROM receipt_inbox")?
        .query_row([], |row| row.get(0))?;
    Ok(uint(count))
}

/// `ReceiptLedger::parked`: a count over an index of nothing else.
pub(super) fn parked(connection: &Connection) -> Result<u64, TxError> {
    let count = connection
        .prepare_cached("SELECT count(*) FROM receipts INDEXED BY receipts_parked_by_age WHERE phase = 1")?
        .query_row([], |row| row.get(0))?;
    Ok(uint(count))
}
