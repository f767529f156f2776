//! What an operator's commands read of the ledger of rows.

use std::{path::Path, sync::Arc, thread, time::Duration};

use async_trait::async_trait;
use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        outcome::Reason,
        receipt::{EventId, RejectedText, ReportedStates},
        state::MessageState,
        time::UnixMs,
    },
    ports::{SourceCursor, StoreError},
};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::{RECEIPT_COLUMNS, file_number, read_facts, read_receipt, state, time};
use crate::{
    DATABASE, OpenError,
    open::{self, Access},
    reader::Reader,
    tx::{Caches, TxError, int, uint},
};
use postrider_actors::ports::console::receipts::{
    AppliedReceipt, GAP_AGES, Gap, GapPlace, HeldReceipt, MessageRow, ReceiptFilter, ReceiptView,
    RejectedReceipt, SourceRow, StateCount,
};

/// An operator's view of the ledger of rows, on a read-only connection and a thread of its own.
pub struct ReceiptViewer {
    reader: Option<Reader>,
    reading: Option<thread::JoinHandle<()>>,
}

impl ReceiptViewer {
    /// Opens the store in `state_dir`, which must be there already; changes nothing. Blocks.
    pub fn open(state_dir: &Path) -> Result<Self, OpenError> {
        let connection = open::open(state_dir, Access::Read)?;
        let (reader, reading) = Reader::start(connection).map_err(|error| OpenError::Unavailable {
            path: state_dir.join(DATABASE),
            detail: format!("a thread for it could not be started: {error}"),
        })?;
        Ok(Self { reader: Some(reader), reading: Some(reading) })
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection, &mut Caches) -> Result<T, TxError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.reader.as_ref().expect("it is taken only by drop").read(read).await
    }
}

impl Drop for ReceiptViewer {
    fn drop(&mut self) {
        drop(self.reader.take());
        // A panic of its was logged by the hook when it happened.
        let _ = self.reading.take().map(thread::JoinHandle::join);
    }
}

#[async_trait]
impl ReceiptView for ReceiptViewer {
    async fn message(&self, id: MessageId) -> Result<Vec<MessageRow>, StoreError> {
        self.read(move |connection, _| message(connection, id)).await
    }

    async fn counts(&self, file: Option<FileId>) -> Result<Vec<StateCount>, StoreError> {
        self.read(move |connection, caches| counts(connection, caches, file)).await
    }

    async fn gaps(
        &self,
        destination: &str,
        before: UnixMs,
        after: Option<&GapPlace>,
        limit: usize,
    ) -> Result<Vec<Gap>, StoreError> {
        let (destination, after) = (destination.to_owned(), after.copied());
        self.read(move |connection, _| gaps(connection, &destination, before, after, limit)).await
    }

    async fn gap_ages(&self, destination: &str, now: UnixMs) -> Result<[u64; GAP_AGES.len()], StoreError> {
        let destination = destination.to_owned();
        self.read(move |connection, _| gap_ages(connection, &destination, now)).await
    }

    async fn parked(&self, which: &ReceiptFilter, limit: usize) -> Result<Vec<HeldReceipt>, StoreError> {
        let which = which.clone();
        self.read(move |connection, caches| held(connection, caches, &which, PARKED, limit)).await
    }

    async fn orphans(&self, which: &ReceiptFilter, limit: usize) -> Result<Vec<HeldReceipt>, StoreError> {
        let which = which.clone();
        self.read(move |connection, caches| held(connection, caches, &which, ORPHANS, limit)).await
    }

    async fn rejects(&self, which: &ReceiptFilter, limit: usize) -> Result<Vec<RejectedReceipt>, StoreError> {
        let which = which.clone();
        self.read(move |connection, _| rejects(connection, &which, limit)).await
    }

    async fn sources(&self) -> Result<Vec<SourceRow>, StoreError> {
        self.read(sources).await
    }
}

