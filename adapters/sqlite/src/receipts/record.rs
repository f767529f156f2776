//! Delivery's records: a row per message and destination.

use std::collections::{BTreeMap, HashMap};

use postrider_actors::model::{
    ids::FileId,
    receipt::Receipt,
    record::{MessageRecord, record_rank},
    state::MessageState,
    time::UnixMs,
};
use rusqlite::{CachedStatement, Rows, params};

use super::{RECEIPT_COLUMNS, file_number, read_receipt, state, take::put_new};
use crate::tx::{Tx, TxError, int, uint};

/// `ReceiptLedger::record`.
pub(super) fn record(tx: &mut Tx<'_>, records: &[MessageRecord]) -> Result<(), TxError> {
    tx.widen_cache()?;
    let connection = tx.connection;
    let mut files = FileNumbers::default();
    // With nothing parked, and that is most of the time, two probes per message are saved.
    let is_any_parked = connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM receipts)")?
        .query_row([], |row| row.get(0))?;
    let mut insert = connection.prepare_cached(
        "INSERT INTO messages (file, row, destination, state, recorded, attempts, status, reason, detail,
             recipient, provider_id, accepted_at, recorded_at, updated_at)
         VALUES (?1, ?2, ?3, ?4, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?12) ON CONFLICT DO NOTHING",
    )?;
    let mut unpark = Unpark::prepare(tx)?;
    let mut unparked = Unparked::new();
    for record in records {
        let file = files.number(tx, record)?;
        let destination = tx.destination(&record.destination)?;
        let is_new = insert.execute(params![
            file,
            int(record.id.row),
            destination,
            record.state as u8,
            record.attempts,
            record.status,
            record.reason.map(|reason| reason as u8),
            record.detail,
            record.recipient,
            record.provider_id,
            int(record.accepted_at.0),
            int(record.at.0),
        ])? == 1;
        let is_named =
            if is_new { record.provider_id.is_some() } else { merge(tx, file, destination, record)? };
        if is_any_parked && is_new {
            let rows = unpark.by_message.query(params![record.id.file.0, int(record.id.row), destination])?;
            read_unparked(rows, destination, &mut unparked)?;
        }
        if is_any_parked && is_named {
            let rows = unpark.by_provider_id.query(params![destination, record.provider_id])?;
            read_unparked(rows, destination, &mut unparked)?;
        }
    }
    for ((source, destination), receipts) in unparked {
        put_new(tx, source, destination, &receipts.iter().collect::<Vec<_>>())?;
    }
    files.store(tx)
}

/// Merges a record into its message's row, which is there. Whether its provider's id is the row's from now on,
/// and was not before.
fn merge(tx: &Tx<'_>, file: i64, destination: i64, record: &MessageRecord) -> Result<bool, TxError> {
    let mut select = tx.connection.prepare_cached(
        "SELECT state, recorded, accepted_at, attempts, recorded_at, provider_id FROM messages
         WHERE file = ?1 AND row = ?2 AND destination = ?3",
    )?;
    let row = int(record.id.row);
    let mut rows = select.query([file, row, destination])?;
    let found = rows.next()?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    let known_state: MessageState = state(found.get(0)?)?;
    let known_rank = (
        state(found.get(1)?)?,
        UnixMs(uint(found.get(2)?)),
        found.get::<_, u32>(3)?,
        UnixMs(uint(found.get(4)?)),
    );
    let known_id: Option<Box<str>> = found.get(5)?;
    // The least of all, so that it does not matter which came first.
    let is_named = match (&known_id, &record.provider_id) {
        (Some(known), Some(new)) => new < known,
        (None, Some(_)) => true,
        (_, None) => false,
    };
    if record_rank(record) > known_rank {
        tx.connection
            .prepare_cached(
                "UPDATE messages SET state = ?4, recorded = ?5, attempts = ?6, status = ?7, reason = ?8,
                     detail = ?9, provider_id = ?10, accepted_at = ?11, recorded_at = ?12,
                     updated_at = max(updated_at, ?12)
                 WHERE file = ?1 AND row = ?2 AND destination = ?3",
            )?
            .execute(params![
                file,
                row,
                destination,
                known_state.merge(record.state) as u8,
                record.state as u8,
                record.attempts,
                record.status,
                record.reason.map(|reason| reason as u8),
                record.detail,
                if is_named { &record.provider_id } else { &known_id },
                int(record.accepted_at.0),
                int(record.at.0),
            ])?;
    } else if is_named {
        tx.connection
            .prepare_cached(
                "UPDATE messages SET provider_id = ?4, updated_at = max(updated_at, ?5)
                 WHERE file = ?1 AND row = ?2 AND destination = ?3",
            )?
            .execute(params![file, row, destination, record.provider_id, int(record.at.0)])?;
    }
    Ok(is_named)
}

/// What goes back into the inbox, by source and destination.
type Unparked = BTreeMap<(i64, i64), Vec<Receipt>>;

fn read_unparked(mut rows: Rows<'_>, destination: i64, to: &mut Unparked) -> Result<(), TxError> {
    while let Some(row) = rows.next()? {
        to.entry((row.get(0)?, destination)).or_default().push(read_receipt(row, 1)?);
    }
    Ok(())
}

/// Takes out what is parked for a message, and its orphans.
struct Unpark<'a> {
    by_message: CachedStatement<'a>,
    by_provider_id: CachedStatement<'a>,
}

impl<'a> Unpark<'a> {
    fn prepare(tx: &Tx<'a>) -> Result<Self, TxError> {
        let take_out = |which: &str| {
            let sql = format!("DELETE FROM receipts WHERE {which} RETURNING source, {RECEIPT_COLUMNS}");
            tx.connection.prepare_cached(&sql)
        };
        Ok(Self {
            by_message: take_out("file = ?1 AND row = ?2 AND destination = ?3")?,
            by_provider_id: take_out("destination = ?1 AND provider_id = ?2")?,
        })
    }
}

/// The files of a call's records: their numbers, and when the last of each was recorded. Not kept from one
/// transaction to the next, for retention takes files away.
#[derive(Default)]
struct FileNumbers(HashMap<FileId, (i64, UnixMs)>);

impl FileNumbers {
    fn number(&mut self, tx: &Tx<'_>, record: &MessageRecord) -> Result<i64, TxError> {
        let file = record.id.file;
        if let Some((seq, last_at)) = self.0.get_mut(&file) {
            *last_at = (*last_at).max(record.at);
            return Ok(*seq);
        }
        let seq = match file_number(tx.connection, &file.0)? {
            Some(seq) => seq,
            None => tx
                .connection
                .prepare_cached("INSERT INTO ledger_files (id, feed, last_at) VALUES (?1, ?2, ?3)")?
                .insert(params![file.0, &*record.feed, int(record.at.0)])?,
        };
        self.0.insert(file, (seq, record.at));
        Ok(seq)
    }

    fn store(self, tx: &Tx<'_>) -> Result<(), TxError> {
        let mut update = tx
            .connection
            .prepare_cached("UPDATE ledger_files SET last_at = ?2 WHERE seq = ?1 AND last_at < ?2")?;
        for (seq, last_at) in self.0.into_values() {
            update.execute([seq, int(last_at.0)])?;
        }
        Ok(())
    }
}
