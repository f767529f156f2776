//! `Outbox::append`: rows and checkpoint in one step.

use std::collections::BTreeMap;

use bytes::Bytes;
use postrider_actors::model::codec;
use postrider_actors::{
    model::{
        file::{Checkpoint, FileState, Reject},
        ledger,
        time::UnixMs,
    },
    ports::{Append, Appended, HoldStep},
};
use rusqlite::{OptionalExtension, params};

use super::{
    entries, holds,
    tx::{Tx, TxError, file_state, file_state_byte, int, uint},
};

/// Bytes per stored chunk of rejected rows: what a reader holds at once.
const REJECT_CHUNK_BYTES: usize = 128 * 1024;

struct StoredFile {
    seq: i64,
    state: FileState,
    checkpoint: Checkpoint,
}

/// Stores one step of a file.
pub(crate) fn append(tx: &mut Tx<'_>, append: &Append) -> Result<Appended, TxError> {
    let found = find(tx, append)?;
    let (before, after) =
        (found.as_ref().map_or_else(Checkpoint::default, |file| file.checkpoint), append.checkpoint);
    let advances = (after.rows, after.offset) > (before.rows, before.offset);
    if advances {
        let known = entries::known(tx.connection, &append.entries)?;
        if !known.is_empty() {
            return Ok(Appended::Known(known));
        }
    }
    let stored = match found {
        Some(stored) => stored,
        None => insert_file(tx, append)?,
    };
    if advances {
        if stored.state == FileState::Ingested {
            return Err(TxError::Refused(format!(
                "file {} is ingested with {} rows; it can't continue to row {}",
                append.file.id, before.rows, after.rows
            )));
        }
        append.check_balance(&before).map_err(TxError::Refused)?;
        insert_batches(tx, append, stored.seq)?;
        insert_rejects(tx, stored.seq, &append.rejects)?;
        insert_duplicates(tx, stored.seq, &append.duplicates)?;
        entries::insert(tx, &append.entries, stored.seq, append.at)?;
        tx.connection
            .prepare_cached(
                "UPDATE files SET offset = ?2, rows = ?3, rejected = ?4, duplicates = ?5 WHERE seq = ?1",
            )?
            .execute([
                stored.seq,
                int(after.offset),
                int(after.rows),
                int(after.rejected),
                int(after.duplicates),
            ])?;
    }
    // An ingested file stays so: what comes late is a repetition.
    let changes_state = append.state != stored.state && stored.state != FileState::Ingested;
    if changes_state {
        let closed_at = append.state.is_closed().then_some(int(append.at.0));
        tx.connection
            .prepare_cached("UPDATE files SET state = ?2, reason = ?3, closed_at = ?4 WHERE seq = ?1")?
            .execute(params![stored.seq, file_state_byte(&append.state), append.state.reason(), closed_at])?;
    }
    if advances || changes_state {
        tx.touch(stored.seq, append.at);
        if let Some(HoldStep { destinations, change }) = &append.hold {
            for name in destinations {
                let destination = tx.destination(name)?;
                holds::change(tx, stored.seq, destination, change)?;
            }
        }
    }
    Ok(Appended::Stored)
}

fn find(tx: &Tx<'_>, append: &Append) -> Result<Option<StoredFile>, TxError> {
    let row = tx
        .connection
        .prepare_cached(
            "SELECT seq, state, reason, offset, rows, rejected, duplicates FROM files WHERE id = ?1",
        )?
        .query_row([append.file.id.0], |row| {
            let checkpoint = Checkpoint {
                offset: uint(row.get(3)?),
                rows: uint(row.get(4)?),
                rejected: uint(row.get(5)?),
                duplicates: uint(row.get(6)?),
            };
            Ok((row.get(0)?, row.get::<_, i64>(1)?, row.get::<_, Option<String>>(2)?, checkpoint))
        })
        .optional()?;
    let Some((seq, state, reason, checkpoint)) = row else { return Ok(None) };
    Ok(Some(StoredFile { seq, state: file_state(state, reason)?, checkpoint }))
}