fn message(connection: &Connection, id: MessageId) -> Result<Vec<MessageRow>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT n.name, f.feed, m.recipient, m.state, m.recorded, m.attempts, m.status, m.reason, m.detail,
             m.provider_id, m.accepted_at, m.recorded_at, m.updated_at, m.reported, m.receipt_state, m.receipt_event,
             m.receipt_at, m.provider_status, m.carrier, m.response, m.provider_sent_at, m.price
         FROM messages m JOIN ledger_files f ON f.seq = m.file JOIN destinations n ON n.seq = m.destination
         WHERE f.id = ?1 AND m.row = ?2 ORDER BY n.name",
    )?;
    let mut rows = select.query(params![id.file.0, int(id.row)])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let reason = row.get::<_, Option<u8>>(7)?.map(|byte| {
            Reason::from_byte(byte)
                .ok_or_else(|| TxError::Refused(format!("reason {byte} was written by a newer version")))
        });
        let receipt = match row.get::<_, Option<u8>>(14)? {
            Some(byte) => Some(AppliedReceipt {
                state: state(byte)?,
                event: EventId(row.get(15)?),
                at: time(row.get(16)?),
                facts: read_facts(row, 17)?,
            }),
            None => None,
        };
        found.push(MessageRow {
            id,
            destination: row.get(0)?,
            feed: row.get(1)?,
            recipient: row.get(2)?,
            state: state(row.get(3)?)?,
            recorded: state(row.get(4)?)?,
            attempts: row.get(5)?,
            status: row.get(6)?,
            reason: reason.transpose()?,
            detail: row.get(8)?,
            provider_id: row.get(9)?,
            accepted_at: UnixMs(uint(row.get(10)?)),
            recorded_at: UnixMs(uint(row.get(11)?)),
            updated_at: UnixMs(uint(row.get(12)?)),
            reported: ReportedStates(row.get(13)?),
            receipt,
        });
    }
    Ok(found)
}

fn counts(
    connection: &Connection,
    caches: &mut Caches,
    file: Option<FileId>,
) -> Result<Vec<StateCount>, TxError> {
    let (sql, values) = match file {
        None => ("SELECT destination, state, count(*) FROM messages GROUP BY 1, 2", Vec::new()),
        Some(id) => {
            let Some(file) = file_number(connection, &id.0)? else { return Ok(Vec::new()) };
            ("SELECT destination, state, count(*) FROM messages WHERE file = ?1 GROUP BY 1, 2", vec![file])
        }
    };
    let mut select = connection.prepare_cached(sql)?;
    let mut rows = select.query(rusqlite::params_from_iter(values))?;
    let mut counts = Vec::new();
    while let Some(row) = rows.next()? {
        counts.push(StateCount {
            destination: caches.destination_name(connection, row.get(0)?)?,
            state: state(row.get(1)?)?,
            messages: uint(row.get(2)?),
        });
    }
    counts.sort_unstable();
    Ok(counts)
}

fn destination_number(connection: &Connection, name: &str) -> Result<Option<i64>, TxError> {
    Ok(connection
        .prepare_cached("SELECT seq FROM destinations WHERE name = ?1")?
        .query_row([name], |row| row.get(0))
        .optional()?)
}

/// The states of messages without a final receipt. They stand in queries as they are, for an index of some rows only is
/// used where the query itself says which.
const WITHOUT_RECEIPT: [u8; 2] =
    [MessageState::WITHOUT_RECEIPT[0] as u8, MessageState::WITHOUT_RECEIPT[1] as u8];

fn gaps(
    connection: &Connection,
    destination: &str,
    before: UnixMs,
    after: Option<GapPlace>,
    limit: usize,
) -> Result<Vec<Gap>, TxError> {
    let Some(destination) = destination_number(connection, destination)? else { return Ok(Vec::new()) };
    // The place before all others: no row is numbered -1.
    let (from, id, row) =
        after.map_or((0, [0; 16], -1), |place| (int(place.sent_at.0), place.id.file.0, int(place.id.row)));
    let mut gaps = Vec::new();
    for state_byte in WITHOUT_RECEIPT {
        // Times before that of `after` are skipped by the index; the rest of the place decides within one.
        let mut select = connection.prepare_cached(&format!(
            "SELECT f.id, m.row, m.state, m.provider_id, m.recorded_at
             FROM messages m INDEXED BY messages_without_receipt JOIN ledger_files f ON f.seq = m.file
             WHERE m.destination = ?1 AND m.state = {state_byte} AND m.recorded_at >= ?2 AND m.recorded_at < ?3
                 AND (m.recorded_at, f.id, m.row) > (?2, ?4, ?5)
             ORDER BY m.recorded_at, f.id, m.row LIMIT ?6"
        ))?;
        let values = params![destination, from, int(before.0), id, row, int(limit as u64)];
        let mut rows = select.query(values)?;
        while let Some(row) = rows.next()? {
            gaps.push(Gap {
                id: MessageId { file: FileId(row.get(0)?), row: uint(row.get(1)?) },
                state: state(row.get(2)?)?,
                provider_id: row.get(3)?,
                sent_at: UnixMs(uint(row.get(4)?)),
            });
        }
    }
    gaps.sort_unstable_by_key(Gap::place);
    gaps.truncate(limit);
    Ok(gaps)
}

