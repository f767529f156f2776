//! What happened to one message.

use bytes::Bytes;
use postrider_actors::model::{
    batch::Rows,
    codec,
    ids::{BatchId, MessageId},
    ledger,
};
use rusqlite::{Connection, OptionalExtension};

use postrider_actors::ports::console::{DeadLetter, Delivery, Fate, MessageReport};

use super::{
    stored::Stored,
    tx::{Caches, TxError, int},
};

/// What became of `id` at each destination of its file.
pub(crate) fn report(
    connection: &Connection,
    caches: &mut Caches,
    id: MessageId,
) -> Result<Vec<MessageReport>, TxError> {
    let file: Option<(i64, String)> = connection
        .prepare_cached("SELECT seq, name FROM files WHERE id = ?1")?
        .query_row([id.file.0], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((file, file_name)) = file else { return Ok(Vec::new()) };
    let fate = |fate| MessageReport { id, file_name: file_name.clone(), fate };
    let mut reports = Vec::new();
    let mut select = connection
        .prepare_cached("SELECT destination FROM file_destinations WHERE file = ?1 ORDER BY position")?;
    let destinations: Vec<i64> = select.query_map([file], |row| row.get(0))?.collect::<Result<_, _>>()?;
    for destination in destinations {
        if let Some((stored, index)) = Stored::by_row(connection, file, destination, id.row)? {
            reports.push(fate(Fate::Message(delivery(connection, caches, &stored, index)?)));
        }
    }
    if reports.is_empty() {
        reports.extend(not_accepted(connection, file, id.row)?.map(fate));
    }
    Ok(reports)
}

/// The state of the message at `index` of a batch.
fn delivery(
    connection: &Connection,
    caches: &mut Caches,
    stored: &Stored,
    index: usize,
) -> Result<Delivery, TxError> {
    let header = caches.header(connection, stored.header)?;
    let recipient = match payload(connection, stored.payload)? {
        None => None,
        Some(rows) if index < rows.len() => Some(header.layout.read(rows.bytes(index))?.recipient.to_owned()),
        Some(_) => return Err(missing(stored.id, index)),
    };
    let fate = stored.record.fate(index).ok_or_else(|| missing(stored.id, index))?;
    let chunks = stored.history(connection)?;
    let failed = ledger::codec::failures_of(chunks.iter().map(Vec::as_slice), index as u32)?;
    Ok(Delivery::of(header.destination.clone(), recipient, fate, failed))
}

fn missing(batch: BatchId, index: usize) -> TxError {
    TxError::Refused(format!("message {index} of batch {batch} is missing in its payload"))
}

/// The rows of a payload; `None` once it was archived.
fn payload(connection: &Connection, payload: Option<i64>) -> Result<Option<Rows>, TxError> {
    let Some(payload) = payload else { return Ok(None) };
    let body: Vec<u8> = connection
        .prepare_cached("SELECT body FROM payloads WHERE seq = ?1")?
        .query_row([payload], |row| row.get(0))?;
    Ok(Some(Rows::decode(Bytes::from(body))?))
}

/// Whether a row was rejected or left out as a duplicate.
fn not_accepted(connection: &Connection, file: i64, row: u64) -> Result<Option<Fate>, TxError> {
    let chunk = |sql: &str| -> Result<Option<Vec<u8>>, TxError> {
        Ok(connection.prepare_cached(sql)?.query_row([file, int(row)], |row| row.get(0)).optional()?)
    };
    let rejects =
        chunk("SELECT body FROM rejects WHERE file = ?1 AND last_row >= ?2 ORDER BY last_row LIMIT 1")?;
    if let Some(body) = rejects
        && let Some(reject) = codec::decode_rejects(&body)?.into_iter().find(|reject| reject.row == row)
    {
        return Ok(Some(Fate::Rejected { line: reject.line, reason: reject.reason }));
    }
    let duplicates =
        chunk("SELECT body FROM duplicates WHERE file = ?1 AND last_row >= ?2 ORDER BY last_row LIMIT 1")?;
    if let Some(body) = duplicates
        && codec::decode_row_numbers(&body)?.binary_search(&row).is_ok()
    {
        return Ok(Some(Fate::Duplicate));
    }
    Ok(None)
}

/// The recipients of dead letters, in their order. Neighbours mostly share a batch, which is read once.
pub(crate) fn recipients(
    connection: &Connection,
    caches: &mut Caches,
    letters: &[DeadLetter],
) -> Result<Vec<String>, TxError> {
    let mut last: Option<(BatchId, i64, Rows)> = None;
    let mut found = Vec::with_capacity(letters.len());
    for letter in letters {
        let missing = || {
            TxError::Refused(format!("row {} of file {} is missing in its batch", letter.row, letter.file))
        };
        if last.as_ref().is_none_or(|(batch, ..)| *batch != letter.batch) {
            let (header, number): (i64, Option<i64>) = connection
                .prepare_cached("SELECT header, payload FROM batches WHERE id = ?1")?
                .query_row([letter.batch.0], |row| Ok((row.get(0)?, row.get(1)?)))?;
            let rows = payload(connection, number)?.ok_or_else(missing)?;
            last = Some((letter.batch, header, rows));
        }
        let (_, header, rows) = last.as_ref().expect("it was read above");
        let index = rows.find(letter.row).ok_or_else(missing)?;
        let header = caches.header(connection, *header)?;
        found.push(header.layout.read(rows.bytes(index))?.recipient.to_owned());
    }
    Ok(found)
}