fn insert_file(tx: &mut Tx<'_>, append: &Append) -> Result<StoredFile, TxError> {
    let file = &append.file;
    let terms = (!file.terms.is_default()).then(|| serde_json::to_string(&file.terms)).transpose()?;
    let seq = tx
        .connection
        .prepare_cached(
            "INSERT INTO files (id, feed, name, bytes, sha256, claimed_at, terms, expires_at, finish_by, priority, state,
                 offset, rows, rejected, duplicates)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, 0, 0, 0, 0, 0)",
        )?
        .insert(params![
            file.id.0,
            file.feed,
            file.name,
            int(file.bytes),
            file.sha256,
            int(file.claimed_at.0),
            terms,
            file.terms.expires_at.map(|at| int(at.0)),
            file.terms.finish_by.map(|at| int(at.0)),
            file.priority as u8,
        ])?;
    for (position, name) in file.destinations.iter().enumerate() {
        let destination = tx.destination(name)?;
        tx.connection
            .prepare_cached(
                "INSERT INTO file_destinations (file, destination, position) VALUES (?1, ?2, ?3)",
            )?
            .execute([seq, destination, int(position as u64)])?;
    }
    Ok(StoredFile { seq, state: FileState::Ingesting, checkpoint: Checkpoint::default() })
}

/// A payload that was stored, with the row numbers in it.
struct StoredPayload<'a> {
    seq: i64,
    body: &'a Bytes,
    gaps: Option<Vec<u8>>,
}

fn insert_batches(tx: &mut Tx<'_>, append: &Append, file: i64) -> Result<(), TxError> {
    // Batches of the same rows for several destinations share one payload.
    let mut payloads: BTreeMap<u64, StoredPayload<'_>> = BTreeMap::new();
    let shares = append.file.destinations.len() > 1;
    for batch in &append.batches {
        let destination = tx.destination(&batch.header.destination)?;
        let shared = payloads.remove(&batch.first_row).filter(|known| *known.body == batch.payload);
        let payload = match shared {
            Some(payload) => payload,
            None => StoredPayload {
                gaps: ledger::codec::encode_rows(&batch.row_numbers().map_err(TxError::Refused)?),
                seq: tx.insert_payload(&batch.payload)?,
                body: &batch.payload,
            },
        };
        tx.insert_batch(batch, file, destination, payload.seq, payload.gaps.as_deref())?;
        tx.count(file, destination).accepted += i64::from(batch.count);
        if shares {
            payloads.insert(batch.first_row, payload);
        }
    }
    Ok(())
}

fn insert_rejects(tx: &Tx<'_>, file: i64, rejects: &[Reject]) -> Result<(), TxError> {
    let mut rest = rejects;
    while let Some(first) = rest.first() {
        let size = |reject: &Reject| reject.raw.len() + reject.reason.len() + 16;
        let mut bytes = size(first);
        let mut len = 1;
        while let Some(next) = rest.get(len)
            && bytes + size(next) <= REJECT_CHUNK_BYTES
        {
            bytes += size(next);
            len += 1;
        }
        let (chunk, tail) = rest.split_at(len);
        tx.connection
            .prepare_cached("INSERT INTO rejects (file, last_row, body) VALUES (?1, ?2, ?3)")?
            .execute(params![file, int(chunk[len - 1].row), codec::encode_rejects(chunk)])?;
        rest = tail;
    }
    Ok(())
}

fn insert_duplicates(tx: &Tx<'_>, file: i64, rows: &[u64]) -> Result<(), TxError> {
    let Some(&last) = rows.last() else { return Ok(()) };
    tx.connection
        .prepare_cached("INSERT INTO duplicates (file, last_row, body) VALUES (?1, ?2, ?3)")?
        .execute(params![file, int(last), codec::encode_row_numbers(rows)])?;
    Ok(())
}

/// Records that final reports are written.
pub(crate) fn mark_reported(
    tx: &Tx<'_>,
    files: &[postrider_actors::model::ids::FileId],
) -> Result<(), TxError> {
    for file in files {
        // Not if a redrive has opened the file again: then its report is out of date already.
        tx.connection
            .prepare_cached("UPDATE files SET reported = 1 WHERE id = ?1 AND settled_at IS NOT NULL")?
            .execute([file.0])?;
    }
    Ok(())
}

/// Holds a destination's messages. The first reason is kept.
pub(crate) fn disable(tx: &mut Tx<'_>, name: &str, reason: &str, at: UnixMs) -> Result<bool, TxError> {
    let destination = tx.destination(name)?;
    let changed = tx
        .connection
        .prepare_cached(
            "UPDATE destinations SET disabled_at = ?2, disabled_reason = ?3
             WHERE seq = ?1 AND disabled_at IS NULL",
        )?
        .execute(params![destination, int(at.0), reason])?;
    Ok(changed == 1)
}
