//! What happened to one message.

use bytes::Bytes;
use postrider_actors::model::codec::{self, SentTimes};
use postrider_actors::model::{
    batch::Rows,
    ids::{BatchId, MessageId},
    outcome::{Attempt, DeathCause, Reason},
    state::MessageState,
    time::UnixMs,
};
use rusqlite::{Connection, OptionalExtension, params};

use crate::console::{DeadLetter, Delivery, Fate, MessageReport};

use super::tx::{Caches, TxError, int, uint};

/// One batch that holds a message.
struct Entry {
    header: i64,
    drive: u32,
    attempt: u32,
    accepted_at: UnixMs,
    not_before: UnixMs,
    history: Vec<Attempt>,
    state: MessageState,
    sent: Option<(u16, UnixMs)>,
    /// Its row; `None` once it was archived.
    row_bytes: Option<Vec<u8>>,
}

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
        let entries = entries(connection, file, destination, id.row)?;
        if let Some(delivery) = delivery(connection, caches, file, destination, id.row, &entries)? {
            reports.push(fate(Fate::Message(delivery)));
        }
    }
    if reports.is_empty() {
        reports.extend(not_accepted(connection, file, id.row)?.map(fate));
    }
    Ok(reports)
}

/// The batches that hold `row`, in the order in which they were stored: the last is the live entry.
fn entries(connection: &Connection, file: i64, destination: i64, row: u64) -> Result<Vec<Entry>, TxError> {
    let root: Option<(i64, Vec<u8>)> = connection
        .prepare_cached(
            "SELECT seq, id FROM batches WHERE file = ?1 AND destination = ?2 AND first_row <= ?3
             AND root IS NULL ORDER BY first_row DESC LIMIT 1",
        )?
        .query_row([file, destination, int(row)], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((root_seq, root_id)) = root else { return Ok(Vec::new()) };
    let mut select = connection
        .prepare_cached("SELECT seq FROM batches WHERE root = ?1 AND first_row <= ?2 ORDER BY seq")?;
    let later = select.query_map(params![root_id, int(row)], |row| row.get(0))?;
    let mut seqs: Vec<i64> = vec![root_seq];
    for seq in later {
        seqs.push(seq?);
    }
    let mut found = Vec::new();
    for seq in seqs {
        found.extend(entry(connection, seq, row)?);
    }
    Ok(found)
}

fn entry(connection: &Connection, seq: i64, row: u64) -> Result<Option<Entry>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT b.header, b.drive, b.attempt, b.accepted_at, b.not_before, p.body, p.history, r.states, r.sent,
             b.archived
         FROM batches b JOIN payloads p ON p.seq = b.payload LEFT JOIN results r ON r.batch = b.seq
         WHERE b.seq = ?1",
    )?;
    let mut found = select.query([seq])?;
    let stored = found.next()?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    let rows = Rows::decode(Bytes::from(stored.get::<_, Vec<u8>>(5)?))?;
    let Some(index) = rows.find(row) else { return Ok(None) };
    let accepted_at = UnixMs(uint(stored.get(3)?));
    let history = match stored.get::<_, Option<Vec<u8>>>(6)? {
        Some(history) => codec::decode_history(&history)?.get(index).cloned().unwrap_or_default(),
        None => Vec::new(),
    };
    let states: Option<Vec<u8>> = stored.get(7)?;
    let sent: Option<Vec<u8>> = stored.get(8)?;
    Ok(Some(Entry {
        header: stored.get(0)?,
        drive: stored.get(1)?,
        attempt: stored.get(2)?,
        accepted_at,
        not_before: UnixMs(uint(stored.get(4)?)),
        history,
        state: states
            .and_then(|states| states.get(index).copied().and_then(MessageState::from_byte))
            .unwrap_or(MessageState::Accepted),
        sent: sent.and_then(|sent| SentTimes(sent).get(index, accepted_at)),
        row_bytes: (!stored.get::<_, bool>(9)?).then(|| rows.bytes(index).to_vec()),
    }))
}

fn delivery(
    connection: &Connection,
    caches: &mut Caches,
    file: i64,
    destination: i64,
    row: u64,
    entries: &[Entry],
) -> Result<Option<Delivery>, TxError> {
    let Some(live) = entries.last() else { return Ok(None) };
    let header = caches.header(connection, live.header)?;
    let recipient = match &live.row_bytes {
        Some(bytes) => Some(header.layout.read(bytes)?.recipient.to_owned()),
        None => None,
    };
    let is_open = live.state == MessageState::Accepted;
    let carries_on = live.drive > 0 || live.attempt > 0;
    let mut failed = live.history.clone();
    let death: Option<(Attempt, DeathCause)> = connection
        .prepare_cached(
            "SELECT at, status, reason, cause FROM dead WHERE file = ?1 AND destination = ?2 AND row = ?3",
        )?
        .query_row([file, destination, int(row)], |row| {
            let (reason, cause): (u8, u8) = (row.get(2)?, row.get(3)?);
            let attempt = (UnixMs(uint(row.get(0)?)), row.get(1)?, Reason::from_byte(reason));
            Ok((attempt, DeathCause::from_byte(cause)))
        })
        .optional()?
        .and_then(|((at, status, reason), cause)| Some((Attempt { at, status, reason: reason? }, cause?)));
    failed.extend(death.map(|(attempt, _)| attempt));
    Ok(Some(Delivery {
        destination: header.destination.clone(),
        recipient,
        state: if is_open && carries_on { MessageState::Retrying } else { live.state },
        accepted_at: live.accepted_at,
        drive: live.drive,
        failed,
        // The first batch in which it was recorded has its true time.
        sent: entries.iter().find_map(|entry| entry.sent),
        cause: death.map(|(_, cause)| cause),
        not_before: is_open.then_some(live.not_before),
    }))
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
        if last.as_ref().is_none_or(|(batch, ..)| *batch != letter.batch) {
            let (header, body): (i64, Vec<u8>) = connection
                .prepare_cached(
                    "SELECT b.header, p.body FROM batches b JOIN payloads p ON p.seq = b.payload WHERE b.id = ?1",
                )?
                .query_row([letter.batch.0], |row| Ok((row.get(0)?, row.get(1)?)))?;
            last = Some((letter.batch, header, Rows::decode(Bytes::from(body))?));
        }
        let (_, header, rows) = last.as_ref().expect("it was read above");
        let index = rows.find(letter.row).ok_or_else(|| {
            TxError::Refused(format!("row {} of file {} is missing in its batch", letter.row, letter.file))
        })?;
        let header = caches.header(connection, *header)?;
        found.push(header.layout.read(rows.bytes(index))?.recipient.to_owned());
    }
    Ok(found)
}
