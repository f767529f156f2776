//! What happens to receipts and rows as time passes, and the list of status changes.

use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        state::MessageState,
        time::UnixMs,
    },
    ports::StatusChange,
};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::{events::Events, state};
use crate::tx::{Caches, Tx, TxError, int, uint};

/// `ReceiptLedger::orphan`.
pub(super) fn orphan(tx: &Tx<'_>, before: UnixMs, limit: usize) -> Result<usize, TxError> {
    Ok(tx
        .connection
        .prepare_cached(
            "UPDATE receipts SET phase = 2 WHERE seq IN
                 (SELECT seq FROM receipts INDEXED BY receipts_parked_by_age WHERE phase = 1 AND since < ?1
                  ORDER BY since LIMIT ?2)",
        )?
        .execute([int(before.0), int(limit as u64)])?)
}

/// `ReceiptLedger::expire`.
pub(super) fn expire(
    tx: &mut Tx<'_>,
    destination: &str,
    before: UnixMs,
    limit: usize,
    at: UnixMs,
    keep_changes: bool,
) -> Result<usize, TxError> {
    let destination = tx.destination(destination)?;
    let due: Vec<(i64, i64)> = tx
        .connection
        // As it is: the index of some rows only is used where the query itself says which.
        .prepare_cached(&format!(
            "SELECT file, row FROM messages INDEXED BY messages_without_receipt
             WHERE destination = ?1 AND state = {} AND recorded_at < ?2 ORDER BY recorded_at LIMIT ?3",
            MessageState::Sent as u8
        ))?
        .query_map([destination, int(before.0), int(limit as u64)], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    let mut update = tx.connection.prepare_cached(
        "UPDATE messages SET state = ?5, updated_at = max(updated_at, ?4)
         WHERE file = ?1 AND row = ?2 AND destination = ?3",
    )?;
    for &(file, row) in &due {
        update.execute([file, row, destination, int(at.0), MessageState::Expired as i64])?;
        if keep_changes {
            let key = (file, row, destination);
            insert_change(tx, key, MessageState::Sent, MessageState::Expired, at)?;
        }
    }
    Ok(due.len())
}

/// Keeps the change of the row at `key` (file, row, destination).
pub(super) fn insert_change(
    tx: &Tx<'_>,
    (file, row, destination): (i64, i64, i64),
    before: MessageState,
    state: MessageState,
    at: UnixMs,
) -> Result<(), TxError> {
    tx.connection
        .prepare_cached(
            "INSERT INTO status_changes (file, row, destination, provider_id, before, state, at)
             SELECT f.id, m.row, m.destination, m.provider_id, ?4, ?5, ?6
             FROM messages m JOIN ledger_files f ON f.seq = m.file
             WHERE m.file = ?1 AND m.row = ?2 AND m.destination = ?3",
        )?
        .execute(params![file, row, destination, before as u8, state as u8, int(at.0)])?;
    Ok(())
}

/// `ReceiptLedger::changes`.
pub(super) fn changes(
    connection: &Connection,
    caches: &mut Caches,
    after: Option<u64>,
    limit: usize,
) -> Result<Vec<StatusChange>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT number, file, row, destination, provider_id, before, state, at FROM status_changes
         WHERE number > ?1 ORDER BY number LIMIT ?2",
    )?;
    // Numbers begin with 1.
    let mut rows = select.query([int(after.unwrap_or(0)), int(limit as u64)])?;
    let mut changes = Vec::new();
    while let Some(row) = rows.next()? {
        changes.push(StatusChange {
            number: uint(row.get(0)?),
            id: MessageId { file: FileId(row.get(1)?), row: uint(row.get(2)?) },
            destination: caches.destination_name(connection, row.get(3)?)?,
            provider_id: row.get(4)?,
            before: state(row.get(5)?)?,
            state: state(row.get(6)?)?,
            at: UnixMs(uint(row.get(7)?)),
        });
    }
    Ok(changes)
}

/// `ReceiptLedger::forget_changes`.
pub(super) fn forget_changes(tx: &Tx<'_>, numbers: &[u64]) -> Result<(), TxError> {
    let mut delete = tx.connection.prepare_cached("DELETE FROM status_changes WHERE number = ?1")?;
    for &number in numbers {
        delete.execute([int(number)])?;
    }
    Ok(())
}

/// `ReceiptLedger::retire`. A file's rows go together, once what was recorded last of them is old enough.
pub(super) fn retire(tx: &mut Tx<'_>, before: UnixMs, limit: usize) -> Result<usize, TxError> {
    let steps = [
        "DELETE FROM receipts WHERE seq IN
             (SELECT seq FROM receipts INDEXED BY receipts_given_up WHERE phase = 2 AND since < ?1
              ORDER BY since LIMIT ?2)",
        "DELETE FROM receipt_rejects WHERE rowid IN
             (SELECT rowid FROM receipt_rejects INDEXED BY receipt_rejects_by_age WHERE at < ?1
              ORDER BY at LIMIT ?2)",
    ];
    let mut left = limit.saturating_sub(Events::open(tx)?.forget_before(before, limit)?);
    for sql in steps {
        left -= tx.connection.prepare_cached(sql)?.execute([int(before.0), int(left as u64)])?;
    }
    while left > 0 {
        let file: Option<i64> = tx
            .connection
            .prepare_cached("SELECT seq FROM ledger_files WHERE last_at < ?1 ORDER BY last_at LIMIT 1")?
            .query_row([int(before.0)], |row| row.get(0))
            .optional()?;
        let Some(file) = file else { break };
        let removed = tx
            .connection
            .prepare_cached(
                "DELETE FROM messages WHERE file = ?1 AND (row, destination) IN
                     (SELECT row, destination FROM messages WHERE file = ?1 LIMIT ?2)",
            )?
            .execute([file, int(left as u64)])?;
        if removed < left {
            tx.connection.prepare_cached("DELETE FROM ledger_files WHERE seq = ?1")?.execute([file])?;
            // It counts, so that a caller who repeats this until nothing is left does stop.
            left -= 1;
        }
        left -= removed;
    }
    Ok(limit - left)
}