fn gap_ages(
    connection: &Connection,
    destination: &str,
    now: UnixMs,
) -> Result<[u64; GAP_AGES.len()], TxError> {
    let mut ages = [0; GAP_AGES.len()];
    let Some(destination) = destination_number(connection, destination)? else { return Ok(ages) };
    for state_byte in WITHOUT_RECEIPT {
        let mut count = connection.prepare_cached(&format!(
            "SELECT count(*) FROM messages INDEXED BY messages_without_receipt
             WHERE destination = ?1 AND state = {state_byte} AND recorded_at > ?2 AND recorded_at <= ?3"
        ))?;
        for (class, lower) in GAP_AGES.iter().enumerate() {
            let at_least = |age: &Duration| int(now.0.saturating_sub(age.as_millis() as u64));
            // What is dated later than now has no age yet.
            let latest = if class == 0 { i64::MAX } else { at_least(lower) };
            let earliest = GAP_AGES.get(class + 1).map_or(-1, at_least);
            let some: i64 = count.query_row([destination, earliest, latest], |row| row.get(0))?;
            ages[class] += uint(some);
        }
    }
    Ok(ages)
}

/// Phase and order of receipts that are held. The phase is a literal in the query, or their indexes are not used.
type HeldPhase = (&'static str, &'static str);
const PARKED: HeldPhase = ("r.phase = 1", "r.since, r.seq");
const ORPHANS: HeldPhase = ("r.phase = 2", "r.since DESC, r.seq DESC");

fn held(
    connection: &Connection,
    caches: &mut Caches,
    which: &ReceiptFilter,
    (phase, order): HeldPhase,
    limit: usize,
) -> Result<Vec<HeldReceipt>, TxError> {
    let columns = RECEIPT_COLUMNS.replace(", ", ", r.");
    let mut select = connection.prepare_cached(&format!(
        "SELECT r.since, r.destination, s.name, r.{columns}
         FROM receipts r JOIN receipt_sources s ON s.seq = r.source
         WHERE {phase} AND (?1 IS NULL OR s.name = ?1)
             AND (?2 IS NULL OR r.destination = (SELECT seq FROM destinations WHERE name = ?2))
         ORDER BY {order} LIMIT ?3"
    ))?;
    let mut rows = select.query(params![which.source, which.destination, int(limit as u64)])?;
    let mut held = Vec::new();
    while let Some(row) = rows.next()? {
        let receipt = read_receipt(row, 3)?;
        held.push(HeldReceipt {
            destination: caches.destination_name(connection, row.get(1)?)?,
            source: row.get(2)?,
            event: receipt.event,
            key: receipt.key,
            state: receipt.state,
            since: UnixMs(uint(row.get(0)?)),
        });
    }
    Ok(held)
}

fn rejects(
    connection: &Connection,
    which: &ReceiptFilter,
    limit: usize,
) -> Result<Vec<RejectedReceipt>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT s.name, j.place, j.reason, j.at, j.text, j.is_whole
         FROM receipt_rejects j JOIN receipt_sources s ON s.seq = j.source
         WHERE (?1 IS NULL OR s.name = ?1)
             AND (?2 IS NULL OR s.destination = (SELECT seq FROM destinations WHERE name = ?2))
         ORDER BY j.at DESC, j.source, j.event LIMIT ?3",
    )?;
    let mut rows = select.query(params![which.source, which.destination, int(limit as u64)])?;
    let mut rejects = Vec::new();
    while let Some(row) = rows.next()? {
        rejects.push(RejectedReceipt {
            source: row.get(0)?,
            place: row.get(1)?,
            reason: row.get(2)?,
            at: UnixMs(uint(row.get(3)?)),
            text: RejectedText { text: row.get(4)?, is_whole: row.get(5)? },
        });
    }
    Ok(rejects)
}

fn sources(connection: &Connection, caches: &mut Caches) -> Result<Vec<SourceRow>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT s.name, s.destination, s.cursor, s.receipts_at, s.cursor_at,
             (SELECT coalesce(sum(i.receipts), 0) FROM receipt_inbox i WHERE i.source = s.seq),
             (SELECT count(*) FROM receipts r WHERE r.source = s.seq AND r.phase = 1)
         FROM receipt_sources s ORDER BY s.name",
    )?;
    let mut rows = select.query([])?;
    let mut sources = Vec::new();
    while let Some(row) = rows.next()? {
        sources.push(SourceRow {
            name: Arc::from(row.get::<_, String>(0)?),
            destination: caches.destination_name(connection, row.get(1)?)?,
            cursor: row.get::<_, Option<String>>(2)?.map(SourceCursor),
            receipts_at: time(row.get(3)?),
            cursor_at: time(row.get(4)?),
            waiting: uint(row.get(5)?),
            parked: uint(row.get(6)?),
        });
    }
    Ok(sources)
}
