//! Archiving settled batches.
//!
//! An archived batch keeps its row and its record, for I1 and `postrider messages`; its payload is removed.

use super::{
    stored::{Stored, select_stored},
    tx::{Tx, TxError, int},
};
use postrider_actors::model::time::UnixMs;

/// Batches that one step of archiving looks at: what the writer is kept from its other work for.
const LOOK_BATCHES_MAX: usize = 1_024;

/// The position of a walk in the order of payloads, and of the batches that share one. Numbers are never given twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeptPlace {
    pub(crate) payload: i64,
    pub(crate) batch: i64,
}

/// One step of `Archive::archive`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArchiveStep {
    /// How many it archived.
    pub(crate) archived: usize,
    /// How far it looked; the beginning if the next step starts over.
    pub(crate) looked_until: KeptPlace,
}

/// Archives up to `limit` batches beyond `after` that were accepted before `before`.
pub(crate) fn archive(
    tx: &Tx<'_>,
    after: KeptPlace,
    before: UnixMs,
    limit: usize,
) -> Result<ArchiveStep, TxError> {
    const SQL: &str = select_stored!(
        "INDEXED BY batches_kept LEFT JOIN results r ON r.batch = b.seq
         WHERE b.payload IS NOT NULL AND (b.payload, b.seq) > (?1, ?2) ORDER BY b.payload, b.seq LIMIT ?3"
    );
    let mut step = ArchiveStep { archived: 0, looked_until: after };
    let mut select = tx.connection.prepare_cached(SQL)?;
    let mut rows = select.query([after.payload, after.batch, int(LOOK_BATCHES_MAX as u64)])?;
    let mut looked_at = 0;
    // Rows are changed when they are not walked over any more.
    let mut done = Vec::new();
    while done.len() < limit {
        let Some(row) = rows.next()? else {
            if looked_at < LOOK_BATCHES_MAX {
                step.looked_until = KeptPlace::default();
            }
            break;
        };
        let stored = match Stored::read(row) {
            // It is not settled, as far as anybody can know.
            Err(why) if why.is_damage() => {
                step.looked_until = KeptPlace { payload: row.get(5)?, batch: row.get(0)? };
                looked_at += 1;
                continue;
            }
            read => read?,
        };
        let Some(payload) = stored.payload else { continue };
        step.looked_until = KeptPlace { payload, batch: stored.seq };
        looked_at += 1;
        if stored.record.accepted_at < before && stored.record.why_kept().is_none() {
            done.push(step.looked_until);
        }
    }
    drop(rows);
    for &place in &done {
        drop_payload(tx, place)?;
    }
    step.archived = done.len();
    Ok(step)
}

/// Lets a batch go without its payload, and the payload go with the last batch that has it.
fn drop_payload(tx: &Tx<'_>, place: KeptPlace) -> Result<(), TxError> {
    let KeptPlace { payload, batch } = place;
    tx.connection.prepare_cached("UPDATE batches SET payload = NULL WHERE seq = ?1")?.execute([batch])?;
    let is_shared = tx
        .connection
        .prepare_cached("SELECT 1 FROM batches WHERE payload = ?1 LIMIT 1")?
        .exists([payload])?;
    if !is_shared {
        tx.connection.prepare_cached("DELETE FROM payloads WHERE seq = ?1")?.execute([payload])?;
    }
    Ok(())
}

/// `Archive::forget_entries`.
pub(crate) fn forget_entries(tx: &Tx<'_>, before: UnixMs, limit: usize) -> Result<usize, TxError> {
    Ok(tx
        .connection
        .prepare_cached(
            "DELETE FROM entries WHERE (feed, id) IN
                 (SELECT feed, id FROM entries WHERE at < ?1 ORDER BY at LIMIT ?2)",
        )?
        .execute([int(before.0), int(limit as u64)])?)
}
